"""Probes of the sampling parameters: each alone, with an effect that can be seen from outside.

Token ids 1000 and 1500 exist in every vocabulary; what they say does not matter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ocserve.audit.server import Reply, dig
from ocserve.audit.subject import LIST, Subject, named, supported
from ocserve.audit.verdict import Fault, Unproven, clean, expect

_ONE, _OTHER = "1000", "1500"
_REPETITIVE = (
    "Repeat the word yes for ever: yes yes yes yes yes yes",
    "Write la la la la la la la la and go on like that.",
    "Count: 1 1 1 1 1 1 1 1 1",
)
_HOT: dict[str, Any] = {"temperature": 1.5, "max_tokens": 16}
_STOPPED = 48  # tokens of answers with stop texts
_SEEDS = 10  # that are tried at most
_TRIES = 4  # to meet a stop text in an answer that a quantised model may give otherwise


async def _seeded(subject: Subject, seeds: range, **given: Any) -> list[str]:
    """Texts of the same request under several seeds."""
    return [(await supported(subject.chat(LIST, seed=seed, **given))).text for seed in seeds]


async def max_tokens(subject: Subject) -> str:
    """`max_tokens` bounds the answer, which says so."""
    cut = 0
    for limit in (1, 5, 17):
        reply = await subject.chat(max_tokens=limit)
        used = reply.used("completion_tokens")
        expect(used <= limit, f"max_tokens {limit} gave {used} tokens")
        if used == limit and reply.finish == "length":
            cut += 1
    expect(cut, "no answer ended with finish reason `length`")
    return f"{cut} of 3 answers were cut at their limit with `length`"


async def max_completion_tokens(subject: Subject) -> str:
    """`max_completion_tokens` is the same limit under OpenAI's present name."""
    reply = await supported(subject.chat(max_tokens=None, max_completion_tokens=6))
    used = reply.used("completion_tokens")
    expect(used <= 6, f"max_completion_tokens 6 gave {used} tokens")
    return f"{used} tokens of 6, {reply.finish}"


def _usual(texts: list[str]) -> int:
    """How many of the texts are the most frequent one.

    Where one candidate is left, all are equal but those in which a quantised model's close call tips, as it can when
    the prompt is cached or another request is computed beside it.
    """
    return Counter(texts).most_common(1)[0][1]


async def temperature(subject: Subject) -> str:
    """Temperature 0 is the same answer; a high one is not."""
    cold = await _seeded(subject, range(4), **{**_HOT, "temperature": 0})
    hot = await _seeded(subject, range(4), **_HOT)
    expect(len(set(hot)) > 1, "temperature 1.5 always gave the same answer")
    expect(_usual(cold) >= 2 and len(set(cold)) < len(set(hot)), "temperature 0 gave different answers")
    return f"{_usual(cold)} equal answers of 4 at 0, {len(set(hot))} different ones of 4 at 1.5"


async def _narrows(subject: Subject, name: str, value: float) -> str:
    """Evidence that a filter set so narrow leaves one candidate, where without it there are more."""
    free = await _seeded(subject, range(4), **_HOT)
    if len(set(free)) == 1:
        raise Unproven("answers do not differ without it, so its effect cannot be seen")
    narrow = await _seeded(subject, range(4), **{**_HOT, name: value})
    expect(len(set(narrow)) < len(set(free)), f"{name} {value:g} leaves answers as different as without it")
    expect(_usual(narrow) >= 2, f"{name} {value:g} gave {len(set(narrow))} different answers of 4")
    return f"{len(set(free))} different answers of 4 without, {len(set(narrow))} with {name} {value:g}"


async def top_p(subject: Subject) -> str:
    """A tiny `top_p` leaves one candidate."""
    return await _narrows(subject, "top_p", 0.001)


async def top_k(subject: Subject) -> str:
    """`top_k` 1 is greedy."""
    return await _narrows(subject, "top_k", 1)


async def min_p(subject: Subject) -> str:
    """`min_p` 1 leaves the most probable candidate."""
    return await _narrows(subject, "min_p", 1)


