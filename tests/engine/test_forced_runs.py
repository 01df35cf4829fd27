"""Forced tokens on a real model: what fast-forward saves is what the cost model says, and it never costs anything."""

from __future__ import annotations

import json
import time
import tomllib
from importlib import resources
from pathlib import Path
from statistics import median

import pytest

from ocserve.engine import llama
from ocserve.engine.constraint import GrammarCompiler, Guide
from ocserve.engine.context import Context
from ocserve.engine.costs import CostModel
from ocserve.engine.measure import measure
from ocserve.generation import JsonConstraint, Sampling
from tests.engine.schedules import Engine, load

BATCH = 128
LENGTHS = ("short", "medium", "long")  # of the names that the scenario's schemas force


class Recorded(CostModel):
    """Remembers what it predicted of the steps that were computed."""

    now = predicted_s = 0.0

    def teaches(self, rows: int, threads: int, seconds: float) -> bool:
        return True

    def observe(self, rows: int, cells: int, threads: int, seconds: float) -> None:
        self.predicted_s += self.seconds(rows, cells)
        super().observe(rows, cells, threads, seconds)

    def clock(self) -> float:
        return 0.0


@pytest.fixture(scope="module")
def model(smollm2: Path) -> llama.Model:
    return load(smollm2)


@pytest.fixture(scope="module")
def engines(model: llama.Model) -> tuple[Engine, ...]:
    """Without fast-forward and with it."""
    context = Context(model, pool_tokens=2048, sequences=8, batch_tokens=BATCH, threads=1, flash_attention=False)
    timings = measure(context, model.vocab, threads=(1,), most_rows=BATCH, outputs=4, dense=True, budget_s=6.0).timings
    context.close()
    return tuple(
        Engine(
            Path(),
            model=model,
            pool_tokens=2048,
            batch_tokens=BATCH,
            sharing=False,
            exact=False,
            costs=Recorded(timings, most_rows=BATCH, dense=True),  # type: ignore[arg-type]
            fast_forward=fast_forward,
        )
        for fast_forward in (False, True)
    )


def schema(name: str) -> str:
    scenario = tomllib.loads(resources.files("ocserve.bench.scenarios").joinpath("structured.toml").read_text())
    return json.dumps(next(phase["groups"][0]["schema"] for phase in scenario["phases"] if phase["name"] == name))


def seconds(engine: Engine, guide: Guide, number: int) -> tuple[float, float]:
    """Wall time and predicted time of one answer."""
    assert isinstance(engine.costs, Recorded)
    prompt = [1000 + 7 * number + index for index in range(24)]
    before, begun = engine.costs.predicted_s, time.perf_counter()
    engine.submit(f"{number}", prompt, 200, guide=guide, sampling=Sampling(temperature=0.0))
    engine.run()
    return time.perf_counter() - begun, engine.costs.predicted_s - before


@pytest.mark.parametrize("length", LENGTHS)
def test_it_saves_what_the_cost_model_predicts(
    model: llama.Model, engines: tuple[Engine, ...], length: str, full: bool
) -> None:
    compiler = GrammarCompiler(model.vocab, lambda text: model.vocab.tokenize(text, parse_special=False))
    guide = compiler.guide(JsonConstraint(schema=schema(length)))
    without, with_it = engines
    wall, predicted = [], []
    for number in range(1 + (15 if full else 3)):
        pair = [seconds(engine, guide, number) for engine in (without, with_it)]
        if number:  # the first pays for pages and buffers
            wall.append(pair[1][0] / pair[0][0])
            predicted.append(pair[1][1] / pair[0][1])
    forced = with_it.loop.stats().forced_tokens
    print(f"{length}: wall {median(wall):.3f}, predicted {median(predicted):.3f} of the time without; {forced} forced")
    assert abs(median(wall) / median(predicted) - 1) <= (0.1 if full else 0.5)
    assert median(wall) <= (1.02 if full else 1.3)
    if length == "long":
        assert median(wall) < (0.95 if full else 1.1)
