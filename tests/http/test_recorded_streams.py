"""Our chat frames against recorded ones of OpenAI, field by field.

Of each recorded stream the events that an engine would have to tell are made; a server over an engine that tells them
streams them; a differ compares the frames. What the values are must agree too, except for what names this very answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ocserve.generation import FinishReason, TextDelta, TokenChance, TokenLogprob, ToolCallDelta
from tests.http.harness import serving
from tests.scripted import Delta, Script, ScriptedEngine

STREAMS = Path(__file__).parent.parent / "data" / "openai-streams"
# Here no model refuses in words of their own channel: what it says is content.
REFUSALS = {"173417d5", "569c877e"}
RECORDED = sorted(path.stem for path in STREAMS.glob("*.txt") if path.stem not in REFUSALS)
# They differ with every answer; of these only presence and type are compared.
NAMES = {"id", "created", "model", "system_fingerprint"}
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


def frames(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def recorded(name: str) -> list[Any]:
    return frames((STREAMS / f"{name}.txt").read_text("utf-8"))


def script(stream: list[Any]) -> Script:
    """An engine's answer that says the same."""
    deltas: dict[int, list[Delta]] = {}
    reason: FinishReason = "stop"
    for frame in stream:
        for choice in frame["choices"]:
            said = deltas.setdefault(choice["index"], [])
            reason = choice["finish_reason"] or reason
            logprobs = tuple(map(chance, (choice["logprobs"] or {}).get("content") or ()))
            delta = choice["delta"]
            if delta.get("content"):
                said.append(TextDelta(text=delta["content"], tokens=1, logprobs=logprobs))
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                said.append(
                    ToolCallDelta(
                        call=call["index"], name=function.get("name"), arguments=function["arguments"], tokens=1
                    )
                )
    first, *others = (tuple(deltas[index]) for index in sorted(deltas))
    return Script(tokens=first, others=tuple(others), reason="stop" if reason == "length" else reason)


def chance(token: dict[str, Any]) -> TokenLogprob:
    chances = [
        TokenChance(0, bytes(each["bytes"]), each["logprob"]) for each in (token, *token.get("top_logprobs", ()))
    ]
    return TokenLogprob(chosen=chances[0], top=tuple(chances[1:]))


def request(stream: list[Any]) -> dict[str, Any]:
    """What a client asks to be answered so."""
    choices = [choice for frame in stream for choice in frame["choices"]]
    names = {
        call["function"]["name"]
        for choice in choices
        for call in choice["delta"].get("tool_calls", ())
        if "name" in call["function"]
    }
    asked: dict[str, Any] = {"n": 1 + max(choice["index"] for choice in choices)}
    if names:
        asked["tools"] = [{"type": "function", "function": {"name": name}} for name in sorted(names)]
    if any(choice["logprobs"] for choice in choices):
        asked["logprobs"] = True
    if any(choice["finish_reason"] == "length" for choice in choices):
        asked["max_tokens"] = sum(bool(choice["delta"].get("content")) for choice in choices) or 1
    return asked


def ours(stream: list[Any]) -> list[Any]:
    said = script(stream)
    if any(choice["finish_reason"] == "length" for frame in stream for choice in frame["choices"]):
        said = Script(tokens=(*said.tokens, "more"))
    with serving(lambda: ScriptedEngine(said)) as served:
        answer = served.chat(stream=True, **request(stream))
        assert answer.status == 200, answer
        return frames(answer.body.decode())


def by_choice(stream: list[Any]) -> list[list[Any]]:
    """The frames of each choice, then the last one: choices may take turns otherwise than they did there."""
    found: dict[int, list[Any]] = {}
    for frame in stream:
        for choice in frame["choices"]:
            found.setdefault(choice["index"], []).append(frame)
    return [*(found[index] for index in sorted(found)), [frame for frame in stream if not frame["choices"]]]


def differences(theirs: Any, mine: Any, path: str) -> Iterator[str]:
    """Every place where the two differ."""
    name = path.rpartition(".")[2]
    if type(theirs) is not type(mine):
        yield f"{path}: {type(theirs).__name__}, not {type(mine).__name__}"
    elif isinstance(theirs, dict):
        yield from (f"{path}.{key}: missing" for key in theirs.keys() - mine.keys())
        yield from (f"{path}.{key}: not in theirs" for key in mine.keys() - theirs.keys())
        for key in theirs.keys() & mine.keys():
            yield from differences(theirs[key], mine[key], f"{path}.{key}")
    elif isinstance(theirs, list):
        if len(theirs) != len(mine):
            yield f"{path}: {len(theirs)} entries, not {len(mine)}"
        for index, (one, other) in enumerate(zip(theirs, mine, strict=False)):
            yield from differences(one, other, f"{path}[{index}]")
    elif theirs != mine and name not in NAMES:
        yield f"{path}: another value"


def compare(theirs: list[Any], mine: list[Any]) -> list[str]:
    """All differences of two streams but for the counts, which are the engine's."""
    found = []
    for number, (one, other) in enumerate(zip(by_choice(theirs), by_choice(mine), strict=True)):
        found += differences(one, other, f"choice{number}")
    return [each for each in found if not each.endswith(tuple(f"usage.{name}: another value" for name in USAGE))]


def newer(difference: str) -> bool:
    """OpenAI's usage has grown since the recording; clients of today read what is new."""
    return ".usage" in difference and difference.endswith("not in theirs")


@pytest.mark.parametrize("name", RECORDED)
def test_our_frames_have_the_shape_of_recorded_ones(name: str) -> None:
    theirs = recorded(name)
    mine = ours(theirs)
    found = [each for each in compare(theirs, mine) if not newer(each)]
    if name == "f82268f2":
        # That several calls follow is known there before the first is told, which then does not stand beside the role.
        head, call, *rest = theirs
        head["choices"][0]["delta"] |= call["choices"][0]["delta"] | {"refusal": None}
        found = [each for each in compare([head, *rest], mine) if not newer(each)]
    assert not found


def test_every_recording_but_the_refusals_is_compared() -> None:
    assert len(RECORDED) == 10
    assert all("refusal" in frame["choices"][0]["delta"] for name in REFUSALS for frame in recorded(name)[:2])


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (lambda frame: frame["choices"][0].pop("logprobs"), "logprobs: missing"),
        (lambda frame: frame["choices"][0].update(index="0"), "index: int, not str"),
        (lambda frame: frame["choices"][0]["delta"].update(role="assistant"), "delta.role: not in theirs"),
        (lambda frame: frame["choices"][0]["delta"].update(content="x"), "delta.content: another value"),
        (lambda frame: frame.update(object="chat.completion"), "object: another value"),
        (lambda frame: frame.pop("system_fingerprint"), "system_fingerprint: missing"),
    ],
)
def test_the_differ_finds_a_fault_in_one_frame(fault: Any, where: str) -> None:
    theirs, mine = recorded("7e5ea4d1"), recorded("7e5ea4d1")
    assert compare(theirs, mine) == []
    fault(mine[1])
    if where.startswith("index"):
        mine = [theirs[0], mine[1], *theirs[2:]]
        assert [each for each in differences(theirs, mine, "") if each.endswith(where)]
    else:
        (found,) = compare(theirs, mine)
        assert found.endswith(where)


def test_a_missing_frame_is_found() -> None:
    theirs = recorded("7e5ea4d1")
    assert any("entries" in each for each in compare(theirs, [*theirs[:3], *theirs[4:]]))
