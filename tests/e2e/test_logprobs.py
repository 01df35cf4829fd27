"""Log-probabilities of the real model, as OpenAI's client reads them: answers and prompts, scored and sampled alike."""

from __future__ import annotations

import math

import openai
import pytest

from tests.e2e.alike import NOISE

PROMPT = "The lighthouse keeper climbed the stairs every evening, because"


def test_what_was_sampled_scores_the_same_as_a_prompt(client: openai.OpenAI) -> None:
    """As evaluation harnesses do it: an answer's tokens, then the same tokens given back with `echo`."""
    answer = client.completions.create(model="default", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=3)
    sampled = answer.choices[0].logprobs
    assert sampled is not None
    assert sampled.tokens is not None
    assert sampled.token_logprobs is not None
    assert "".join(sampled.tokens) == answer.choices[0].text
    assert answer.usage is not None
    scored = client.completions.create(
        model="default", prompt=PROMPT + answer.choices[0].text, max_tokens=0, echo=True, logprobs=3
    )
    echoed = scored.choices[0].logprobs
    assert echoed is not None
    assert echoed.tokens is not None
    assert echoed.token_logprobs is not None
    assert "".join(echoed.tokens) == PROMPT + answer.choices[0].text
    assert echoed.token_logprobs[0] is None
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    tail = echoed.tokens[-len(sampled.tokens) :]
    assert tail == sampled.tokens
    for one, other in zip(sampled.token_logprobs, echoed.token_logprobs[-len(tail) :], strict=True):
        assert one == pytest.approx(other, abs=NOISE)
    assert all(value is None or -40 < value <= 0 for value in echoed.token_logprobs)


def test_a_greedy_choice_is_the_best_alternative_and_sampling_parameters_do_not_show(client: openai.OpenAI) -> None:
    def first(**rest: object) -> dict[str, float]:
        answer = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Name a colour."}],
            max_tokens=8,
            logprobs=True,
            top_logprobs=5,
            **rest,  # type: ignore[call-overload]
        )
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content
        for each in content:
            values = [alternative.logprob for alternative in each.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1 + 1e-6
            if rest.get("temperature") == 0 and "presence_penalty" not in rest:
                assert each.token == each.top_logprobs[0].token
        return {each.token: each.logprob for each in content[0].top_logprobs}

    plain = first(temperature=0)
    changed = first(temperature=1.9, seed=3, presence_penalty=1.5, top_p=0.3, extra_body={"min_p": 0.2})
    shared = plain.keys() & changed.keys()  # the last of five may change places with the sixth
    assert len(shared) >= 3
    for token in shared:
        assert changed[token] == pytest.approx(plain[token], abs=NOISE)
