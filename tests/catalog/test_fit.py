"""Whether a model fits: what is lowered, in which order, what never is, and what a refusal says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocserve import config
from ocserve.catalog.errors import DoesNotFit
from ocserve.catalog.fit import CONTEXT_FLOOR, Fit, Lowerable, Machine, Wanted, fit, fits
from ocserve.catalog.gguf import GgufHeader, read_header
from ocserve.catalog.need import Plan, need
from ocserve.catalog.planning import wanted
from ocserve.machine import Device, HostMemory
from ocserve.modelcard import Defaults
from tests import tiny
from tests.catalog import shapes

GB = 1_000_000_000
MB = 1_000_000
NAMES = ("llama3-8b", "gemma3-4b", "mamba-130m", "falcon-h1-0.5b")
PLAN = Plan(context=8192, parallel=4, pool_tokens=16_384, host_cache_bytes=512 * MB)
LOWERABLE: tuple[Lowerable, ...] = ("context", "pool_tokens", "gpu_layers", "host_cache_bytes")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GgufHeader]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: read_header(shapes.write(folder / f"{name}.gguf", name)) for name in NAMES}


def machine(host: float, *gpus: float, kind: str = "gpu") -> Machine:
    """A machine by free gigabytes."""
    cards = tuple(Device(f"GPU{index}", "", kind, int(free * GB), int(free * GB)) for index, free in enumerate(gpus))
    return Machine(HostMemory(total_bytes=int(host * GB), available_bytes=int(host * GB)), cards)


def lowered(found: Fit) -> dict[str, tuple[int, int]]:
    return {note.lowered: (note.asked, note.used) for note in found.notes}


def test_nothing_is_lowered_where_there_is_room(headers: dict[str, GgufHeader]) -> None:
    found = fit(headers["llama3-8b"], Wanted(PLAN), machine(64))
    assert found.plan == PLAN
    assert found.notes == ()
    on_gpu = fit(headers["llama3-8b"], Wanted(PLAN), machine(64, 24))
    assert on_gpu.plan.gpu_layers == 33
    assert on_gpu.notes == ()
    assert on_gpu.need.gpu_bytes[0] > 8 * GB
    assert on_gpu.need.host_bytes < 3 * GB


def test_main_memory_for_prefixes_goes_first_then_the_pool_then_the_context(headers: dict[str, GgufHeader]) -> None:
    header = headers["llama3-8b"]
    everything = need(header, PLAN).host_bytes / GB
    first = fit(header, Wanted(PLAN), machine(everything - 0.2))
    assert set(lowered(first)) == {"host_cache_bytes"}
    assert 300 * MB < first.plan.host_cache_bytes < 320 * MB
    second = fit(header, Wanted(PLAN), machine(everything - 1))
    assert set(lowered(second)) == {"host_cache_bytes", "pool_tokens"}
    assert second.plan.context == 8192 < second.plan.pool_tokens < 16_384
    third = fit(header, Wanted(PLAN), machine(everything - 2))
    assert {"pool_tokens", "context"} <= set(lowered(third))
    assert CONTEXT_FLOOR <= third.plan.context == third.plan.pool_tokens < 8192
    with pytest.raises(DoesNotFit):
        fit(header, Wanted(PLAN), machine(everything - 3))


def test_notes_tell_what_was_lowered_and_why_with_both_numbers(headers: dict[str, GgufHeader]) -> None:
    found = fit(headers["llama3-8b"], Wanted(replace(PLAN, host_cache_bytes=0)), machine(10.5))
    (note,) = found.notes
    assert re.fullmatch(
        r"the pool of all sequences is lowered from 16,384 tokens to 1\d,\d{3} tokens: "
        r"1[01]\.\d\d GB of main memory would be needed and 10\.50 GB are available",
        note.text,
    )


def test_the_gpu_keeps_all_layers_while_a_smaller_context_can_pay_for_it(headers: dict[str, GgufHeader]) -> None:
    tight = fit(headers["llama3-8b"], Wanted(PLAN), machine(64, 10.6))
    assert tight.plan.gpu_layers == 33
    assert tight.plan.pool_tokens < 16_384
    small = fit(headers["llama3-8b"], Wanted(PLAN), machine(64, 6))
    assert 10 < small.plan.gpu_layers < 33
    assert small.plan.context >= CONTEXT_FLOOR
    assert "33 layers" in next(note.text for note in small.notes if note.lowered == "gpu_layers")
    assert "GPU0's memory" in small.notes[0].reason
    none = fit(headers["llama3-8b"], Wanted(PLAN), machine(64, 0.1))
    assert (none.plan.gpu_layers, none.plan.context) == (0, 8192)


def test_two_gpus_hold_what_one_cannot(headers: dict[str, GgufHeader]) -> None:
    two = fit(headers["llama3-8b"], Wanted(PLAN), machine(16, 8, 8))
    assert two.plan.gpu_layers == 33
    assert two.notes == ()
    assert all(taken > 4 * GB for taken in two.need.gpu_bytes)


def test_a_gpu_without_memory_of_its_own_takes_main_memory(headers: dict[str, GgufHeader]) -> None:
    shared = machine(12, 11.9, kind="igpu")
    found = fit(headers["llama3-8b"], Wanted(PLAN), shared)
    assert found.need.host_bytes + sum(found.need.gpu_bytes) <= 12 * GB
    assert found.notes != ()
    assert fit(headers["llama3-8b"], Wanted(PLAN), machine(12, 14)).notes == ()


def test_a_machine_without_gpus_is_asked_for_all_layers_all_the_same(headers: dict[str, GgufHeader]) -> None:
    # The engine tells an operator of a GPU that it cannot use, unless no layer was asked for.
    assert fit(headers["llama3-8b"], Wanted(PLAN), machine(64)).plan.gpu_layers == -1


def test_flash_attention_is_left_out_on_a_processor_where_the_scores_fit(headers: dict[str, GgufHeader]) -> None:
    header = headers["llama3-8b"]
    plan = Plan(context=8192, parallel=8, pool_tokens=8192)
    assert not fit(header, Wanted(plan), machine(16)).plan.flash_attention
    assert fit(header, Wanted(plan), machine(16, 16)).plan.flash_attention
    assert not fit(header, Wanted(replace(plan, gpu_layers=0)), machine(16, 16)).plan.flash_attention
    assert fit(header, Wanted(replace(plan, kv_type="q8_0")), machine(16)).plan.flash_attention
    assert fit(header, Wanted(replace(plan, batch_tokens=2048)), machine(64)).plan.flash_attention, "1.2 GB of scores"
    chosen = Wanted(plan, frozenset({"flash_attention"}))
    assert fit(header, chosen, machine(16)).plan.flash_attention
    off = replace(plan, flash_attention=False, kv_type="q8_0")
    with pytest.raises(DoesNotFit, match="q8_0 can only be read by flash attention"):
        fit(header, Wanted(off, frozenset({"flash_attention"})), machine(16))


def test_where_memory_is_short_flash_attention_stays(headers: dict[str, GgufHeader]) -> None:
    header, plan = headers["llama3-8b"], Plan(context=8192, parallel=8, pool_tokens=8192)
    just_enough = need(header, plan).host_bytes / GB
    found = fit(header, Wanted(plan), machine(just_enough + 0.01))
    assert found.plan == plan
    assert not found.notes


def test_the_context_is_bounded_by_what_the_model_was_trained_for(headers: dict[str, GgufHeader]) -> None:
    found = fit(headers["llama3-8b"], Wanted(replace(PLAN, context=100_000, pool_tokens=100_000)), machine(64))
    assert (found.plan.context, found.plan.pool_tokens) == (8192, 100_000)


def test_a_refusal_has_the_numbers_and_remedies_that_work(headers: dict[str, GgufHeader]) -> None:
    header = headers["llama3-8b"]
    asked = replace(PLAN, context=8192, pool_tokens=8192, host_cache_bytes=0)
    with pytest.raises(DoesNotFit) as caught:
        fit(header, Wanted(asked, frozenset({"context"})), machine(9.5))
    message, hint = caught.value.message, str(caught.value.hint)
    for words in ("weights 8.53 GB", "KV 1.07 GB for 8,192 tokens in f16", "compute", "9.50 GB are available"):
        assert words in message
    smaller = re.search(r"try --ctx (\d+)", hint)
    assert smaller is not None
    tokens = int(smaller[1])
    assert fit(header, Wanted(replace(asked, context=tokens, pool_tokens=tokens), frozenset({"context"})), machine(9.5))
    assert "try --kv-type q8_0" in hint
    assert fit(header, Wanted(replace(asked, kv_type="q8_0"), frozenset({"context"})), machine(9.5)).notes == ()
    with pytest.raises(DoesNotFit) as hopeless:
        fit(header, Wanted(asked), machine(4))
    assert hopeless.value.hint == "a smaller quantisation or model needs less"


def test_gpu_layers_that_were_set_are_honoured_or_refused(headers: dict[str, GgufHeader]) -> None:
    header, fixed = headers["llama3-8b"], frozenset[Lowerable]({"gpu_layers"})
    ten = fit(header, Wanted(replace(PLAN, gpu_layers=10), fixed), machine(64, 24))
    assert ten.plan.gpu_layers == 10
    with pytest.raises(DoesNotFit, match="GPU0's memory") as caught:
        fit(header, Wanted(replace(PLAN, gpu_layers=33), fixed), machine(64, 6))
    assert "leave out --gpu-layers" in str(caught.value.hint)


def test_a_cache_type_whose_blocks_do_not_fit_the_heads_is_refused(tmp_path: Path) -> None:
    header = read_header(tiny.write(tmp_path / "tiny.gguf"))
    with pytest.raises(DoesNotFit, match="32 numbers together, and this model's heads have 8") as caught:
        fit(header, Wanted(replace(PLAN, kv_type="q8_0")), machine(64))
    assert caught.value.hint == "use --kv-type f16"
    assert fit(header, Wanted(replace(PLAN, kv_type="f32")), machine(64)).notes == ()


PLANS = st.builds(
    Plan,
    context=st.integers(1, 40_000),
    parallel=st.integers(1, 16),
    pool_tokens=st.integers(1, 120_000),
    gpu_layers=st.sampled_from([-1, -1, 0, 7, 500]),
    kv_type=st.sampled_from(["f16", "q8_0", "f32"]),
    batch_tokens=st.integers(16, 1024),
    host_cache_bytes=st.integers(0, 2 * GB),
).map(lambda plan: replace(plan, pool_tokens=max(plan.pool_tokens, plan.context)))
FREE = st.floats(0.1, 30)
GPUS = st.lists(FREE, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NAMES), plan=PLANS, fixed=st.sets(st.sampled_from(LOWERABLE)), host=FREE, gpus=GPUS, more=FREE
)
def test_whatever_is_asked_of_whatever_machine(
    headers: dict[str, GgufHeader],
    name: str,
    plan: Plan,
    fixed: set[Lowerable],
    host: float,
    gpus: list[float],
    more: float,
) -> None:
    header, asked, here = headers[name], Wanted(plan, frozenset(fixed)), machine(host, *gpus)
    try:
        found = fit(header, asked, here)
    except DoesNotFit:
        if not fixed:
            floor = min(plan.context, CONTEXT_FLOOR, header.context_length)
            smallest = replace(plan, context=floor, pool_tokens=floor, gpu_layers=0, host_cache_bytes=0)
            assert not fits(need(header, smallest, here.gpus), here)
        return
    assert fits(found.need, here)
    assert found.need == need(header, found.plan, here.gpus)
    asked_for = replace(plan, context=min(plan.context, header.context_length))
    assert found.plan.context <= found.plan.pool_tokens
    assert (found.plan.kv_type, found.plan.parallel) == (plan.kv_type, plan.parallel)
    assert set(lowered(found)).isdisjoint(fixed)
    for each in fixed - {"gpu_layers"}:
        assert getattr(found.plan, each) == getattr(asked_for, each)
    assert found.plan.context >= min(asked_for.context, CONTEXT_FLOOR)
    if "pool_tokens" in lowered(found) and "context" not in lowered(found):  # as large as it can be
        above = min((found.plan.pool_tokens // 256 + 1) * 256, plan.pool_tokens)
        assert not fits(need(header, replace(found.plan, pool_tokens=above), here.gpus), here)
    roomier = fit(header, asked, machine(host + more, *gpus))
    assert roomier.plan.gpu_layers >= found.plan.gpu_layers
    if roomier.plan.gpu_layers == found.plan.gpu_layers:
        assert roomier.plan.context >= found.plan.context


def test_what_the_settings_name_is_fixed_and_the_card_fills_the_rest(headers: dict[str, GgufHeader]) -> None:
    defaults, header = Defaults(context=8192, parallel=3), headers["llama3-8b"]
    silent = wanted(config.Engine(), config.Cache(host_bytes=7), defaults, header)
    assert silent.fixed == {"host_cache_bytes"}
    assert wanted(config.Engine(), config.Cache(), defaults, header).fixed == frozenset()
    assert (silent.plan.context, silent.plan.parallel, silent.plan.pool_tokens) == (8192, 3, 16_384)
    assert silent.plan.host_cache_bytes == 7
    engine = config.Engine(context=2048, gpu_layers=4, kv_type="q4_0", parallel=9, prefix_cache=False)
    spoken = wanted(engine, config.Cache(), defaults, header)
    assert spoken.fixed == {"context", "gpu_layers"}
    plan = Plan(context=2048, parallel=9, pool_tokens=4096, gpu_layers=4, kv_type="q4_0", sequences=10, outputs=81)
    assert spoken.plan == plan


def test_a_pool_of_the_users_own_bounds_the_context_and_is_never_raised(headers: dict[str, GgufHeader]) -> None:
    defaults, header = Defaults(context=8192, parallel=3), headers["llama3-8b"]
    small = wanted(config.Engine(pool_tokens=2048), config.Cache(), defaults, header).plan
    assert (small.context, small.pool_tokens) == (2048, 2048)
    with pytest.raises(config.ConfigError, match="does not fit"):
        wanted(config.Engine(pool_tokens=2048, context=4096), config.Cache(), defaults, header)


def test_ids_are_few_where_each_costs_a_window_or_many_distributions(headers: dict[str, GgufHeader]) -> None:
    defaults = Defaults(context=8192, parallel=4)

    def sequences(name: str, vocabulary: int) -> int:
        header = msgspec.structs.replace(headers[name], vocabulary_size=vocabulary)
        return wanted(config.Engine(), config.Cache(), defaults, header).plan.sequences

    assert sequences("llama3-8b", 49_152) == 128
    assert sequences("llama3-8b", 262_144) == 32
    assert sequences("gemma3-4b", 49_152) == sequences("mamba-130m", 49_152) == 14
