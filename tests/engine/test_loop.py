"""The loop on real kernels: what it serves under batching, preemption and cancels is what the model says alone.

Equality is tie-aware: each served token, teacher-forced through an uncached run of its sequence, must be within the
noise of the top logit that computing the same tokens in other chunks causes.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from ocserve.engine import llama, scheduler
from ocserve.engine.context import Context, Row
from ocserve.engine.loop import EngineLoop
from ocserve.engine.sampler import SamplerChain
from ocserve.engine.slots import Sequence
from ocserve.engine.threads import ThreadChooser
from ocserve.engine.wire import Step
from ocserve.generation import (
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    Sampling,
    Started,
    TextDelta,
    TokenPrompt,
)
from tests import tiny

NO_END = {0: -100.0, tiny.END_OF_TURN: -100.0}


class Bench:
    """A tiny model with a running loop and a record of its events."""

    def __init__(self, path: Path, *, pool_tokens: int, parallel: int) -> None:
        log = llama.LoadLog()
        self.model = llama.Model(str(path), gpu_layers=0, log=log)
        log.close()
        context = Context(
            self.model, pool_tokens=pool_tokens, sequences=parallel, batch_tokens=64, threads=1, exact=True
        )
        self.events: dict[str, list[GenerateEvent]] = defaultdict(list)
        self.loop = EngineLoop(
            context,
            self.model.vocab,
            parallel=parallel,
            batch_tokens=64,
            threads=ThreadChooser(few=1, many=1),
            emit=self._record,
        )
        threading.Thread(target=self.loop.run, daemon=True).start()

    def _record(self, step: Step) -> None:
        for request_id, event in step.events:
            self.events[request_id].append(event)

    def submit(
        self, name: str, prompt: tuple[int, ...], max_tokens: int, *, stop: tuple[str, ...] = (), deadline_s: float = 60
    ) -> Sequence:
        sampling = Sampling(temperature=0.0, logit_bias=NO_END)
        request = GenerateRequest(
            request_id=name,
            model="m",
            prompt=TokenPrompt(tokens=prompt),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            salt=name[:1].encode(),
        )
        sampler = SamplerChain(self.model.vocab, sampling, seed=1, window=512, prompt=prompt)
        deadline = time.monotonic() + deadline_s
        sequence = Sequence(request, prompt, max_tokens=max_tokens, sampler=sampler, deadline=deadline)
        self.loop.submit(sequence)
        return sequence

    def ended(self, name: str) -> Finished | Failed | None:
        events = self.events[name]
        return events[-1] if events and isinstance(events[-1], Finished | Failed) else None

    def wait(self, names: list[str]) -> None:
        deadline = time.monotonic() + 120
        while not all(self.ended(name) for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def teacher_forced(model: llama.Model, tokens: list[int], chunk: int, neighbour: int = 0) -> np.ndarray:
    """Logits after every token, computed in chunks of `chunk` beside `neighbour` cells of another sequence."""
    context = Context(model, pool_tokens=1024, sequences=64, batch_tokens=64, threads=1, exact=True)
    for position in range(neighbour):
        context.decode([Row(40, position, 1, False)])
    rows = []
    for start in range(0, len(tokens), chunk):
        part = range(start, min(start + chunk, len(tokens)))
        context.decode([Row(tokens[position], position, 0, True) for position in part])
        rows += [np.array(context.logits(index)) for index in range(len(part))]
    return np.array(rows)


# Only the order of additions is left. A wrong or foreign cell moves the logits of these models by whole units.
NOISE_FLOOR = 1e-4


def check_served(model: llama.Model, sequence: Sequence) -> None:
    """Every token that was served is the uncached run's best, up to the noise of computing it in another order."""
    tokens = [*sequence.prompt, *sequence.generated]
    logits = teacher_forced(model, tokens, 32)
    noise = float(np.abs(logits - teacher_forced(model, tokens, 7, neighbour=100)).max())
    logits[:, list(NO_END)] = -np.inf
    first = len(sequence.prompt) - 1
    for index, token in enumerate(sequence.generated):
        row = logits[first + index]
        assert row[token] >= row.max() - 4 * noise - NOISE_FLOOR, f"token {index} of {sequence.id}"