def _below_square(reply: Reply, slack: float) -> int:
    """How many tokens were chosen with a probability below the square of the most probable one's."""
    items = dig(reply.choices, 0, "logprobs", "content") or []
    found = 0
    for item in items:
        best = dig(item, "top_logprobs", 0, "logprob")
        chosen = dig(item, "logprob")
        if not isinstance(best, int | float) or not isinstance(chosen, int | float):
            raise Unproven("its effect is seen in log-probabilities, which this server does not give")
        found += chosen < 2 * best - slack
    return found


async def top_a(subject: Subject) -> str:
    """`top_a` 1 drops candidates below the square of the best one's probability."""
    given = {"temperature": 1, "top_p": 1, "max_tokens": 48, "logprobs": True, "top_logprobs": 1}
    seeds = range(4)
    kept = [await supported(subject.chat(LIST, seed=seed, top_a=1, **given)) for seed in seeds]
    dropped = sum(_below_square(reply, 0.1) for reply in kept)
    expect(not dropped, f"{dropped} tokens were chosen that top_a 1 rules out")
    free = [await supported(subject.chat(LIST, seed=seed, **given)) for seed in seeds]
    without = sum(_below_square(reply, 0.1) for reply in free)
    if not without:
        raise Unproven("without it no such token was chosen either")
    return f"{without} tokens below the bound without it, none with it"


async def seed(subject: Subject) -> str:
    """The same seed draws the same answer, another seed another one."""
    given = {"temperature": 1, "max_tokens": 16}
    await subject.chat(LIST, **given)  # so that the prompt is cached, or not, for all alike
    answers: set[str] = set()
    repeated: set[str] = set()
    # Each seed twice in a row: close calls of a quantised model tip as what is cached changes. A seed that is ignored
    # repeats no two answers, one that is fixed repeats only one.
    for tried in range(1, _SEEDS + 1):
        one, other = [(await supported(subject.chat(LIST, seed=tried, **given))).text for _ in range(2)]
        answers |= {one, other}
        repeated |= {one} & {other}
        if len(repeated) >= 3:
            break
    expect(len(answers) > 1, f"{tried} seeds drew one answer")
    expect(len(repeated) >= 2, f"{len(repeated)} of {tried} seeds drew the same answer again")
    return f"{len(repeated)} of {tried} seeds drew the same answer again, {len(answers)} different answers"


async def _calmed(subject: Subject, name: str, value: float) -> str:
    """Evidence that a penalty changes greedy answers, towards less repetition."""
    changed = 0
    for prompt in _REPETITIVE:
        given = {"temperature": 0, "max_tokens": 40}
        plain = (await subject.chat(prompt, **given)).text
        calm = (await supported(subject.chat(prompt, **given, **{name: value}))).text
        before, after = _most(plain), _most(calm)
        if plain != calm and after <= before:
            changed += 1
    expect(changed, f"{name} {value:g} does not make repetitive answers less so")
    return f"{changed} of {len(_REPETITIVE)} greedy answers changed and repeat no more than before"


def _most(text: str) -> float:
    """The share of the commonest word."""
    words = text.split()
    return max(Counter(words).values()) / len(words) if words else 0.0


async def frequency_penalty(subject: Subject) -> str:
    """`frequency_penalty` makes repetitive answers less so."""
    return await _calmed(subject, "frequency_penalty", 2)


async def presence_penalty(subject: Subject) -> str:
    """`presence_penalty` makes repetitive answers less so."""
    return await _calmed(subject, "presence_penalty", 2)


async def repetition_penalty(subject: Subject) -> str:
    """`repetition_penalty` makes repetitive answers less so."""
    return await _calmed(subject, "repetition_penalty", 1.8)


async def stop(subject: Subject) -> str:
    """A stop text ends the answer before it, wherever it lies between tokens, streamed or whole, one or several."""
    plain = (await subject.chat(temperature=0, max_tokens=_STOPPED)).text
    if len(plain) < 40:
        raise Unproven("the answer is too short to put a stop text into it")
    for part, length in ((2, 1), (3, 5), (4, 9)):
        await _stopped(subject, plain, part, length, several=False, streamed=False)
        await _stopped(subject, plain, part, length, several=True, streamed=False)
        await _stopped(subject, plain, part, length, several=False, streamed=True)
    return "3 stop texts of 1 to 9 characters, as text and in a list, whole and streamed"


