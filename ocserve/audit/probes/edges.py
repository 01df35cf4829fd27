"""Probes of edge cases: text of every kind, empty prompts, very long answers, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from ocserve.audit.server import Stream
from ocserve.audit.subject import SHORT, STORY, Subject, named
from ocserve.audit.verdict import Fault, Refused, Unproven, clean, expect

_LONG = 10_000  # tokens of a stream that a provider has to hold
_PHRASE = "héllo Ωμέγα 日本語 עברית 👩‍👩‍👧 𝔘 ｡"
_CONTROLS = "tab\t newline\n null\x00 bell\x07 bidi\u202e zero\u200b end"
_LEAVERS, _LEFT_BEHIND = 8, 2048  # streams that are left, and tokens that each still had to make
_ENDS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<eos>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<|end|>")


async def unicode_prompts(subject: Subject) -> str:
    """Prompts in any script, with emoji and control characters, are taken."""
    counts = []
    for text in (_PHRASE, _CONTROLS, "🌊" * 200, "ﷺ" * 20, "a\u0301" * 50):
        reply = await subject.chat(text, max_tokens=4)
        counts.append(reply.used("prompt_tokens"))
    return f"prompts of {', '.join(map(str, counts))} tokens"


async def unicode_answers(subject: Subject) -> str:
    """An answer in any script arrives to the letter, streamed and whole: no character is cut between chunks."""
    schema = {"type": "object", "properties": {"text": {"const": _PHRASE}}, "required": ["text"]}
    given: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "phrase", "schema": schema}},
    }
    try:
        whole = (await subject.chat("Repeat the phrase as JSON.", **given)).text
        stream = (await subject.chat_stream("Repeat the phrase as JSON.", **given)).text
        how = "forced by a schema"
    except Fault:
        whole = (await subject.complete(_PHRASE, echo=True, max_tokens=1)).text
        stream = (await subject.complete_stream(_PHRASE, echo=True, max_tokens=1)).text
        how = "by echo"
        expect(whole.startswith(_PHRASE) and stream.startswith(_PHRASE), "the phrase came back changed")
        return f"{len(_PHRASE)} characters, {how}"
    for text in (whole, stream):
        try:
            found = msgspec.json.decode(text)
        except msgspec.DecodeError:
            raise Fault("the phrase came back as no JSON") from None
        expect(found == {"text": _PHRASE}, "the phrase came back changed")
    return f"{len(_PHRASE)} characters, {how}"


async def empty_prompts(subject: Subject) -> str:
    """Empty and minimal prompts are answered, or refused as the client's mistake."""
    statuses = []
    for content in ("", " ", ".", "\n"):
        reply = await subject.refused(content, max_tokens=4)
        expect(reply.status in (200, 400, 422), f"an empty prompt is answered with status {reply.status}")
        statuses.append(reply.status)
    fields = {"model": subject.model, "prompt": "", "max_tokens": 4}
    reply = await subject.server.send("POST", "/completions", fields)
    expect(reply.status in (200, 400, 404, 422), f"an empty raw prompt is answered with status {reply.status}")
    return f"statuses {', '.join(map(str, [*statuses, reply.status]))}"


async def long_stream(subject: Subject) -> str:
    """A stream of 10,000 tokens arrives whole."""
    context, most = subject.context_length, subject.max_output_tokens
    if context is not None and context < _LONG + 100:
        raise Unproven(f"the model's context is {context} tokens")
    if most is not None and most < _LONG:
        raise Unproven(f"the largest answer is {most} tokens")
    if subject.quick:
        raise Unproven("left out by --quick")
    bias = {str(token): -100 for token in await _ends(subject)}
    given: dict[str, Any] = {"max_tokens": _LONG, "temperature": 1, "logit_bias": bias or None}
    try:
        stream = await subject.chat_stream(**given)
    except Refused:  # a base model has no conversations
        stream = await subject.complete_stream(**given)
    _complete(stream)
    used = stream.used("completion_tokens")
    if used < _LONG:
        raise Unproven(
            f"the answer ended after {used} tokens and {stream.took_s:.0f} s with `{clean(stream.finishes[0], 20)}`; "
            "if that is the model's own end, name its end tokens with --suppress"
        )
    subject.figures["long_stream_tok_per_s"] = used / stream.took_s
    return f"{used} tokens in {stream.took_s:.0f} s, finish reason {stream.finishes[0]}"


async def _ends(subject: Subject) -> set[int]:
    """Tokens that would end the answer: those the user named, else the usual ones that this vocabulary has."""
    if subject.suppress:
        return set(subject.suppress)
    found = set()
    for text in _ENDS:
        try:
            ids = await subject.tokens(text, special=False)
        except Unproven:
            return set()
        if len(ids) == 1:
            found.add(ids[0])
    return found


def _complete(stream: Stream) -> None:
    expect(stream.done, "the stream has no [DONE]")
    expect(len(stream.finishes) == 1, f"{len(stream.finishes)} finish reasons")
    expect(stream.usage is not None, "the stream has no usage")


async def cancellation(subject: Subject) -> str:
    """When clients leave their streams, the server stops computing for them: a newcomer is served at once."""
    for attempt in range(2):  # a busy machine may hold up any answer once
        before = [(await subject.chat_stream(SHORT, max_tokens=4)).took_s for _ in range(3)]
        room = min(_LEFT_BEHIND, subject.max_output_tokens or _LEFT_BEHIND)
        began = time.perf_counter()
        await asyncio.gather(*(_leave(subject, room, number + attempt * _LEAVERS) for number in range(_LEAVERS)))
        left = time.perf_counter() - began
        reply = await subject.chat_stream(SHORT, max_tokens=4)
        _complete(reply)
        if reply.took_s <= 5 * max(before) + 0.5:
            return (
                f"{_LEAVERS} streams left after their first chunks ({left:.2f} s); the next answer took "
                f"{reply.took_s:.2f} s, {max(before):.2f} s on an idle server"
            )
    raise Fault(f"after {_LEAVERS} streams were left, an answer took {reply.took_s:.2f} s instead of {max(before):.2f}")


async def _leave(subject: Subject, room: int, number: int) -> None:
    await subject.chat_stream(f"{STORY} Version {number}.", max_tokens=room, temperature=1, leave_after=3)


PROBES = named(unicode_prompts, unicode_answers, empty_prompts, cancellation)
LONG = named(long_stream)
