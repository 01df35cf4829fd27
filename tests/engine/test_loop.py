"""The loop on real kernels: the life of requests, sharing, parking, and what clients are told of it."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ocserve.engine import kv, llama, scheduler, storage
from ocserve.engine.constraint import GrammarCompiler
from ocserve.engine.context import Context, DecodeStatus, Row, State
from ocserve.engine.prefixes import PrefixTree
from ocserve.engine.tiers import blocks
from ocserve.engine.tiers.disk import DiskTier
from ocserve.engine.tiers.host import HostTier
from ocserve.engine.tiers.tiers import Tiers
from ocserve.generation import Failed, Finished, JsonConstraint, Sampling, Started, TextDelta, Usage
from tests import tiny
from tests.cost import idle_share
from tests.engine.schedules import IDENTITY, NO_END, Engine, FixedCosts, Oracle, load


@pytest.fixture
def engine(model: llama.Model) -> Engine:
    return Engine(Path(), model=model)


def prompt(length: int, first: int = 10) -> list[int]:
    return [3 + (first + 7 * index) % 250 for index in range(length)]


def test_events_come_in_order_and_their_tokens_add_up(engine: Engine) -> None:
    engine.submit("one", (40, 50, 60), 30)
    engine.run()
    started, *deltas, finished = engine.events["one"]
    assert started == Started(prompt_tokens=3)
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(finished, Finished)
    assert sum(delta.tokens for delta in deltas if isinstance(delta, TextDelta)) == 30


def test_who_has_ended_is_told_before_the_next_step_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may take long, and may be the last."""
    engine.submit("left", range(40, 60), 100)
    engine.submit("stays", range(60, 80), 100)
    for _ in range(6):
        engine.loop.turn(wait=False)
    engine.loop.cancel("left")
    told: list[bool] = []
    decode = engine.context.decode
    monkeypatch.setattr(
        engine.context, "decode", lambda rows: told.append(engine.end("left") is not None) or decode(rows)
    )
    engine.loop.turn(wait=False)
    assert told == [True]
    engine.loop.cancel("stays")
    engine.run()


def test_who_has_had_no_prompt_for_a_step_comes_back_without_credit(engine: Engine) -> None:
    engine.submit("a", range(40, 80), 30, salt=b"a")
    engine.submit("b", range(80, 90), 30, salt=b"b")
    for _ in range(10):
        engine.loop.turn(wait=False)
    assert not engine.loop._order._served
    engine.run()


def test_a_cancel_ends_a_request_in_every_phase(engine: Engine) -> None:
    engine.submit("decoding", (40,) * 20, 480)
    for _ in range(5):
        engine.loop.turn(wait=False)
    engine.submit("prefilling", prompt(300), 10, choices=2)
    engine.loop.turn(wait=False)
    engine.submit("queued", (40,), 480)
    for name in ("queued", "prefilling", "decoding"):
        engine.loop.cancel(name)
    engine.run()
    for name, choices in (("decoding", 1), ("prefilling", 2), ("queued", 1)):
        ends = [event for event in engine.events[name] if isinstance(event, Finished)]
        assert [end.reason for end in ends] == ["cancelled"] * choices
    stats = engine.loop.stats()
    assert stats.cells_used == stats.cells_kept
    engine.kv.drop_kept()
    assert engine.kv.cells == 0


def test_the_wall_clock_cap_ends_with_length_and_an_expired_wait_with_an_error(engine: Engine) -> None:
    for index in range(4):
        engine.submit(f"holder{index}", (40 + index,) * 20, 400, deadline_s=1.0)
    engine.submit("queued", (60,) * 40, 10, deadline_s=0.5)
    engine.run()
    queued = engine.end("queued")
    assert isinstance(queued, Failed)
    assert queued.error.status == 429
    assert all(getattr(engine.end(f"holder{index}"), "reason", None) == "length" for index in range(4))


def test_a_stop_string_is_named_and_cut(engine: Engine) -> None:
    free = engine.submit("free", (40, 50, 60), 40)
    engine.run()
    text = b"".join(engine.model.vocab.piece(token) for token in free.generated).decode(errors="replace")
    stop = next(text[start : start + 2] for start in range(5, 30) if text[start : start + 2].isascii())
    engine.submit("stopped", (40, 50, 60), 40, stop=(stop,))
    engine.run()
    end = engine.end("stopped")
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_sequence) == ("stop", stop)
    assert engine.text("stopped") == text[: text.index(stop)]