async def _stopped(subject: Subject, plain: str, part: int, length: int, *, several: bool, streamed: bool) -> None:
    """A stop text out of the greedy answer ends that answer; where another answer came, one out of that is taken."""
    what = "stream" if streamed else "answer"
    for _ in range(_TRIES):
        word = plain[len(plain) // part :][:length]
        given: dict[str, Any] = {
            "temperature": 0, "max_tokens": _STOPPED, "stop": [word, "\x00never"] if several else word,
        }  # fmt: skip
        if streamed:
            stream = await subject.chat_stream(**given)
            text, finishes = stream.text, stream.finishes
        else:
            reply = await subject.chat(**given)
            text, finishes = reply.text, [reply.finish]
        expect(word not in text, f"the {what} holds its stop text")
        if finishes == ["stop"] and len(text) < len(plain):
            return
        met = text == plain[: plain.index(word)]
        expect(not met, f"the {what} met its stop text and ended with `{clean(finishes, 40)}`")
        plain = text
    raise Unproven("greedy answers differ from one time to the next, so that no stop text is met")


async def logit_bias(subject: Subject) -> str:
    """`logit_bias` forces a token, and bans it."""

    async def text(bias: dict[str, int]) -> str:
        return (await supported(subject.chat(temperature=0, max_tokens=4, logit_bias=bias))).text

    plain = (await subject.chat(temperature=0, max_tokens=4)).text
    one, other = await text({_ONE: 100, _OTHER: 50}), await text({_OTHER: 100})
    expect(len({plain, one, other}) == 3, "forcing tokens did not change the answer")
    expect(await text({_ONE: -100, _OTHER: 100}) == other, "a banned token was chosen")
    expect(await text({_ONE: -100}) not in (one, other), "banning one token forced another")
    return f"tokens {_ONE} and {_OTHER} were forced and banned"


async def logprobs(subject: Subject) -> str:
    """`logprobs` gives each token's log-probability; their texts are the answer."""
    reply = await supported(subject.chat(temperature=0, max_tokens=12, logprobs=True))
    items = dig(reply.choices, 0, "logprobs", "content")
    if not isinstance(items, list) or not items:
        raise Fault("the choice has no logprobs.content")
    for item in items:
        value = dig(item, "logprob")
        expect(isinstance(value, int | float) and value <= 1e-6, "a log-probability is missing or positive")
        expect(isinstance(dig(item, "top_logprobs"), list), "an item has no top_logprobs list")
    data = b"".join(bytes(item["bytes"]) for item in items if isinstance(dig(item, "bytes"), list))
    joined = "".join(str(dig(item, "token")) for item in items)
    texts = (reply.text.encode(), reply.text.strip().encode())
    expect(data.strip() in texts or joined.strip() in (reply.text, reply.text.strip()), "the tokens are not the text")
    if reply.finish == "length":
        expect(len(items) == reply.used("completion_tokens"), "there are not as many items as tokens")
    return f"{len(items)} tokens with log-probabilities"


async def top_logprobs(subject: Subject) -> str:
    """`top_logprobs` gives so many candidates, best first; the greedy token is the best. Also in a stream."""
    given = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 4}
    reply = await supported(subject.chat(**given))
    stream = await subject.chat_stream(**given)
    parts = (dig(chunk, "choices", 0, "logprobs", "content") or [] for chunk in stream.chunks)
    streamed = [item for part in parts for item in part]
    items = dig(reply.choices, 0, "logprobs", "content") or []
    expect(items, "the choice has no logprobs.content")
    expect(streamed, "the stream has no logprobs")
    for item in (*items, *streamed):
        values = [dig(each, "logprob") for each in dig(item, "top_logprobs") or []]
        expect(len(values) == 4, f"{len(values)} candidates instead of 4")
        expect(values == sorted(values, reverse=True), "the candidates are not in order")
        expect(dig(item, "top_logprobs", 0, "token") == dig(item, "token"), "the greedy token is not the best")
    return f"4 candidates for each of {len(items)} tokens, whole and streamed"


PROBES = named(
    max_tokens, max_completion_tokens, temperature, top_p, top_k, min_p, top_a, seed, frequency_penalty,
    presence_penalty, repetition_penalty, stop, logit_bias, logprobs, top_logprobs,
)  # fmt: skip
