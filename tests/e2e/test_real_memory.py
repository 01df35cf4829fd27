"""KV memory on real models: sharing, pressure and restarts of the tiers give the answers that the models give alone.

Quantised models are compared within their measured noise; the share of answers that are equal to the token is printed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ocserve.engine import scheduler
from ocserve.engine.slots import Sequence
from ocserve.engine.tiers.host import HostTier
from ocserve.engine.tiers.tiers import Tiers
from ocserve.generation import Finished, Sampling
from tests.engine.schedules import Engine, FixedCosts, Oracle


def engine_and_oracle(path: Path, *, pool_tokens: int, parallel: int) -> tuple[Engine, Oracle]:
    engine = Engine(
        path,
        pool_tokens=pool_tokens,
        parallel=parallel,
        ids=2 * parallel,
        batch_tokens=128,
        park_bytes=1 << 30,
        tiers=Tiers(HostTier(1 << 30), None),
        costs=FixedCosts(),
        exact=False,
    )
    return engine, Oracle(engine.model, exact=False, pool_tokens=2048, barred=ends(engine))


def ends(engine: Engine) -> list[int]:
    vocab = engine.model.vocab
    return [token for token in range(vocab.size) if vocab.is_end(token)]


def submit(engine: Engine, name: str, prompt: list[int], max_tokens: int) -> Sequence:
    sampling = Sampling(temperature=0.0, logit_bias=dict.fromkeys(ends(engine), -1000.0))
    return engine.submit(name, prompt, max_tokens, sampling=sampling)


@pytest.mark.timeout(1800)
def test_pressure_of_three_pools_is_invisible(smollm2: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that together need three times the pool all finish, and nothing of it stays behind."""
    monkeypatch.setattr(scheduler, "GROWTH_TOKENS", 8)
    # All slots together outgrow the pool, and answers are long enough that they do so while all are running.
    count, pool, slots, answer = (64, 3072, 48, 80) if full else (5, 160, 8, 32)
    engine, oracle = engine_and_oracle(smollm2, pool_tokens=pool, parallel=slots)
    choose = random.Random(1)
    sequences = [
        submit(engine, f"r{index}", [choose.randrange(1000, 40000) for _ in range(64)], answer)
        for index in range(count)
    ]
    engine.run()
    assert all(isinstance(engine.end(sequence.id), Finished) for sequence in sequences)
    equal = sum(oracle.check(sequence) for sequence in sequences)
    stats = engine.loop.stats()
    print(f"{count} requests, pool {pool}: {stats.preemptions} parked and resumed, {equal} equal to the token")
    assert stats.preemptions >= stats.parked == stats.resumed > 0
    assert stats.prefill_tokens <= count * 64 + stats.resumed
    engine.kv.drop_kept()
    assert engine.kv.cells == 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_conversations_share_what_they_have_in_common(model: str, full: bool, request: pytest.FixtureRequest) -> None:
    """Conversations that begin alike and go on, across a restart of the engine; with the answers given alone."""
    path = request.getfixturevalue(model)
    choose = random.Random(2)
    engine, oracle = engine_and_oracle(path, pool_tokens=2048, parallel=4)
    trunk = [choose.randrange(1000, 40000) for _ in range(700 if full else 140)]  # a block is 128
    prompts = [[*trunk, *(choose.randrange(1000, 40000) for _ in range(20))] for _ in range(4 if full else 2)]
    first = [submit(engine, f"a{index}", prompt, 12) for index, prompt in enumerate(prompts)]
    engine.run()
    computed = engine.loop.stats().prefill_tokens
    assert computed <= len(trunk) + 20 * len(prompts) + 128
    while engine.kv.save_some():
        pass
    engine.context.close()
    again = Engine(
        path,
        model=engine.model,
        pool_tokens=2048,
        batch_tokens=128,
        tiers=engine.tiers,
        costs=FixedCosts(),
        exact=False,
    )
    continued = [
        submit(again, f"b{index}", [*sequence.prompt, *sequence.generated, 1500, 1600], 12)
        for index, sequence in enumerate(first)
    ]
    again.run()
    assert again.loop.stats().host_tokens >= len(trunk) // 128 * 128
    equal = [oracle.check(sequence) for sequence in (*first, *continued)]
    print(
        f"{model}: {computed} tokens computed of {sum(map(len, prompts))}, {sum(equal)} of {len(equal)} answers equal"
    )