def test_an_idle_loop_uses_no_cpu(engine: Engine) -> None:
    thread = threading.Thread(target=engine.loop.run, daemon=True)
    thread.start()
    engine.submit("one", (40,) * 40, 3)
    deadline = time.monotonic() + 20
    while not engine.end("one") or engine.kv.unsaved:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert idle_share() < 0.05
    engine.loop.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_unusable_logits_end_the_request_and_not_the_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN would abort inside llama.cpp's sampler."""
    decode = Context.decode

    def poisoned(self: Context, rows: list[Row]) -> DecodeStatus:
        status = decode(self, rows)
        for index, row in enumerate(rows):
            if row.logits:
                self.logits(index).fill(np.nan)
        return status

    monkeypatch.setattr(Context, "decode", poisoned)
    engine.submit("poisoned", (40,), 5, choices=2)
    engine.run()
    monkeypatch.undo()
    ends = [event for event in engine.events["poisoned"] if isinstance(event, Finished | Failed)]
    assert len(ends) == 1
    assert isinstance(ends[0], Failed)
    assert ends[0].error.code == "engine_failed"
    engine.submit("fine", (40,), 5)
    engine.run()
    assert isinstance(engine.end("fine"), Finished)


def test_a_prefix_that_is_being_computed_is_waited_for(engine: Engine) -> None:
    """Simultaneous requests compute what they share once."""
    trunk = prompt(200)
    for index in range(4):
        engine.submit(f"r{index}", [*trunk, *prompt(16, first=3 * index)], 5)
    engine.run()
    assert engine.loop.stats().prefill_tokens <= 200 + 4 * 16
    cached = [engine.end(f"r{index}").usage.cached_tokens for index in range(4)]  # type: ignore[union-attr]
    assert sorted(cached)[0] == 0
    assert sorted(cached)[1] >= 200


def test_nothing_is_shared_between_tenants(engine: Engine) -> None:
    """With a positive control: the same prompt of the same tenant is shared."""
    engine.submit("a", prompt(200), 5, salt=b"a")
    engine.run()
    engine.submit("b", prompt(200), 5, salt=b"b")
    engine.submit("again", prompt(200), 5, salt=b"a")
    engine.run()
    cached = {name: engine.end(name).usage.cached_tokens for name in ("a", "b", "again")}  # type: ignore[union-attr]
    assert cached == {"a": 0, "b": 0, "again": 199}


def test_a_conversation_computes_only_what_is_new(engine: Engine) -> None:
    tokens = prompt(50)
    for turn in range(8):
        before = engine.loop.stats().prefill_tokens
        sequence = engine.submit(f"t{turn}", tokens, 10)
        engine.run()
        computed = engine.loop.stats().prefill_tokens - before
        assert computed == (50 if turn == 0 else 1 + 20)  # the last sampled token was not computed yet
        tokens = [*tokens, *sequence.generated, *prompt(20, first=turn)]


def test_sharing_can_be_turned_off(model: llama.Model) -> None:
    engine = Engine(Path(), model=model, sharing=False)
    for index in range(2):
        engine.submit(f"r{index}", prompt(200), 5)
    engine.run()
    assert engine.loop.stats().prefill_tokens == 400
    assert engine.kv.cells == 0


def test_choices_share_one_prefill_and_differ(engine: Engine) -> None:
    sampling = Sampling(temperature=1.5, seed=5, logit_bias=NO_END)
    engine.submit("many", prompt(100), 30, choices=3, sampling=sampling)
    engine.run()
    assert engine.loop.stats().prefill_tokens <= 100 + 2
    starts = [event for event in engine.events["many"] if isinstance(event, Started)]
    ends = [event for event in engine.events["many"] if isinstance(event, Finished)]
    assert len(starts) == 1
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert [end.usage.completion_tokens for end in ends] == [30, 30, 30]
    assert len({engine.text("many", index) for index in range(3)}) == 3


