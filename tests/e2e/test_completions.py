"""Text completions of a real model: scores aligned with the text, several prompts, the best of several, grammars."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from tests.e2e.alike import NOISE

PROMPT = "The capital of France is Paris. The capital of Italy is"


def complete(client: openai.OpenAI, **rest: Any) -> Any:
    return client.completions.create(**{"model": "default", "prompt": PROMPT, "temperature": 0, **rest})


def test_an_answer_scores_as_an_echo_what_it_scored_when_it_was_generated(client: openai.OpenAI) -> None:
    said = complete(client, max_tokens=6, logprobs=2).choices[0]
    scored = complete(client, prompt=PROMPT + said.text, max_tokens=0, logprobs=2, echo=True)
    (echo,) = scored.choices
    assert (echo.text, echo.finish_reason) == (PROMPT + said.text, "length")
    assert scored.usage.completion_tokens == 0
    listed = echo.logprobs
    assert listed.token_logprobs[0] is None
    assert len(listed.tokens) == scored.usage.prompt_tokens
    for token, begin, end in zip(
        listed.tokens, listed.text_offset, [*listed.text_offset[1:], len(echo.text)], strict=True
    ):
        assert echo.text[begin:end] == token
    count = len(said.logprobs.tokens)
    assert listed.tokens[-count:] == said.logprobs.tokens
    # Another chunking of the prompt rounds otherwise in a quantised model.
    assert listed.token_logprobs[-count:] == pytest.approx(said.logprobs.token_logprobs, abs=NOISE)
    for token, chances in zip(listed.tokens[1:], listed.top_logprobs[1:], strict=True):
        assert token in chances
        assert len(chances) in (2, 3)


def test_a_scoring_client_reads_its_continuation_whether_the_answer_ends_or_not(client: openai.OpenAI) -> None:
    """As lm-evaluation-harness asks: token ids, one token more than it scores."""
    ids = complete(client, max_tokens=0, logprobs=0, echo=True)
    length = ids.usage.prompt_tokens
    for biased in ({}, {"logit_bias": {"2": 100}}):  # SmolLM2's token 2 ends an answer
        answer = complete(client, max_tokens=1, logprobs=1, echo=True, seed=1234, **biased)
        listed = answer.choices[0].logprobs
        assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.top_logprobs) == length + 1
        assert listed.token_logprobs[1:-1] == pytest.approx(ids.choices[0].logprobs.token_logprobs[1:], abs=NOISE)


def test_several_prompts_answer_as_each_alone(client: openai.OpenAI) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,", "a b c d"]
    alone = [complete(client, prompt=prompt, max_tokens=8) for prompt in prompts]
    together = complete(client, prompt=prompts, max_tokens=8)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    same = [one.choices[0].text == choice.text for one, choice in zip(alone, together.choices, strict=True)]
    assert sum(same) >= 2, "in a batch of another size a quantised model may round one of them otherwise"
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    echoed = complete(client, prompt=prompts, max_tokens=0, echo=True)
    assert [choice.text for choice in echoed.choices] == prompts
    chunks = list(complete(client, prompt=prompts, max_tokens=8, stream=True))
    streamed = [
        "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)
        for index in range(3)
    ]
    assert sum(one == choice.text for one, choice in zip(streamed, together.choices, strict=True)) >= 2
    assert chunks[-1].usage.prompt_tokens == together.usage.prompt_tokens


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI) -> None:
    drawn = {"temperature": 1.5, "max_tokens": 6, "seed": 5, "logprobs": 0}
    all_of_them = complete(client, **drawn, n=4)
    best = complete(client, **drawn, best_of=4)

    def mean(choice: Any) -> float:
        chances = choice.logprobs.token_logprobs
        return float(sum(chances) / len(chances)) if chances else float("-inf")

    assert mean(best.choices[0]) == pytest.approx(max(map(mean, all_of_them.choices)), abs=NOISE)
    assert best.usage.completion_tokens >= all_of_them.usage.completion_tokens - 4


def test_answers_follow_a_grammar_under_all_its_names(client: openai.OpenAI) -> None:
    pattern = "[a-f]{3}-[0-9]{2}"
    for extra in (
        {"response_format": {"type": "grammar", "grammar": pattern, "syntax": "regex"}},
        {"response_format": {"type": "grammar", "grammar": f"start: /{pattern}/"}},
        {"guided_regex": pattern},
        {"structured_outputs": {"regex": pattern}},
    ):
        answer = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "A code?"}], max_tokens=20, extra_body=extra
        )
        assert re.fullmatch(pattern, answer.choices[0].message.content or "")
    words = ["yes (really)", "no.", "é|è"]
    chosen = complete(client, max_tokens=20, extra_body={"guided_choice": words}).choices[0]
    assert chosen.text in words
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(client, extra_body={"guided_json": {"not": {}}})
    assert refusal.value.param == "guided_json"


def test_a_vocabulary_without_the_tokens_for_it_cannot_fill_in(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(client, suffix="return x", max_tokens=4)
    assert refusal.value.param == "suffix"
