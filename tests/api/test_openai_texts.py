"""Text completions: log-probabilities aligned with the text, echo, several prompts, the best of several answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.api import openai_completions, openai_texts
from ocserve.api.dialect import Reply
from ocserve.generation import (
    Finished,
    FinishReason,
    GenerateEvent,
    PromptLogprobs,
    Started,
    TextDelta,
    TokenChance,
    TokenLogprob,
    Usage,
)
from tests.http.harness import MODEL


def token(piece: bytes, logprob: float, *top: tuple[bytes, float]) -> TokenLogprob:
    others = tuple(TokenChance(0, other, chance) for other, chance in top)
    return TokenLogprob(chosen=TokenChance(0, piece, logprob), top=others)


def text(*pieces: bytes, index: int = 0, logprob: float = -1.0) -> TextDelta:
    said = b"".join(pieces).decode()
    return TextDelta(text=said, tokens=len(pieces), index=index, logprobs=tuple(token(p, logprob) for p in pieces))


def finished(tokens: int, index: int = 0, reason: FinishReason = "stop") -> Finished:
    return Finished(reason=reason, usage=Usage(prompt_tokens=3, completion_tokens=tokens), index=index)


def answer(events: list[GenerateEvent], **request: Any) -> tuple[list[Any], list[Any]]:
    """The choices of the whole answer, and those of all chunks."""
    body = json.dumps({"model": "tiny", "prompt": "Hi", **request}).encode()
    parsed = openai_completions.parse(body, lambda name: MODEL, refuse_unknown=True)
    assert parsed.encoder is not None
    reply = Reply(id="abc", model="tiny", created=17, choices=sum(each.choices for each in parsed.requests))
    whole = json.loads(parsed.encoder(reply).complete(events, Usage()))["choices"]
    encoder = parsed.encoder(reply)
    frames = [*encoder.open(), *(frame for event in events for frame in encoder.event(event))]
    return whole, [choice for frame in frames for choice in json.loads(frame.data)["choices"]]


def joined(chunks: list[Any], index: int = 0) -> Any:
    """The choice that a client puts together from a stream."""
    mine = [chunk for chunk in chunks if chunk["index"] == index]
    columns: dict[str, list[Any]] = {}
    for chunk in mine:
        for name, column in (chunk["logprobs"] or {}).items():
            columns.setdefault(name, []).extend(column)
    (reason,) = [chunk["finish_reason"] for chunk in mine if chunk["finish_reason"]]
    return {
        "index": index,
        "text": "".join(chunk["text"] for chunk in mine),
        "logprobs": columns or None,
        "finish_reason": reason,
    }


def aligned(choice: Any) -> None:
    """Every token stands in the text where its offset says."""
    listed = choice["logprobs"]
    assert len({len(column) for column in listed.values()}) == 1
    ends = [*listed["text_offset"][1:], len(choice["text"])]
    for said, begin, end in zip(listed["tokens"], listed["text_offset"], ends, strict=True):
        if "\\x" not in said:
            assert choice["text"][begin:end] == said


PROMPT = PromptLogprobs(tokens=(token(b"Hi", 0.0), token(b" you", -2.0, (b" there", -1.0))))


def test_tokens_stand_where_their_offsets_say() -> None:
    snowman = "☃".encode()
    likely = token(b"a", -1.0, (b"a", -1.0), (b"b", -2.0))
    rest = tuple(token(piece, -1.0) for piece in (snowman[:1], snowman[1:], b" b"))
    events: list[GenerateEvent] = [
        Started(prompt_tokens=1),
        TextDelta(text="a", tokens=1, logprobs=(likely,)),
        TextDelta(text="☃ b", tokens=3, logprobs=rest),
        finished(4, reason="length"),
    ]
    (whole,), chunks = answer(events, logprobs=1)
    assert whole["text"] == "a☃ b"
    assert whole["logprobs"]["tokens"] == ["a", "\\xe2", "\\x98\\x83", " b"]
    assert whole["logprobs"]["text_offset"] == [0, 1, 1, 2]
    assert whole["logprobs"]["top_logprobs"][:2] == [{"a": -1.0, "b": -2.0}, {"\\xe2": -1.0}]
    aligned(whole)
    assert joined(chunks) == whole


def test_an_echo_is_scored_together_with_the_answer() -> None:
    events = [Started(prompt_tokens=2), PROMPT, text(b"!"), finished(1, reason="length")]
    (whole,), chunks = answer(events, prompt="Hi you", echo=True, logprobs=1, max_tokens=1)
    assert whole["text"] == "Hi you!"
    assert whole["logprobs"] == {
        "tokens": ["Hi", " you", "!"],
        "token_logprobs": [None, -2.0, -1.0],
        "top_logprobs": [None, {" there": -1.0, " you": -2.0}, {"!": -1.0}],
        "text_offset": [0, 2, 6],
    }
    assert joined(chunks) == whole


@pytest.mark.parametrize(
    ("pieces", "offsets"),
    [((b"<s>", b"Hi", b" you"), [0, 0, 2]), ((b" Hi", b" you"), [0, 2]), ((b"<s>", b" Hi", b" you"), [0, 0, 2])],
)
def test_what_a_vocabulary_puts_before_a_prompt_is_not_echoed(pieces: tuple[bytes, ...], offsets: list[int]) -> None:
    prompt = PromptLogprobs(tokens=tuple(token(piece, -1.0) for piece in pieces))
    events: list[GenerateEvent] = [Started(prompt_tokens=2), prompt, finished(0, reason="length")]
    (whole,), chunks = answer(events, prompt="Hi you", echo=True, logprobs=0, max_tokens=0)
    assert (whole["text"], whole["logprobs"]["text_offset"]) == ("Hi you", offsets)
    assert joined(chunks) == whole


def test_a_scoring_client_finds_its_continuation() -> None:
    """lm-evaluation-harness asks for one more token than it scores, and reads `[context:-1]`."""
    context, most = 1, 1
    for end in ([text(b"!"), finished(1, reason="length")], [finished(1)]):
        (whole,), chunks = answer(
            [Started(prompt_tokens=2), PROMPT, *end], prompt=[5, 6], echo=True, logprobs=1, max_tokens=most
        )
        listed = whole["logprobs"]
        assert listed["token_logprobs"][context:-1] == [-2.0]
        (best,) = listed["top_logprobs"][context:-1]
        assert max(best, key=best.get) != listed["tokens"][context]
        assert joined(chunks) == whole


def test_token_ids_are_echoed_as_what_they_say() -> None:
    events = [Started(prompt_tokens=2), PROMPT, text(b"!"), finished(2)]
    (whole,), chunks = answer(events, prompt=[5, 6], echo=True)
    assert (whole["text"], whole["logprobs"]) == ("Hi you!", None)
    assert joined(chunks) == whole


def test_a_text_is_echoed_as_it_was_sent() -> None:
    (whole,), chunks = answer([Started(prompt_tokens=2), text(b"!"), finished(2)], prompt="Hi", echo=True)
    assert whole["text"] == "Hi!"
    assert joined(chunks) == whole
    assert chunks[0]["text"] == "Hi"


def test_prompts_are_numbered_on() -> None:
    events: list[GenerateEvent] = [Started(prompt_tokens=1)]
    for index, said in enumerate((b"a", b"b", b"c", b"d")):
        events += [text(said, index=index), finished(1, index=index)]
    whole, chunks = answer(events, prompt=["x", "y"], n=2, echo=True)
    assert [(choice["index"], choice["text"]) for choice in whole] == [(0, "xa"), (1, "xb"), (2, "yc"), (3, "yd")]
    assert [joined(chunks, index) for index in range(4)] == whole


def test_the_best_of_each_prompt_are_the_likeliest_for_each_token() -> None:
    events: list[GenerateEvent] = [Started(prompt_tokens=1)]
    chances = [(b"a", -3.0), (b"b", -1.0), (b"c", -2.0), (b"d", -0.5), (b"e", -9.0), (b"f", -0.1)]
    for index, (said, logprob) in enumerate(chances):
        pieces = [said] * (1 + index % 2)  # twice as long is not half as likely
        events += [text(*pieces, index=index, logprob=logprob), finished(len(pieces), index=index)]
    whole, _ = answer(events, prompt=["x", "y"], n=2, best_of=3)
    assert [(choice["index"], choice["text"]) for choice in whole] == [(0, "bb"), (1, "c"), (2, "ff"), (3, "dd")]
    assert all(choice["logprobs"] is None for choice in whole)


def test_an_empty_answer_is_never_the_best() -> None:
    events = [Started(prompt_tokens=1), finished(1), text(b"b", index=1, logprob=-5.0), finished(1, index=1)]
    whole, _ = answer(events, best_of=2)
    assert [choice["text"] for choice in whole] == ["b"]


def test_a_prompt_is_listed_once_for_all_of_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[TokenLogprob] = []
    real = openai_texts._likeliest

    def likeliest(token: TokenLogprob) -> dict[str, float]:
        listed.append(token)
        return real(token)

    monkeypatch.setattr(openai_texts, "_likeliest", likeliest)
    ends = [finished(1, index, "length") for index in range(3)]
    said = [text(b"!", index=index) for index in range(3)]
    events = [Started(prompt_tokens=2), PROMPT, *said, *ends]
    whole, chunks = answer(events, prompt="Hi you", echo=True, logprobs=1, max_tokens=1, n=3)
    assert len(listed) == 2 * (2 + 3)  # once for the whole answer, once for the stream
    for index, choice in enumerate(whole):
        aligned(choice)
        assert choice["logprobs"]["text_offset"] == [0, 2, 6]
        assert joined(chunks, index) == choice
