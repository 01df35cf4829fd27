"""Scenarios: what is asked of a server, as data. Each is a TOML file in `scenarios/`, read into frozen structs.

A scenario is a sequence of phases; a phase is groups of conversations that run at the same time. Sizes are tokens of
the model that is measured, counts are conversations.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]


class ScenarioError(Exception):
    """A scenario is unknown, malformed, or cannot be changed as asked; the text says which and why."""


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations of one kind.

    Without `concurrency` and `rate` all begin together. `rate` is conversations per second with exponential gaps
    (Poisson arrivals), `concurrency` how many go on at any time (closed loop). `shared_tokens` are a system message
    that all conversations have in common. `continues` names the group of an earlier phase whose conversations go on.
    With `during`, inter-token latencies count only while a request of that group waits for its first token. `code`
    asks for a small edit of a text that the answer repeats; `schema` is a JSON schema that the answer must meet.
    """

    name: str
    conversations: Count = 1
    turns: Count = 1
    concurrency: Count | None = None
    rate: Annotated[float, Meta(gt=0)] | None = None
    delay_s: Annotated[float, Meta(ge=0)] = 0.0
    shared_tokens: Natural = 0
    prompt_tokens: Count = 64
    turn_tokens: Count = 32
    output_tokens: Count = 64
    continues: str | None = None
    during: str | None = None
    code: bool = False
    schema: dict[str, Any] | None = None


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Groups that run at the same time. `restart`: the server is restarted before."""

    name: str
    groups: Annotated[tuple[Group, ...], Meta(min_length=1)]
    restart: bool = False


class Relation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A ratio within one target: `measure` of one cell over a measure of another; cells are `phase/group`."""

    name: str
    of: str
    over: str
    measure: str
    over_measure: str | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole scenario; `name` is the file's."""

    name: str
    about: str
    phases: Annotated[tuple[Phase, ...], Meta(min_length=1)]
    relations: tuple[Relation, ...] = ()

    @property
    def requests(self) -> int:
        """How many requests one pass makes."""
        return sum(group.conversations * group.turns for phase in self.phases for group in phase.groups)

    @property
    def restarts(self) -> bool:
        return any(phase.restart for phase in self.phases)


def names() -> list[str]:
    """The shipped scenarios, in alphabetical order."""
    files = resources.files("ocserve.bench").joinpath("scenarios").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(name: str) -> Scenario:
    """The shipped scenario of that name. Raises `ScenarioError`."""
    if name not in names():
        raise ScenarioError(f"there is no scenario `{name}`; there are {', '.join(names())}")
    return parse(name, resources.files("ocserve.bench").joinpath("scenarios", f"{name}.toml").read_text("utf-8"))


def parse(name: str, text: str) -> Scenario:
    """A scenario from TOML. Raises `ScenarioError` for anything unknown, missing or inconsistent."""
    try:
        scenario = msgspec.convert({"name": name, **tomllib.loads(text)}, Scenario)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ScenarioError(f"scenario {name}: {error}") from None
    _check(scenario)
    return scenario


def _check(scenario: Scenario) -> None:
    earlier: dict[str, Group] = {}
    cells = set()
    for phase in scenario.phases:
        here = {group.name for group in phase.groups}
        if len(here) < len(phase.groups):
            raise ScenarioError(f"scenario {scenario.name}: two groups of phase {phase.name} have one name")
        for group in phase.groups:
            if f"{phase.name}/{group.name}" in cells:
                raise ScenarioError(f"scenario {scenario.name}: {phase.name}/{group.name} occurs twice")
            cells.add(f"{phase.name}/{group.name}")
            if group.continues is not None and (
                group.continues not in earlier or earlier[group.continues].conversations != group.conversations
            ):
                raise ScenarioError(
                    f"scenario {scenario.name}: {group.name} continues {group.continues}, which is not an earlier "
                    "group of as many conversations"
                )
            if group.during is not None and group.during not in here:
                raise ScenarioError(f"scenario {scenario.name}: {group.during} is not in phase {phase.name}")
            if group.concurrency and group.rate:
                raise ScenarioError(f"scenario {scenario.name}: {group.name} has a concurrency and a rate")
        earlier.update({group.name: group for group in phase.groups})
    for relation in scenario.relations:
        if not {relation.of, relation.over} <= cells:
            raise ScenarioError(f"scenario {scenario.name}: relation {relation.name} names an unknown cell")


def with_load(
    scenario: Scenario, *, concurrency: tuple[int, ...] = (), rate: float | None = None, requests: int | None = None
) -> Scenario:
    """The scenario under another load; several levels of `concurrency` become a phase each.

    Raises `ScenarioError` where the scenario is more than one group, whose loads belong together.
    """
    if not concurrency and rate is None and requests is None:
        return scenario
    if len(scenario.phases) > 1 or len(scenario.phases[0].groups) > 1:
        raise ScenarioError(f"scenario {scenario.name} fixes its own load")
    if concurrency and rate is not None:
        raise ScenarioError("--concurrency (closed loop) and --rate (open loop) exclude one another")
    group = scenario.phases[0].groups[0]
    group = replace(group, conversations=requests or group.conversations)
    if rate is not None:
        phases = [Phase(name=f"{rate:g}/s", groups=(replace(group, rate=rate, concurrency=None),))]
    elif concurrency:
        phases = [
            Phase(
                name=f"x{level}",
                groups=(replace(group, concurrency=level, rate=None, conversations=max(level, group.conversations)),),
            )
            for level in concurrency
        ]
    else:
        phases = [Phase(name=scenario.phases[0].name, groups=(group,))]
    return replace(scenario, phases=tuple(phases), relations=())