@pytest.mark.parametrize("park_bytes", [0, 1 << 24])
def test_pressure_is_invisible(model: llama.Model, park_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that together need several times the pool all finish, with the text they have alone."""
    monkeypatch.setattr(scheduler, "GROWTH_TOKENS", 2)  # admit greedily, so that sequences have to be preempted
    engine = Engine(Path(), model=model, pool_tokens=256, parallel=8, park_bytes=park_bytes)
    sequences = [engine.submit(f"r{index}", prompt(40, first=11 * index), 60) for index in range(20)]
    engine.run()
    oracle = Oracle(model)
    for sequence in sequences:
        end = engine.end(sequence.id)
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens == 60
        oracle.check(sequence)
    stats = engine.loop.stats()
    assert stats.preemptions > 0
    assert stats.parked == stats.resumed
    assert bool(stats.parked) == bool(park_bytes)
    if park_bytes:
        assert stats.prefill_tokens <= 20 * 40 + stats.resumed


def test_the_first_of_many_prompts_is_answered_first(engine: Engine) -> None:
    for index in range(4):
        engine.submit(f"r{index}", prompt(64, first=13 * index), 3)
    firsts = []
    for _ in range(40):
        engine.loop.turn(wait=False)
        for index in range(4):
            if f"r{index}" not in firsts and any(isinstance(e, TextDelta) for e in engine.events[f"r{index}"]):
                firsts.append(f"r{index}")
    assert firsts == ["r0", "r1", "r2", "r3"]


FREE_ROWS = FixedCosts(step_s=0.01, row_s=0.00001)  # like a GPU
DEAR_ROWS = FixedCosts(step_s=0.0, row_s=0.01)


def test_drafts_that_pay_save_steps_and_change_nothing(model: llama.Model) -> None:
    """A greedy answer out of few words repeats itself, and is drafted from itself."""
    few_words = Sampling(temperature=0.0, logit_bias={**NO_END, **dict.fromkeys(range(40, 43), 100.0)})
    texts, steps = [], []
    for speculates in (False, True):
        engine = Engine(Path(), model=model, costs=FREE_ROWS)
        sequences = [
            engine.submit(f"r{i}", prompt(20, first=i), 150, sampling=few_words, speculates=speculates)
            for i in range(2)
        ]
        engine.run()
        texts.append([engine.text(f"r{i}") for i in range(2)])
        steps.append(engine.loop.stats().steps)
        engine.kv.drop_kept()
        assert engine.kv.cells == 0
    assert texts[0] == texts[1]
    assert steps[1] < 0.8 * steps[0]
    assert sequences[0].usage.accepted_draft_tokens > 20


def test_drafts_are_left_out_where_the_pool_is_full(model: llama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need cells too: a plan with them once exceeded the pool and took the engine with it."""
    monkeypatch.setattr(scheduler, "GROWTH_TOKENS", 2)
    few_words = Sampling(temperature=0.0, logit_bias={**NO_END, **dict.fromkeys(range(40, 43), 100.0)})
    engine = Engine(Path(), model=model, costs=FREE_ROWS, pool_tokens=256, parallel=6)
    for index in range(6):
        engine.submit(f"r{index}", prompt(20, first=index), 120, sampling=few_words, speculates=True)
    engine.run()
    assert all(isinstance(engine.end(f"r{index}"), Finished) for index in range(6))
    stats = engine.loop.stats()
    assert stats.drafted_tokens > 0
    assert stats.preemptions > 0


def test_drafts_that_do_not_pay_are_not_verified(model: llama.Model) -> None:
    engine = Engine(Path(), model=model, costs=DEAR_ROWS)
    engine.submit("one", prompt(20), 150, speculates=True)
    engine.run()
    assert engine.loop.stats().drafted_tokens == 0


def test_sampling_is_the_same_with_drafts(model: llama.Model) -> None:
    """One random stream gives one text: every token is drawn by the sequence's own sampler, drafted or not."""
    sampling = Sampling(temperature=0.3, seed=11, logit_bias=NO_END)
    texts = []
    for speculates in (False, True):
        engine = Engine(Path(), model=model, costs=FREE_ROWS)
        engine.submit("one", prompt(20) * 3, 150, sampling=sampling, speculates=speculates)
        engine.run()
        texts.append(engine.text("one"))
    assert texts[0] == texts[1]
    assert engine.loop.stats().drafted_tokens > 0


@pytest.fixture(scope="module")
def compiler(model: llama.Model) -> GrammarCompiler:
    return GrammarCompiler(model.vocab, lambda text: model.vocab.tokenize(text, parse_special=False))


SCHEMA = (
    '{"type":"object","properties":{"measured_temperature_celsius":{"type":"integer","minimum":0,"maximum":99},'
    '"kind":{"enum":["indoor","outdoor"]}},"required":["measured_temperature_celsius","kind"],'
    '"additionalProperties":false}'
)


def test_a_schema_is_held_to_and_fast_forward_changes_only_the_steps(
    model: llama.Model, compiler: GrammarCompiler
) -> None:
    guide = compiler.guide(JsonConstraint(schema=SCHEMA))
    ids, steps = [], []
    for fast_forward in (False, True):
        engine = Engine(Path(), model=model, costs=FREE_ROWS, fast_forward=fast_forward)
        sampling = Sampling(temperature=1.0, seed=3)
        sequences = [engine.submit(f"r{i}", prompt(20, first=i), 200, sampling=sampling, guide=guide) for i in range(3)]
        engine.run()
        for sequence in sequences:
            end = engine.end(sequence.id)
            assert isinstance(end, Finished)
            assert end.reason == "stop"
            value = json.loads(engine.text(sequence.id))
            assert 0 <= value["measured_temperature_celsius"] <= 99
            assert value["kind"] in ("indoor", "outdoor")
        ids.append([sequence.generated for sequence in sequences])
        steps.append(engine.loop.stats().steps)
        assert engine.loop.stats().forced_tokens > 3 * 20
    assert ids[0] == ids[1]
    assert steps[1] < 0.5 * steps[0]


def test_an_answer_that_is_cut_inside_a_value_says_length(engine: Engine, compiler: GrammarCompiler) -> None:
    guide = compiler.guide(JsonConstraint(schema=SCHEMA))
    engine.submit("short", prompt(20), 5, guide=guide)
    engine.run()
    end = engine.end("short")
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.completion_tokens) == ("length", 5)


