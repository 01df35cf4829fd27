"""What a model takes, against published figures and against what llama.cpp itself reserves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.catalog.gguf import GgufHeader, read_header
from ocserve.catalog.need import Plan, kv_bytes_per_token, kv_row_bytes, need, placement
from ocserve.machine import Device
from tests import tiny, tiny_embedding
from tests.catalog import shapes
from tests.catalog.measured import ROOT, Job, Reserved, measure

LONG = Plan(context=16_384, parallel=8, pool_tokens=16_384)
SHORT = Plan(context=2000, parallel=2, pool_tokens=2000, kv_type="q8_0", batch_tokens=512)
ONE = Plan(context=512, parallel=1, pool_tokens=512, kv_type="f32", batch_tokens=64, outputs=8)
GB = 1_000_000_000


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, GgufHeader]]:
    folder = tmp_path_factory.mktemp("shapes")
    paths = {name: shapes.write(folder / f"{name}.gguf", name) for name in shapes.SHAPES}
    return {name: (path, read_header(path)) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("llama3-8b", 131_072),  # 2 × 32 layers × 8 heads × 128 × 2 bytes
        ("mistral-7b", 131_072),  # states a window, which llama.cpp does not use for this architecture
        ("qwen2.5-7b", 57_344),
        ("qwen3-8b", 147_456),
        ("qwen3-30b-a3b", 98_304),
        ("gemma2-9b", 172_032),  # half of its layers slide
        ("gemma3-4b", 20_480),  # 5 of 34 layers do not
        ("deepseek-v2-lite", 31_104),  # 27 rows of 512 + 64, which are keys and values
        ("mamba-130m", 0),
        ("falcon-h1-0.5b", 18_432),
    ],
)
def test_the_cache_of_a_token_is_the_published_one(
    headers: dict[str, tuple[Path, GgufHeader]], name: str, per_token: int
) -> None:
    assert kv_bytes_per_token(headers[name][1]) == per_token


@pytest.mark.parametrize(
    ("name", "state"),
    [("mamba-130m", 24 * (3 + 16) * 1536 * 4), ("falcon-h1-0.5b", 36 * (3 * (1536 + 256) + 128 * 1536) * 4)],
)
def test_a_recurrent_models_state_grows_with_sequences_only(
    headers: dict[str, tuple[Path, GgufHeader]], name: str, state: int
) -> None:
    header = headers[name][1]
    few, many = need(header, LONG), need(header, replace(LONG, parallel=12))
    assert many.kv_bytes - few.kv_bytes == 4 * state


def test_a_window_is_counted_once_a_sequence_and_only_where_it_slides(
    headers: dict[str, tuple[Path, GgufHeader]],
) -> None:
    header = headers["gemma3-4b"][1]
    row = 2 * 4 * 256 * 2
    assert need(header, replace(LONG, parallel=2)).kv_bytes == row * (5 * 16_384 + 29 * (2 * 1024 + 256))
    assert need(header, replace(LONG, full_window=True)).kv_bytes == row * 34 * 16_384
    tight = replace(LONG, context=512, pool_tokens=512)
    assert need(header, tight).kv_bytes == row * 34 * 512  # never more than the pool


@pytest.mark.parametrize(("kv_type", "nbytes"), [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q4_0", 18)])
def test_types_have_their_block_sizes(kv_type: str, nbytes: int) -> None:
    assert kv_row_bytes(32, kv_type) == nbytes  # type: ignore[arg-type]


def check(predicted: GgufHeader, plan: Plan, actual: Reserved, *, allocated: bool) -> None:
    forecast = need(predicted, plan)
    assert forecast.kv_bytes == pytest.approx(actual.kv, rel=0.05, abs=6000)  # the log rounds to 0.01 MiB
    assert 1.0 <= forecast.compute_bytes / (actual.compute - 6000) <= 3.0
    if allocated:
        assert forecast.weights_bytes == pytest.approx(actual.weights, rel=0.05, abs=6000)


def test_models_of_every_size_are_predicted_as_llama_cpp_reserves_them(
    headers: dict[str, tuple[Path, GgufHeader]],
) -> None:
    cases = [(header, path, plan) for path, header in headers.values() for plan in (LONG, SHORT, ONE)]
    cases.append((headers["gemma3-4b"][1], headers["gemma3-4b"][0], replace(LONG, full_window=True, outputs=64)))
    measured = measure([Job(str(path), plan, allocate=False) for _, path, plan in cases])
    for (header, _, plan), actual in zip(cases, measured, strict=True):
        check(header, plan, actual, allocated=False)


def test_real_files_are_predicted_as_llama_cpp_loads_them(tmp_path: Path, smollm2: Path) -> None:
    families: tuple[tiny.Family, ...] = ("attention", "sliding", "recurrent")
    small = [(tiny.write(tmp_path / f"{family}.gguf", family), LONG) for family in families]
    cases = [*small, (smollm2, SHORT), (smollm2, replace(LONG, context=4096, pool_tokens=4096)), (smollm2, ONE)]
    measured = measure([Job(str(path), plan) for path, plan in cases])
    for (path, plan), actual in zip(cases, measured, strict=True):
        header = read_header(path)
        check(header, plan, actual, allocated=True)
        assert actual.resident < need(header, plan).host_bytes


@pytest.mark.parametrize("kind", ["encoder", "reranker", "decoder", "judge"])
def test_models_of_one_result_are_predicted_as_they_compute_their_longest_input(
    tmp_path: Path, kind: tiny_embedding.Kind
) -> None:
    path = tiny_embedding.write(tmp_path / "model.gguf", kind, context=2048, vocabulary=10_000)
    header = read_header(path)
    assert header.pooling == {"encoder": "mean", "decoder": "last"}.get(kind, "rank")
    assert header.takes_whole_inputs == (kind in ("encoder", "reranker"))
    plan = Plan(context=2048, parallel=4, pool_tokens=2048, batch_tokens=256, sequences=64)
    cells, resident = longest_input(path)
    forecast = need(header, plan)
    assert forecast.kv_bytes == pytest.approx(cells, rel=0.05, abs=6000)
    assert (
        resident < forecast.compute_bytes + forecast.kv_bytes + forecast.weights_bytes + 12_000_000
    )  # llama.cpp itself
    if kind == "encoder":  # of the others there is too little to be told from the process itself
        assert forecast.compute_bytes < 3 * resident


LONGEST = """
import json, re, sys, psutil
from ocserve.engine import llama
from ocserve.engine.bindings import api
from ocserve.engine.context import Row
from ocserve.engine.embedding_context import PoolingContext
lines = []
hook = api.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
api.llama_log_set(hook, None)
before = psutil.Process().memory_info().rss
model = llama.Model(sys.argv[1], gpu_layers=0, log=llama.LoadLog.__new__(llama.LoadLog))
context = PoolingContext(model, context=2048, batch_tokens=256, sequences=64, threads=1, kv_type=1)
rows = [Row(5, place, 0, True) for place in range(2048)]
for first in range(0, 2048, context.batch_tokens):
    context.compute(rows[first : first + context.batch_tokens])
