"""The real engine process behind the real handle: what it must survive and what it must say."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from ocserve.engine.handle import EngineHandle, LoadError, Supervision
from ocserve.engine.wire import EngineSpec
from ocserve.errors import ApiError, ContextLengthExceeded
from ocserve.generation import (
    ChatPrompt,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    FillPrompt,
    Finished,
    GenerateRequest,
    Message,
    Prompt,
    PromptLogprobs,
    Sampling,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)
from tests import tiny


@asynccontextmanager
async def engine(path: Path, context: int) -> AsyncIterator[EngineHandle]:
    spec = EngineSpec(
        path=str(path),
        context=context,
        parallel=2,
        pool_tokens=context,
        gpu_layers=-1,
        require_gpu=False,
        threads_decode=1,
        threads_prefill=1,
        batch_tokens=64,
    )
    handle = EngineHandle(spec, dict(os.environ), Supervision())
    await handle.open()
    try:
        yield handle
    finally:
        await handle.close()


def request(name: str, prompt: Prompt, max_tokens: int = 5) -> GenerateRequest:
    bias = {0: -100.0, tiny.END_OF_TURN: -100.0}
    return GenerateRequest(
        request_id=name,
        model="m",
        prompt=prompt,
        sampling=Sampling(temperature=0.0, logit_bias=bias),
        max_tokens=max_tokens,
    )


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context that a long prompt fits."""
    return tiny.write(tmp_path_factory.mktemp("long") / "long.gguf", context=200_000)


async def test_a_prompt_that_recurses_deeply_in_the_pre_tokenizer_is_prepared(long_model: Path) -> None:
    """llama.cpp's regex recursed off an 8 MiB stack at 30,000 digits and took the engine with it."""
    async with engine(long_model, 200_000) as handle:
        prepared = await handle.prepare(request("deep", TextPrompt(text="1" * 100_000)))
        assert prepared.prompt_tokens == 100_000
        assert handle.restarts == 0


async def test_control_tokens_in_a_raw_prompt_are_found_in_linear_time(long_model: Path) -> None:
    """llama.cpp's own search took 19 s for 1.2 MB of them."""
    async with engine(long_model, 200_000) as handle:
        begun = time.monotonic()
        prepared = await handle.prepare(request("many", TextPrompt(text="<|im_start|>" * 100_000)))
        assert prepared.prompt_tokens == 100_000
        assert time.monotonic() - begun < 5


async def test_what_cannot_fit_is_refused_before_it_is_tokenised(tiny_model: Path) -> None:
    """Who has tokenised it knows its exact length, and says that."""
    async with engine(tiny_model, 512) as handle:
        for prompt in (
            TextPrompt(text="a" * 3_900_000),
            ChatPrompt(messages=(Message(role="user", content="\n" * 3_900_000),)),
        ):
            with pytest.raises(Exception, match="at least") as refusal:
                await handle.prepare(request("big", prompt))
            assert getattr(refusal.value, "code", None) == ContextLengthExceeded.code


async def test_leaving_a_generation_reports_what_it_used(tiny_model: Path) -> None:
    async with engine(tiny_model, 512) as handle:
        asked = request("left", TokenPrompt(tokens=(40,) * 20), max_tokens=480)
        await handle.prepare(asked)
        events = handle.start("left")
        seen = 0
        async for event in events:
            if isinstance(event, TextDelta):
                seen += event.tokens
                break
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()
        handle.cancel("left")
        *_, last = [event async for event in events]
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert last.usage.completion_tokens >= seen


async def test_an_impossible_context_length_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "wrong.gguf", context=2**31)
    with pytest.raises(LoadError, match="context length"):
        async with engine(path, 512):
            pass


async def test_questions_are_answered_without_a_slot(tiny_model: Path) -> None:
    async with engine(tiny_model, 128) as handle:
        prompt = ChatPrompt(messages=(Message(role="user", content="Hello"),))
        answer = await handle.ask(EncodeRequest(request_id="q1", model="m", prompt=prompt))
        assert isinstance(answer, Encoded)
        prepared = await handle.prepare(request("r", prompt))
        assert prepared.prompt_tokens == len(answer.tokens)
        with pytest.raises(ApiError) as refusal:
            await handle.ask(EmbedRequest(request_id="q2", model="m", inputs=(TextPrompt(text="Hello"),)))
        assert refusal.value.param == "model"
        assert handle.facts is not None
        assert (handle.facts.bos, handle.facts.eos, handle.facts.fim) == ("<|endoftext|>", "<|im_end|>", False)
        assert handle.facts.chat_template == tiny.CHATML


async def test_everything_that_a_request_may_ask_for_passes_the_wire(tiny_model: Path) -> None:
    everything = Sampling(
        temperature=0.9,
        top_n_sigma=3.0,
        typical_p=0.99,
        top_a=0.01,
        xtc_probability=0.1,
        dry_multiplier=0.5,
        dynamic_range=0.2,
        penalty_window=20,
        repetition_penalty=1.1,
        logit_bias={0: -100.0, tiny.END_OF_TURN: -100.0},
    )
    prompt = TokenPrompt(tokens=tuple(range(40, 60)))
    async with engine(tiny_model, 128) as handle:
        asked = replace(
            request("one", prompt, 10), sampling=everything, logprobs=2, prompt_logprobs=1, prediction="Hello"
        )
        await handle.prepare(asked)
        events = [event async for event in handle.start("one")]
        [scored] = [event for event in events if isinstance(event, PromptLogprobs)]
        assert [logprob.chosen.id for logprob in scored.tokens] == list(prompt.tokens)
        logprobs = [each for event in events if isinstance(event, TextDelta) for each in event.logprobs]
        assert len(logprobs) == 10
        assert all(len(each.top) == 2 for each in logprobs)
        prepared = await handle.prepare(replace(request("two", prompt, 0), prompt_logprobs=0))
        assert prepared.max_tokens == 0
        *_, last = [event async for event in handle.start("two")]
        assert isinstance(last, Finished)
        assert (last.reason, last.usage.completion_tokens) == ("length", 0)
        for refused, param in (
            (replace(asked, prompt_logprobs=100_000), "logprobs"),
            (replace(asked, prompt=FillPrompt(prefix="a", suffix="b")), "suffix"),
            (replace(asked, sampling=Sampling(dry_multiplier=1.0, dry_breakers=("",))), "dry_sequence_breakers[0]"),
        ):
            with pytest.raises(ApiError) as refusal:
                await handle.prepare(replace(refused, request_id="three"))
            assert refusal.value.param == param
        assert handle.restarts == 0
