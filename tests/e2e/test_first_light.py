"""A real model behind a real server, asked by the real `openai` client."""

from __future__ import annotations

import openai
import pytest

from tests.e2e.alike import alike
from tests.e2e.daemon import RunningDaemon

QUESTION = [{"role": "user", "content": "Name three colours."}]


def test_a_streamed_answer_ends_with_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=QUESTION,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None
    assert chunks[-1].choices == []
    assert usage.prompt_tokens > 10
    assert 0 < usage.completion_tokens <= 24
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_stream_and_whole_answer_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=QUESTION, max_tokens=32, temperature=0, seed=1)
    streamed = client.chat.completions.create(
        model="default", messages=QUESTION, max_tokens=32, temperature=0, seed=1, stream=True
    )
    chunks = list(streamed)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert alike(text, whole.choices[0].message.content or "")
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert 0 < chunks[-1].usage.completion_tokens <= 32
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(client: openai.OpenAI) -> None:
    """Without a seed in effect hardly any two of these answers agree. That some differ in spite of it is what the
    README says of quantised models: where other requests left the cache's cells decides how sums are rounded."""

    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Invent a name for a ship."}],
            max_tokens=8,
            temperature=1.5,
            seed=seed,
        )
        return answer.choices[0].message.content

    pairs = [(ask(seed), ask(seed)) for seed in range(8)]
    assert len({one for one, again in pairs if one == again}) >= 3
    assert len({one for one, _ in pairs}) >= 4


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    def ask(**rest: object) -> openai.types.Completion:
        return client.completions.create(model="default", prompt="1, 2, 3, 4, 5,", max_tokens=40, temperature=0, **rest)  # type: ignore[call-overload,no-any-return]

    free = ask().choices[0].text
    stop = free[10:14]  # certainly across a token border somewhere
    stopped = ask(stop=stop)
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < 40


def test_logit_bias_bans_a_token(client: openai.OpenAI) -> None:
    def ask(**rest: object) -> str:
        answer = client.completions.create(
            model="default", prompt="The capital of France is", max_tokens=1, temperature=0, **rest
        )  # type: ignore[call-overload]
        return str(answer.choices[0].text)

    assert ask() == " Paris"
    paris = 7042
    assert ask(logit_bias={str(paris): -100}) != " Paris"


@pytest.mark.parametrize("name", ["default", "smollm2:135m"])
def test_the_model_answers_to_its_names(client: openai.OpenAI, server: RunningDaemon, name: str) -> None:
    served = client.models.list().data[0].id
    answer = client.completions.create(model=served if name != "default" else name, prompt="Hi", max_tokens=1)
    assert answer.model == served
    assert client.models.retrieve(served).id == served


def test_another_name_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="gpt-4o", prompt="Hi", max_tokens=1)
    assert refusal.value.code == "model_not_found"


def test_every_answer_has_a_request_id(client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(model="default", prompt="Hi", max_tokens=1)
    assert answer.headers["x-request-id"]
    own = client.completions.with_raw_response.create(
        model="default", prompt="Hi", max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert own.headers["x-request-id"] == "mine-1"


def test_advisory_parameters_are_accepted_and_named(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="default", messages=QUESTION, max_tokens=1, user="someone", metadata={"a": "b"}
    )
    assert {"user", "metadata"} <= set(answer.headers["x-ocserve-ignored"].split(", "))


def test_labels_that_the_models_template_does_not_read_are_named(client: openai.OpenAI) -> None:
    """SmolLM2's template has no place for names and ids."""
    named = [{"role": "user", "content": "Hi", "name": "ada"}]
    answer = client.chat.completions.with_raw_response.create(model="default", messages=named, max_tokens=1)  # type: ignore[arg-type]
    assert answer.headers["x-ocserve-ignored"] == "messages[0].name"
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "red"},
    ]
    answer = client.chat.completions.with_raw_response.create(model="default", messages=history, max_tokens=1)  # type: ignore[arg-type]
    assert answer.headers["x-ocserve-ignored"] == "messages[2].tool_call_id"


def test_unknown_and_unsupported_parameters_are_refused_by_name(client: openai.OpenAI) -> None:
    for extra, param in (({"temprature": 1}, "temprature"), ({"n": 17}, "n"), ({"max_tokens": 10**6}, "max_tokens")):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(model="default", messages=QUESTION, extra_body=extra)
        assert refusal.value.param == param


def test_p17_a_prompt_is_never_truncated(client: openai.OpenAI) -> None:
    """At the context's length and beyond: 400 with both counts; one token below it: answered, counted exactly."""
    context = client.models.list().data[0].model_extra["context_length"]  # type: ignore[index]
    for length in (context, context + 1, 3 * context):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model="default", prompt=[500] * length, max_tokens=1)
        assert refusal.value.code == "context_length_exceeded"
        assert f"maximum context length is {context} tokens" in refusal.value.message
        assert f"{length} tokens" in refusal.value.message
    for length in (1, 7, 1000):
        answer = client.completions.create(model="default", prompt=[500] * length, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == length


def test_p17_a_prompt_that_just_fits_runs_to_the_context_end(tiny_model: object) -> None:
    """The bound on a tiny context, where filling it is quick: max_tokens is an upper bound, the end is `length`."""
    from tests import tiny
    from tests.e2e.daemon import daemon

    with (
        daemon(str(tiny_model)) as small,
        openai.OpenAI(base_url=small.base_url, api_key="x", max_retries=0) as asked,
    ):
        for length in (tiny.CONTEXT - 1, tiny.CONTEXT - 20):
            answer = asked.completions.create(
                model="default",
                prompt=[40] * length,
                max_tokens=100,
                logit_bias={str(tiny.END_OF_TURN): -100, "0": -100},
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == length
            assert answer.usage.completion_tokens == tiny.CONTEXT - length
            assert answer.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError) as refusal:
            asked.completions.create(model="default", prompt=[40] * tiny.CONTEXT, max_tokens=1)
        assert refusal.value.code == "context_length_exceeded"
