"""Function definitions and questions of the Berkeley Function-Calling Leaderboard, answered by a real small model.

Whatever it chooses, a returned call parses, names a given tool and validates. The short form asks a sample that is part
of the tests; `--full` asks 300 of the leaderboard's own files where they are (`OCSERVE_TEST_BFCL` names their folder).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.engine.wire import EngineSpec
from ocserve.generation import (
    ChatPrompt,
    Finished,
    GenerateRequest,
    Message,
    Sampling,
    TextDelta,
    Tool,
    ToolCallDelta,
    ToolChoice,
)

SAMPLE = Path(__file__).parent.parent / "data" / "bfcl" / "sample.jsonl"
FULL = 300
PARALLEL = 4
# The leaderboard writes types as Python's.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None, "String": "string"}


@pytest.fixture
async def engine(smollm2: Path) -> AsyncIterator[EngineHandle]:
    spec = EngineSpec(
        path=str(smollm2),
        context=8192,
        parallel=PARALLEL,
        pool_tokens=16384,
        gpu_layers=0,
        require_gpu=False,
        threads_decode=None,
        threads_prefill=None,
        batch_tokens=256,
    )
    handle = EngineHandle(spec, dict(os.environ), Supervision())
    await handle.open()
    yield handle
    await handle.close()


def json_schema(value: Any) -> Any:
    """The leaderboard's parameters as JSON Schema."""
    if isinstance(value, list):
        return [json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {key: json_schema(item) for key, item in value.items() if key not in ("optional", "default")}
    if isinstance(schema.get("type"), str):
        kind = TYPES.get(schema["type"], schema["type"])
        schema |= {"type": kind}
        if kind is None:
            del schema["type"]
    return schema


def questions(full: bool) -> list[dict[str, Any]]:
    folder = os.environ.get("OCSERVE_TEST_BFCL")
    if full and folder is None:
        pytest.skip("--full asks the leaderboard's own files: OCSERVE_TEST_BFCL must name their folder")
    if not full or folder is None:
        return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    asked = []
    for kind in ("simple_python", "multiple", "parallel"):
        lines = (Path(folder) / f"BFCL_v4_{kind}.json").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[: FULL // 3]]
        asked += [{**row, "question": row["question"][0]} for row in rows]
    return asked


def request(row: dict[str, Any], mode: Any) -> GenerateRequest:
    tools = tuple(
        Tool(
            name=function["name"].replace(".", "_"),
            description=function["description"],
            parameters=json.dumps(json_schema(function["parameters"])),
        )
        for function in row["function"]
    )
    messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in row["question"])
    return GenerateRequest(
        request_id=f"{row['id']}-{mode}",
        model="m",
        prompt=ChatPrompt(messages=messages, tools=tools),
        sampling=Sampling(temperature=0.0),
        max_tokens=300,
        tool_choice=ToolChoice(mode=mode),
    )


class Outcome:
    """What a client puts together from the events of one answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.content = ""
        self.reason = ""

    def add(self, event: Any) -> None:
        match event:
            case ToolCallDelta(call=call, name=str(name), arguments=arguments):
                assert call == len(self.calls)
                self.calls.append((name, arguments))
            case ToolCallDelta(call=call, arguments=arguments):
                name, before = self.calls[call]
                self.calls[call] = name, before + arguments
            case TextDelta(text=text):
                self.content += text
            case Finished(reason=reason):
                self.reason = reason


async def ask(engine: EngineHandle, asked: GenerateRequest) -> Outcome:
    outcome = Outcome()
    await engine.prepare(asked)
    async for event in engine.start(asked.request_id):
        outcome.add(event)
    return outcome


def check(asked: GenerateRequest, outcome: Outcome) -> None:
    assert isinstance(asked.prompt, ChatPrompt)
    schemas = {tool.name: json.loads(tool.parameters or "{}") for tool in asked.prompt.tools}
    complete = outcome.calls if outcome.reason != "length" else outcome.calls[:-1]
    for name, arguments in complete:
        jsonschema.Draft7Validator(schemas[name]).validate(json.loads(arguments))
    assert {name for name, _ in outcome.calls} <= set(schemas)
    assert outcome.reason in ("tool_calls", "stop", "length")
    assert (outcome.reason == "tool_calls") == bool(outcome.calls) or outcome.reason == "length"


@pytest.mark.timeout(9000)
async def test_every_returned_call_is_valid_and_required_ones_are_made(
    engine: EngineHandle, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, slots = questions(full), asyncio.Semaphore(PARALLEL)

    async def one(row: dict[str, Any], mode: str) -> tuple[GenerateRequest, Outcome]:
        async with slots:
            asked = request(row, mode)
            return asked, await ask(engine, asked)

    wanted = [(row, "required") for row in rows] + [(row, "auto") for row in rows[:: 10 if full else 6]]
    outcomes = await asyncio.gather(*(one(row, mode) for row, mode in wanted))
    for asked, outcome in outcomes:
        check(asked, outcome)
    required = [outcome for asked, outcome in outcomes if asked.tool_choice.mode == "required"]
    cut = sum(outcome.reason == "length" for outcome in required)
    with capsys.disabled():
        calls = sum(len(outcome.calls) for _, outcome in outcomes)
        print(f"\n{len(outcomes)} answers, {calls} calls, {cut} of {len(required)} required ones cut", flush=True)
    assert all(outcome.calls for outcome in required if outcome.reason != "length")
    assert all(not outcome.content.strip() for outcome in required if outcome.reason != "length")
    # Of twelve questions four may be of the kind at which a model of 135M rambles; of 300 a tenth.
    assert cut <= (0.1 if full else 0.34) * len(required)