def test_a_prefix_larger_than_its_tier_is_stored_once_and_not_for_ever(model: llama.Model) -> None:
    """Blocks that had to go again were stored anew without end, on a machine that had nothing else to do."""
    engine = Engine(Path(), model=model, tiers=Tiers(HostTier(40_000), None))  # a block takes 33 kB
    engine.submit("one", prompt(400), 5)
    engine.run()
    for _ in range(10):
        engine.kv.save_some()
    assert not engine.kv.unsaved


def test_idle_cells_are_left_to_the_tiers_when_another_request_runs(model: llama.Model) -> None:
    """On a CPU each row of a step passes over them. The prompt that goes on where its cells are still finds them."""
    engine = Engine(Path(), model=model, most_idle=50)
    one = engine.submit("one", prompt(300), 5)
    engine.run()
    engine.submit("goes on", [*one.prompt, *one.generated, 7, 8], 5)
    engine.run()
    assert engine.kv.hits.resident >= 300
    assert engine.kv.hits.host == 0
    while engine.kv.save_some():
        pass
    engine.submit("other", prompt(40, first=5), 60)
    engine.loop.turn(wait=False)
    assert engine.kv.cells_kept <= 50
    engine.run()
    again = engine.submit("again", [*one.prompt, 9], 5)
    engine.run()
    assert engine.kv.hits.host == 256
    Oracle(model).check(again)


def test_idle_cells_that_no_tier_has_yet_are_stored_while_another_request_runs(model: llama.Model) -> None:
    """Otherwise all its steps would be slow: between two requests there may be no idle moment."""
    engine = Engine(Path(), model=model, most_idle=50)
    engine.submit("one", prompt(300), 5)
    engine.run()
    assert engine.kv.unsaved
    engine.submit("other", prompt(20, first=3), 30)
    for _ in range(4):
        engine.loop.turn(wait=False)
    assert engine.kv.cells_kept <= 50
    engine.run()
    again = engine.submit("again", [*prompt(300), 9], 5)
    engine.run()
    assert engine.kv.hits.host == 256
    Oracle(model).check(again)


