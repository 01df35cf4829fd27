"""Answers to schemas from practice, by a model of random weights and by a real small one: none is invalid.

The short form asks for a sample that is part of the tests; `--full` asks all of the corpus of the random model, and 200
of the real one (`OCSERVE_TEST_SCHEMAS` names the folder, see tests/engine/test_schema_suites.py).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ocserve.engine.handle import EngineHandle, Supervision
from ocserve.engine.wire import EngineSpec
from ocserve.errors import ApiError
from ocserve.generation import ChatPrompt, Finished, GenerateRequest, JsonConstraint, Message, Sampling, TextDelta
from tests import tiny
from tests.engine.test_schema_suites import corpus

PARALLEL = 8
MAX_TOKENS = 400
CONTEXT = 4096
# Weights without meaning end nothing: these bytes bring strings, lists and objects to their end.
ENDING = {tiny.byte_token(byte): 6.0 for byte in b'"]}'}
# An object of it requires another of it within, so that no answer ends: it fails at a limit of the grammar's.
ENDLESS = {"Github_medium/o74424"}


@asynccontextmanager
async def engine(path: Path) -> AsyncIterator[EngineHandle]:
    spec = EngineSpec(
        path=str(path),
        context=CONTEXT,
        parallel=PARALLEL,
        pool_tokens=2 * CONTEXT,
        gpu_layers=0,
        require_gpu=False,
        threads_decode=None,
        threads_prefill=None,
        batch_tokens=256,
    )
    handle = EngineHandle(spec, dict(os.environ), Supervision(heartbeat_timeout_s=60))
    await handle.open()
    try:
        yield handle
        assert handle.restarts == 0
    finally:
        await handle.close()


def request(row: dict[str, Any], sampling: Sampling, shown: int) -> GenerateRequest:
    schema = json.dumps(row["schema"])
    asked = f"Write one short example in JSON. Its schema:\n{schema[:shown]}"
    return GenerateRequest(
        request_id=row["id"],
        model="m",
        prompt=ChatPrompt(messages=(Message(role="user", content=asked),)),
        sampling=sampling,
        max_tokens=MAX_TOKENS,
        constraint=JsonConstraint(schema=schema),
    )


async def answer(handle: EngineHandle, asked: GenerateRequest) -> tuple[str, str]:
    """The reason for the answer's end, and its text."""
    try:
        await handle.prepare(asked)
    except ApiError as error:
        return "refused" if (error.status, error.code) == (400, "invalid_json_schema") else str(error), ""
    text, reason = "", "failed"
    async for event in handle.start(asked.request_id):
        match event:
            case TextDelta(text=more):
                text += more
            case Finished(reason=ended):
                reason = ended
    return reason, text


def check(schema: Any, text: str) -> None:
    """By the schema's own draft, formats included."""
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))


async def reasons(path: Path, rows: list[dict[str, Any]], sampling: Sampling, *, shown: int) -> Counter[str]:
    """Why the answers to these end; each that ends by itself is checked.

    The prompt shows `shown` characters of the schema.
    """
    counts: Counter[str] = Counter()
    slots = asyncio.Semaphore(2 * PARALLEL)

    async def one(handle: EngineHandle, row: dict[str, Any]) -> None:
        async with slots:
            reason, text = await answer(handle, request(row, sampling, shown))
            counts["endless" if row["id"] in ENDLESS else reason] += 1
            if reason == "stop":
                check(row["schema"], text)

    async with engine(path) as handle:
        await asyncio.gather(*(one(handle, row) for row in rows))
    return counts


def check_counts(counts: Counter[str], capsys: pytest.CaptureFixture[str], *, least: float = 0.8) -> None:
    with capsys.disabled():
        print(f"\n{dict(counts)}", flush=True)
    assert set(counts) <= {"stop", "length", "refused", "endless"}
    assert counts["stop"] >= least * (counts["stop"] + counts["length"])


@pytest.mark.timeout(3000)
async def test_whatever_a_model_of_random_weights_writes_is_valid(
    tmp_path: Path, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write(tmp_path / "tiny.gguf", context=CONTEXT)
    counts = await reasons(path, corpus(full), Sampling(temperature=1.0, seed=1, logit_bias=ENDING), shown=0)
    check_counts(counts, capsys)


@pytest.mark.timeout(3000)
async def test_whatever_a_real_model_ends_is_valid(
    smollm2: Path, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = corpus(full)
    sampling = Sampling(temperature=1.0, seed=1, dry_multiplier=0.8)
    counts = await reasons(smollm2, rows[:: len(rows) // (200 if full else 3)], sampling, shown=500)
    check_counts(counts, capsys, least=0.0)  # one of this size rambles in strings: the share is told, not asked for