grown = psutil.Process().memory_info().rss - before
cells = sum(float(each) for each in re.findall(r"kv_cache: size *= *([0-9.]+) MiB", "".join(lines))) * 2**20
print(json.dumps([cells, grown]))
"""


def longest_input(path: Path) -> tuple[float, float]:
    """Bytes of cells, and by how many a process grows that loads the model and computes an input of all its context."""
    finished = subprocess.run(
        [sys.executable, "-c", LONGEST, str(path)], cwd=ROOT, capture_output=True, timeout=60, check=True
    )
    cells, resident = json.loads(finished.stdout)
    return cells, resident


def gpu(name: str, free: int, total: int | None = None, kind: str = "gpu") -> Device:
    return Device(name, "a GPU", kind, free, total or free)


@given(
    layers=st.integers(1, 200),
    gpu_layers=st.integers(-1, 300),
    free=st.lists(st.integers(0, 80 * GB), min_size=1, max_size=4),
)
def test_layers_are_placed_from_the_last_backwards_in_runs(layers: int, gpu_layers: int, free: list[int]) -> None:
    places = placement(layers, gpu_layers, [gpu(f"g{index}", each) for index, each in enumerate(free)])
    placed = [place for place in places if place is not None]
    assert len(places) == layers + 1
    assert len(placed) == (layers + 1 if gpu_layers < 0 else min(gpu_layers, layers + 1))
    assert places[: len(places) - len(placed)] == [None] * (len(places) - len(placed))
    assert placed == sorted(placed)


@pytest.mark.parametrize("gpu_layers", [0, 1, 5, 33, -1])
@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-9b", "falcon-h1-0.5b"])
def test_what_is_needed_by_place_adds_up_to_what_is_needed_by_purpose(
    headers: dict[str, tuple[Path, GgufHeader]], gpu_layers: int, name: str
) -> None:
    header = headers[name][1]
    forecast = need(header, replace(LONG, gpu_layers=gpu_layers), [gpu("a", 24 * GB), gpu("b", 8 * GB)])
    parts = (forecast.weights_bytes, forecast.kv_bytes, forecast.compute_bytes, forecast.overhead_bytes)
    assert forecast.total_bytes == sum(parts) + forecast.host_cache_bytes
    assert forecast.kv_bytes == need(header, LONG).kv_bytes


def test_tied_embeddings_are_there_twice_once_the_output_is_on_a_gpu(
    headers: dict[str, tuple[Path, GgufHeader]],
) -> None:
    tied, own = headers["gemma2-9b"][1], headers["llama3-8b"][1]
    card = [gpu("a", 80 * GB)]
    assert need(tied, LONG, card).weights_bytes == tied.tensor_bytes + tied.embedding_bytes
    assert need(tied, replace(LONG, gpu_layers=0), card).weights_bytes == tied.tensor_bytes
    assert need(own, LONG, card).weights_bytes == own.tensor_bytes
    assert need(own, LONG, card).host_bytes < GB + own.embedding_bytes