def test_prompts_that_begin_together_take_their_prefixes_before_idle_cells_go(model: llama.Model) -> None:
    """The first of them once had the second one's prefix sent to the tiers, from where it came back in whole blocks."""
    engine = Engine(Path(), model=model, pool_tokens=2048)
    engine.kv._most_idle = lambda begins: 0 if begins else 2048
    told = [engine.submit(f"r{index}", prompt(200, first=7 * index), 5) for index in range(2)]
    engine.run()
    before = engine.kv.hits.resident
    for sequence in told:
        engine.submit(f"{sequence.id} again", [*sequence.prompt, *sequence.generated, 9], 5)
    engine.run()
    assert engine.kv.hits.resident - before >= 2 * 200
    assert engine.kv.hits.host == 0


def test_idle_cells_that_no_tier_has_room_for_stay(model: llama.Model) -> None:
    engine = Engine(Path(), model=model, most_idle=0, tiers=Tiers(HostTier(1000), None))
    engine.submit("one", prompt(300), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    engine.submit("other", prompt(40, first=5), 5)
    engine.run()
    assert engine.kv.cells_kept >= 300


def _found_after_another_ran(engine: Engine) -> int:
    """How many tokens of `prompt(300)`, which lie idle, main memory has after another sequence made them go."""
    engine.submit("other", prompt(20, first=3), 30)
    for _ in range(6):
        engine.loop.turn(wait=False)
    assert engine.kv.cells_kept <= 50
    engine.run()
    engine.submit("again", [*prompt(300), 9], 5)
    engine.run()
    return engine.kv.hits.host


def test_idle_cells_whose_blocks_had_to_leave_the_tiers_are_stored_again(model: llama.Model) -> None:
    """Otherwise they would stay for ever, and be looked at in every step."""
    tiers = Tiers(HostTier(100_000), None)  # a block takes 33 kB
    engine = Engine(Path(), model=model, most_idle=50, tiers=tiers)
    engine.submit("one", prompt(300), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    tiers.put(b"another's", bytes(99_000))
    assert _found_after_another_ran(engine) == 256


def test_idle_cells_go_where_a_tier_has_room_for_their_beginning(model: llama.Model) -> None:
    engine = Engine(Path(), model=model, most_idle=50, tiers=Tiers(HostTier(40_000), None))
    engine.submit("one", prompt(300), 5)
    engine.run()
    assert _found_after_another_ran(engine) == 128


@pytest.mark.parametrize("host_bytes", [1000, 1 << 22])
def test_steps_look_at_no_idle_prefix_that_cannot_go(
    model: llama.Model, monkeypatch: pytest.MonkeyPatch, host_bytes: int
) -> None:
    """No tier has room for them, or another sequence runs on their cells: until that changes there is nothing to do."""
    engine = Engine(Path(), model=model, pool_tokens=2048, most_idle=0, tiers=Tiers(HostTier(host_bytes), None))
    for index in range(4):
        engine.submit(f"r{index}", prompt(200, first=7 * index), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    engine.submit("other", [*prompt(200), 9], 100)
    for _ in range(3):
        engine.loop.turn(wait=False)
    looked: list[object] = []
    monkeypatch.setattr(Tiers, "__contains__", lambda self, key: looked.append(key) or True)
    monkeypatch.setattr(PrefixTree, "private_cells", lambda self, holder: looked.append(holder) or 1)
    for _ in range(10):
        engine.loop.turn(wait=False)
    assert not looked


def test_a_step_stores_no_more_bytes_than_a_request_may_wait_for(
    model: llama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four long prefixes that no tier has yet are to go when a first sequence begins."""
    block = 35_000
    monkeypatch.setattr(storage, "STORED_IN_A_STEP", 2 * block)
    monkeypatch.setattr(kv, "STORED_AT_ONCE", block)
    engine = Engine(Path(), model=model, pool_tokens=2048, most_idle=2048)
    for index in range(4):
        engine.submit(f"r{index}", prompt(400, first=7 * index), 5)
    engine.run()
    engine.kv._most_idle = lambda begins: 0
    saved: list[int] = []
    save = Context.save

    def counted(self: Context, sequence: int) -> State:
        state = save(self, sequence)
        saved[-1] += state.nbytes
        return state

    monkeypatch.setattr(Context, "save", counted)
    engine.submit("other", prompt(20, first=3), 60)
    for _ in range(12):
        saved.append(0)
        engine.loop.turn(wait=False)
    assert 2 * block <= saved[0] <= 5 * block
    assert max(saved[1:]) <= 2 * block
    assert sum(saved) > 11 * 32_000, "all twelve blocks"
    assert engine.kv.cells_kept <= 16


def test_a_state_that_cannot_be_restored_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length once counted as computed although nothing was there, and the answer went on from nothing."""
    recurrent = load(tiny.write(tmp_path / "m.gguf", "recurrent"))
    engine = Engine(Path(), model=recurrent)
    first = engine.submit("first", prompt(300), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    monkeypatch.setattr(engine.context, "restore", lambda sequence, state: False)
    again = engine.submit("again", [*first.prompt[:290], *prompt(60, first=5)], 20)
    engine.run()
    Oracle(recurrent).check(again)


def test_a_machine_without_cells_for_all_goes_on_with_fewer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp can run out of a window's cells, which no plan knows: nobody fails for it."""
    decode = Context.decode

    def crowded(self: Context, rows: list[Row]) -> DecodeStatus:
        return DecodeStatus.NO_SLOT if len({row.sequence for row in rows}) > 2 else decode(self, rows)

    monkeypatch.setattr(Context, "decode", crowded)
    for index in range(4):
        engine.submit(f"r{index}", prompt(20, first=7 * index), 30)
    engine.run()
    assert all(isinstance(engine.end(f"r{index}"), Finished) for index in range(4))


def test_a_long_prefix_comes_back_while_others_go_on(model: llama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks come a few at a time: nobody's next token waits for all of them."""
    for module in (kv, storage, blocks):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(kv, "RESTORED_AT_ONCE", 3)
    engine = Engine(Path(), model=model, pool_tokens=1024)
    engine.submit("first", prompt(400), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    engine.kv.drop_kept()
    engine.submit("other", prompt(20, first=3), 200)
    engine.loop.turn(wait=False)
    again = engine.submit("again", prompt(400), 20)
    tokens, reached = [], []
    while not again.generated:
        engine.loop.turn(wait=False)
        tokens.append(len(engine.loop._running[0].generated))
        reached.append(again.computed)
    assert reached[:7] == [48 * turn for turn in range(1, 8)]
    assert reached[-1] == 400, "and the rest is computed"
    assert all(later > earlier for earlier, later in pairwise(tokens[:-1]))
    engine.run()
    end = engine.end("again")
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 384
    Oracle(model).check(again)


def test_nobody_waits_for_the_disk(model: llama.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block that is still being read is left for later while others decode, and waited for when nobody does."""
    for module in (kv, storage, blocks):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 16)
    disk = DiskTier(tmp_path / "prefixes", IDENTITY, 1 << 24, pytest.fail)
    engine = Engine(Path(), model=model, pool_tokens=1024, tiers=Tiers(HostTier(0), disk))
    engine.submit("first", prompt(200), 5)
    engine.run()
    while engine.kv.save_some():
        pass
    assert disk.flush(10)
    engine.kv.drop_kept()
    read, go_on = disk.get, threading.Event()
    monkeypatch.setattr(disk, "get", lambda key: read(key) if go_on.wait(10) else pytest.fail("never told to go on"))
    other = engine.submit("other", prompt(20, first=3), 60)
    engine.loop.turn(wait=False)
    again = engine.submit("again", prompt(200), 5)
    for _ in range(20):
        engine.loop.turn(wait=False)
    assert len(other.generated) > 15
    assert again.computed == 0
    go_on.set()
    engine.run()
    end = engine.end("again")
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 192
    Oracle(model).check(again)
    disk.close()


def test_a_prompt_that_was_never_begun_was_not_used(model: llama.Model) -> None:
    engine = Engine(Path(), model=model, parallel=1)
    engine.submit("runs", range(40, 60), 5)
    for name, deadline_s in (("left", 1e9), ("expires", 0.02)):
        engine.submit(name, range(60, 80), 5, deadline_s=deadline_s)
    engine.loop.turn(wait=False)
    engine.loop.cancel("left")
    engine.run()
    left, expires = engine.end("left"), engine.end("expires")
    assert isinstance(left, Finished)
    assert isinstance(expires, Failed)
    assert left.usage == expires.usage == Usage()
