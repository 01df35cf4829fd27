"""Text completions of a real model: scores aligned with the text, several prompts, the best of several, grammars."""

from __future__ import annotations

import re
from statistics import median
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
    # No token of their greedy answers is a close call, so that also a quantised model repeats them to the letter.
    prompts = ["11, 12, 13, 14, 15, 16,", "23, 24, 25, 26, 27, 28,", "35, 36, 37, 38, 39, 40,"]
    alone = [complete(client, prompt=prompt, max_tokens=8) for prompt in prompts]
    together = complete(client, prompt=prompts, max_tokens=8)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    echoed = complete(client, prompt=prompts, max_tokens=0, echo=True)
    assert [choice.text for choice in echoed.choices] == prompts
    chunks = list(complete(client, prompt=prompts, max_tokens=8, stream=True))
    streamed = [
        "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)
        for index in range(3)
    ]
    assert streamed == [choice.text for choice in together.choices]
    assert chunks[-1].usage.prompt_tokens == together.usage.prompt_tokens


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI) -> None:
    """That it is the very best is shown without a model; other answers may be drawn from one time to the next."""

    def mean(choice: Any) -> float:
        chances = choice.logprobs.token_logprobs
        return float(sum(chances) / len(chances))

    drawn = {"temperature": 1.5, "max_tokens": 6, "logprobs": 0, "logit_bias": {"2": -100}}
    ordinary = complete(client, **drawn, seed=1, n=16)
    best = [complete(client, **drawn, seed=seed, best_of=8) for seed in (2, 3)]
    assert [answer.usage.completion_tokens for answer in best] == [8 * 6] * 2
    assert all(len(answer.choices) == 1 for answer in best)
    usual = median(map(mean, ordinary.choices))
    assert max(mean(answer.choices[0]) for answer in best) > usual


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
