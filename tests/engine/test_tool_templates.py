"""Real templates on a tiny model with random weights: whatever it says comes out as valid calls."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
    JsonConstraint,
    Message,
    Reasoning,
    ReasoningDelta,
    Sampling,
    TextDelta,
    Tool,
    ToolCallDelta,
    ToolChoice,
)
from tests import tiny
from tests.chat.conftest import models_folder as models_folder
from tests.chat.conftest import real_templates as real_templates
from tests.chat.test_tools import CHATML

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["unit", "days", "sure"],
    "additionalProperties": False,
}
TOOL = Tool(name="forecast", description="Tells the weather.", parameters=json.dumps(SCHEMA))
FAMILIES = (
    *("Qwen-Qwen3-0.6B", "Qwen3-Coder", "meta-llama-Llama-3.2-3B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407"),
    *("Mistral-Small-3.2-24B-Instruct-2506", "deepseek-ai-DeepSeek-V3.1", "openai-gpt-oss-120b", "GLM-4.6"),
    *("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "ibm-granite-granite-3.3-2B-Instruct"),
    *("meetkai-functionary-medium-v3.2", "google-gemma-2-2b-it", "google-gemma-4-31B-it"),
)
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
)
USER = (Message(role="user", content="hi"),)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("wide") / "wide.gguf", context=16384)


@asynccontextmanager
async def engine(path: Path, template: str) -> AsyncIterator[EngineHandle]:
    spec = EngineSpec(
        path=str(path),
        context=16384,
        parallel=2,
        pool_tokens=16384,
        gpu_layers=0,
        require_gpu=False,
        threads_decode=1,
        threads_prefill=1,
        batch_tokens=512,
        chat_template=template,
    )
    handle = EngineHandle(spec, dict(os.environ), Supervision())
    await handle.open()
    try:
        yield handle
    finally:
        await handle.close()


async def events_of(handle: EngineHandle, prompt: ChatPrompt, seed: int = 1, **rest: Any) -> list[Any]:
    given = {"sampling": Sampling(seed=seed), "max_tokens": 300, **rest}
    request = GenerateRequest(request_id=f"r{seed}", model="m", prompt=prompt, **given)
    await handle.prepare(request)
    return [event async for event in handle.start(request.request_id)]


@pytest.mark.parametrize("name", FAMILIES)
async def test_required_calls_of_a_random_model_are_valid(
    wide_model: Path, real_templates: dict[str, str], name: str
) -> None:
    async with engine(wide_model, real_templates[name]) as handle:
        facts = handle.facts
        assert facts is not None
        assert facts.tool_format
        for seed in range(3):
            prompt = ChatPrompt(messages=USER, tools=(TOOL,), reasoning=Reasoning(max_tokens=4))
            choice = ToolChoice(mode="required", parallel=False)
            events = await events_of(handle, prompt, seed, tool_choice=choice)
            last = events[-1]
            assert isinstance(last, Finished)
            assert last.reason == "tool_calls", (name, last)
            calls = [event for event in events if isinstance(event, ToolCallDelta)]
            assert [event.name for event in calls if event.name] == ["forecast"]
            jsonschema.validate(json.loads("".join(event.arguments for event in calls)), SCHEMA)
            assert not any(isinstance(event, TextDelta) and event.text.strip() for event in events)


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_a_thought_ends_at_its_budget_and_the_answer_follows(wide_model: Path, logprobs: int | None) -> None:
    async with engine(wide_model, THINKING) as handle:
        assert handle.facts is not None
        assert handle.facts.reasoning
        prompt = ChatPrompt(messages=USER, reasoning=Reasoning(max_tokens=6))
        constraint = JsonConstraint(schema=json.dumps(SCHEMA))
        for rest in ({}, {"constraint": constraint}):
            sampling = Sampling(seed=5, logit_bias={0: -100.0, tiny.END_OF_TURN: -100.0} if not rest else {})
            events = await events_of(handle, prompt, sampling=sampling, logprobs=logprobs, max_tokens=200, **rest)
            thought = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
            assert thought
            assert "</think>" not in thought + text
            usage = events[-1].usage
            assert 6 <= usage.reasoning_tokens <= 6 + 14  # the mark is spelled out in this vocabulary
            assert usage.reasoning_tokens < usage.completion_tokens
            if rest:
                jsonschema.validate(json.loads(text), SCHEMA)


async def test_a_thought_that_is_not_wanted_is_closed_in_the_prompt(wide_model: Path) -> None:
    async with engine(wide_model, THINKING) as handle:
        events = await events_of(handle, ChatPrompt(messages=USER, reasoning=Reasoning(enabled=False)), max_tokens=9)
        assert not any(isinstance(event, ReasoningDelta) for event in events)
        assert events[-1].usage.reasoning_tokens == 0
