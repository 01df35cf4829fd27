"""One session: a scenario against one target or two alternately, round by round, and what came out of it."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from ocserve.bench import load, measures
from ocserve.bench.arrivals import Arrival
from ocserve.bench.client import Sample, Target
from ocserve.bench.measures import COMPARED, Objective, Ratio, Summary
from ocserve.bench.scenario import Group, Phase, Scenario
from ocserve.bench.text import Texts


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One group of one phase at one target: its figures and, over all rounds, the latencies behind them (seconds)."""

    target: str
    phase: str
    group: str
    concurrency: int | None
    summary: Summary
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]

    @property
    def name(self) -> str:
        """What the cell is called beside others: the phase and, where it says more, the group."""
        return self.phase if self.phase == self.group else f"{self.phase}/{self.group}"


class TargetFacts(msgspec.Struct, frozen=True):
    """A target as reports name it. `what` is its address, or the arguments of an own server."""

    label: str
    what: str
    model: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A session's results. `ratios` are of the first target over the second, `relations` within one target.

    `same_answers` is (equal, compared) answers of the two targets.
    """

    scenario: str
    about: str
    created: str
    machine: str
    rounds: int
    seed: str
    targets: tuple[TargetFacts, ...]
    cells: tuple[Cell, ...]
    ratios: tuple[Ratio, ...]
    relations: tuple[Ratio, ...]
    same_answers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """A target, how reports name it, and how it is restarted."""

    target: Target
    what: str
    restart: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What each pass does: a scenario, or a trace in its place."""

    scenario: Scenario
    trace: tuple[Arrival, ...] = ()

    @property
    def requests(self) -> int:
        """Requests of one pass."""
        return len(self.trace) or self.scenario.requests


def traced(trace: tuple[Arrival, ...]) -> Work:
    """A trace as a scenario of one cell."""
    group = Group(name="trace", conversations=len(trace))
    return Work(
        Scenario(name="trace", about="Replay of a trace", phases=(Phase(name="trace", groups=(group,)),)), trace
    )


def run(
    work: Work,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seed: str | None,
    objective: Objective,
    on_sample: Callable[[Sample], None],
) -> Report:
    """Measure `rounds` rounds; the order of two targets is A B, B A, A B, …, so that a drift meets both alike.

    Both targets get the same texts in a round, and every round others. Without a `seed` they are unlike those of any
    earlier session, so that no cache helps that the scenario does not fill. One address measured against itself gets
    different texts. Raises `load.TargetUnusable` and what restarting raises.
    """
    seed = seed or secrets.token_hex(4)
    origin = time.perf_counter()
    alike = len({contender.target.url for contender in contenders}) == len(contenders)
    scales = [asyncio.run(load.calibrate(each.target, f"{seed}/{at}")) for at, each in enumerate(contenders)]
    passes: list[list[tuple[Sample, ...]]] = [[] for _ in contenders]
    for number in range(rounds):
        order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
        for at in order:
            texts = Texts(f"{seed}/{number}" if alike else f"{seed}/{number}/{at}", scales[0 if alike else at])
            player = load.Load(contenders[at].target, texts, origin, contenders[at].restart, on_sample)
            playing = player.trace(work.trace) if work.trace else player.scenario(work.scenario)
            passes[at].append(load.run(playing))
    labels = [contender.target.label for contender in contenders]
    return Report(
        scenario=work.scenario.name,
        about=work.scenario.about,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        rounds=rounds,
        seed=seed,
        targets=tuple(TargetFacts(each.target.label, each.what, each.target.model) for each in contenders),
        cells=tuple(
            cell
            for label, found in zip(labels, passes, strict=True)
            for cell in _cells(work.scenario, label, found, objective)
        ),
        ratios=tuple(_ratios(work.scenario, passes, objective)) if len(passes) == 2 else (),
        relations=tuple(
            each
            for label, found in zip(labels, passes, strict=True)
            for each in measures.relations(work.scenario, found, label if len(labels) > 1 else "")
        ),
        same_answers=_same_answers(passes) if len(passes) == 2 and alike else None,
    )


def _groups(scenario: Scenario) -> list[tuple[Phase, Group]]:
    return [(phase, group) for phase in scenario.phases for group in phase.groups]


def _cells(scenario: Scenario, label: str, rounds: Sequence[Sequence[Sample]], objective: Objective) -> list[Cell]:
    return [
        Cell(
            target=label,
            phase=phase.name,
            group=group.name,
            concurrency=None if group.rate else group.concurrency or group.conversations,
            summary=measures.summary(rounds, phase.name, group.name, during=group.during, objective=objective),
            ttft_s=tuple(
                sample.ttft_s
                for samples in rounds
                for sample in measures.cell(samples, phase.name, group.name)
                if sample.ttft_s is not None and sample.error is None
            ),
            itl_s=tuple(measures.inter_token(rounds, phase.name, group.name, group.during)),
        )
        for phase, group in _groups(scenario)
    ]


def _ratios(scenario: Scenario, passes: Sequence[Sequence[Sequence[Sample]]], objective: Objective) -> list[Ratio]:
    """Each compared measure of each cell, first target over second."""
    found = []
    for phase, group in _groups(scenario):
        one, other = (
            [measures.summary([each], phase.name, group.name, during=group.during, objective=objective) for each in own]
            for own in passes
        )
        name = phase.name if phase.name == group.name else f"{phase.name}/{group.name}"
        for measure in COMPARED:
            pairs = [(getattr(a, measure), getattr(b, measure)) for a, b in zip(one, other, strict=True)]
            found.append(measures.ratio(name, measure, pairs))
    return [each for each in found if each is not None]


def _same_answers(passes: Sequence[Sequence[Sequence[Sample]]]) -> tuple[int, int]:
    counts = [
        measures.same_answers(one, other, lambda sample: f"{sample.phase}/{sample.group}/{sample.digest}")
        for one, other in zip(*passes, strict=True)
    ]
    return sum(equal for equal, _ in counts), sum(compared for _, compared in counts)