@pytest.mark.parametrize("family", ["attention", "sliding", "recurrent"])
def test_random_schedules_serve_what_the_model_says_alone(
    tmp_path: Path, family: tiny.Family, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrivals, cancels and a pool that is too small for all, from a printed seed."""
    monkeypatch.setattr(scheduler, "GROWTH_TOKENS", 2)  # admit greedily, so that sequences have to be preempted
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    choose = random.Random(seed)
    bench = Bench(tiny.write(tmp_path / "m.gguf", family), pool_tokens=512, parallel=6)
    sequences = []
    for index in range(120 if full else 30):
        prompt = tuple(choose.randrange(3, 260) for _ in range(choose.randrange(1, 150)))
        sequences.append(bench.submit(f"{choose.choice('abc')}{index}", prompt, choose.randrange(1, 80)))
        time.sleep(choose.random() * 0.002)
        if choose.random() < 0.15:
            bench.loop.cancel(choose.choice(sequences).id)
    bench.wait([sequence.id for sequence in sequences])
    for sequence in sequences:
        end = bench.ended(sequence.id)
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens == len(sequence.generated)
        if end.reason == "length":
            assert len(sequence.generated) == sequence.max_tokens
        check_served(bench.model, sequence)
    stats = bench.loop.stats()
    assert (stats.running, stats.waiting, stats.cells_used) == (0, 0, 0)
    assert stats.preemptions > 0


def test_a_planted_wrong_token_is_found(tiny_model: Path) -> None:
    """The check itself must be able to fail."""
    bench = Bench(tiny_model, pool_tokens=512, parallel=1)
    sequence = bench.submit("one", (40, 50, 60), 20)
    bench.wait(["one"])
    check_served(bench.model, sequence)
    sequence.generated[10] = (sequence.generated[10] + 1) % 256 + 3
    with pytest.raises(AssertionError, match="token 10"):
        check_served(bench.model, sequence)


@pytest.fixture
def bench(tiny_model: Path) -> Bench:
    return Bench(tiny_model, pool_tokens=512, parallel=4)


def test_events_come_in_order_and_their_tokens_add_up(bench: Bench) -> None:
    bench.submit("one", (40, 50, 60), 30)
    bench.wait(["one"])
    started, *deltas, finished = bench.events["one"]
    assert started == Started(prompt_tokens=3)
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(finished, Finished)
    assert sum(delta.tokens for delta in deltas if isinstance(delta, TextDelta)) == 30


def test_a_cancel_ends_a_sequence_in_every_phase(bench: Bench) -> None:
    bench.submit("decoding", (40,) * 20, 480)
    while not any(isinstance(event, TextDelta) for event in bench.events["decoding"]):
        time.sleep(0.0005)
    bench.loop.cancel("decoding")
    bench.submit("queued", (40,), 480)
    bench.loop.cancel("queued")
    bench.wait(["decoding", "queued"])
    for name in ("decoding", "queued"):
        end = bench.ended(name)
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
    assert bench.loop.stats().cells_used == 0


def test_the_wall_clock_cap_ends_with_length_and_an_expired_wait_with_an_error(bench: Bench) -> None:
    for index in range(4):
        bench.submit(f"holder{index}", (40,) * 60, 400, deadline_s=0.03)
    bench.submit("queued", (40,), 10, deadline_s=0)
    bench.wait([*(f"holder{index}" for index in range(4)), "queued"])
    queued = bench.ended("queued")
    assert isinstance(queued, Failed)
    assert queued.error.status == 429
    assert all(getattr(bench.ended(f"holder{index}"), "reason", None) == "length" for index in range(4))


def test_a_stop_string_is_named_and_cut(bench: Bench) -> None:
    free = bench.submit("free", (40, 50, 60), 40)
    bench.wait(["free"])
    text = b"".join(bench.model.vocab.piece(token) for token in free.generated).decode(errors="replace")
    stop = next(text[start : start + 2] for start in range(5, 30) if text[start : start + 2].isascii())
    bench.submit("stopped", (40, 50, 60), 40, stop=(stop,))
    bench.wait(["stopped"])
    end = bench.ended("stopped")
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_sequence) == ("stop", stop)
    shown = "".join(event.text for event in bench.events["stopped"] if isinstance(event, TextDelta))
    assert shown == text[: text.index(stop)]


def test_an_idle_loop_uses_no_cpu(bench: Bench) -> None:
    bench.submit("one", (40,), 3)
    bench.wait(["one"])
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.05


def test_unusable_logits_end_the_sequence_and_not_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN would abort inside llama.cpp's sampler."""
    poisoned = np.full(bench.model.vocab.size, np.nan, dtype=np.float32)
    monkeypatch.setattr(Context, "logits", lambda self, row: poisoned)
    bench.submit("poisoned", (40,), 5)
    bench.wait(["poisoned"])
    monkeypatch.undo()
    end = bench.ended("poisoned")
    assert isinstance(end, Failed)
    assert end.error.code == "engine_failed"
    bench.submit("fine", (40,), 5)
    bench.wait(["fine"])
    assert isinstance(bench.ended("fine"), Finished)
