"""Probes of chat completions: the whole answer, the stream, and that both are one."""

from __future__ import annotations

from typing import Any

from ocserve.audit.server import Reply, Stream, dig
from ocserve.audit.subject import SHORT, STORY, Subject, counting, named
from ocserve.audit.verdict import Fault, clean, expect

FINISHES = ("stop", "length", "tool_calls", "content_filter")
_SIZES = (1, 30, 300)  # sentences of a prompt


def _shape(reply: Reply) -> None:
    body = reply.json
    expect(_text(dig(body, "id")), "`id` is missing")
    expect(dig(body, "object") == "chat.completion", "`object` is not `chat.completion`")
    expect(isinstance(dig(body, "created"), int), "`created` is no integer")
    expect(_text(dig(body, "model")), "`model` is missing")
    choice = dig(body, "choices", 0)
    expect(dig(choice, "index") == 0, "`choices[0].index` is not 0")
    expect(dig(choice, "message", "role") == "assistant", "the message's role is not `assistant`")
    expect(_text(dig(choice, "message", "content")), "the message has no content")
    expect(dig(choice, "finish_reason") in FINISHES, "the finish reason is none of OpenAI's")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


async def chat_whole(subject: Subject) -> str:
    """A chat request is answered whole, in OpenAI's shape."""
    reply = await subject.chat(STORY)
    _shape(reply)
    expect(reply.headers.get("content-type", "").startswith("application/json"), "the answer is not application/json")
    return f"finish reason {reply.finish} after {reply.took_s * 1000:.0f} ms"


async def chat_sizes(subject: Subject) -> str:
    """Prompts of one sentence to several thousand tokens are answered, and count for more the longer they are."""
    room = (subject.context_length or 8192) - 64
    counts = []
    for size in _SIZES:
        sentences = " ".join(f"Ship number {i} is at sea." for i in range(min(size, max(1, room // 12))))
        reply = await subject.chat(f"{sentences} How many ships are there?", max_tokens=4)
        counts.append(reply.used("prompt_tokens"))
    expect(counts == sorted(set(counts)), "a longer prompt did not count for more tokens")
    return f"prompts of {', '.join(map(str, counts))} tokens"


async def chat_roles(subject: Subject) -> str:
    """System messages and earlier turns are taken, and count."""
    user = {"role": "user", "content": SHORT}
    brief = {"role": "system", "content": "Be brief."}  # templates may have a system text of their own without one
    system = {"role": "system", "content": "You are a terse captain of a ship who answers in one word."}
    later = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And goodbye?"}]
    conversations = ([brief, user], [system, user], [system, user, *later])
    replies = [await subject.chat(messages=messages, max_tokens=4) for messages in conversations]
    counts = [reply.used("prompt_tokens") for reply in replies]
    expect(counts == sorted(set(counts)), "messages were dropped: the prompt's count did not grow with them")
    return f"prompts of {', '.join(map(str, counts))} tokens"


def _framed(stream: Stream) -> None:
    expect(stream.headers.get("content-type", "").startswith("text/event-stream"), "not text/event-stream")
    expect(stream.chunks, "the stream has no chunks")
    expect(stream.named_events == 0, "chunks have `event:` lines")


async def stream_sse(subject: Subject) -> str:
    """A stream is server-sent events of chat.completion.chunk objects."""
    stream = await subject.chat_stream()
    _framed(stream)
    expect(
        all(dig(chunk, "object") == "chat.completion.chunk" for chunk in stream.chunks),
        "a chunk's `object` is not `chat.completion.chunk`",
    )
    for name in ("id", "created", "model"):
        expect(len({str(dig(chunk, name)) for chunk in stream.chunks}) == 1, f"chunks differ in `{name}`")
        expect(dig(stream.chunks, 0, name) is not None, f"chunks have no `{name}`")
    return f"{len(stream.chunks)} chunks"


async def stream_done(subject: Subject) -> str:
    """A stream ends with `data: [DONE]`, once, and nothing follows."""
    stream = await subject.chat_stream()
    expect(stream.done, "the stream has no [DONE]")
    expect(stream.after_done == 0, "events follow [DONE]")
    return f"[DONE] after {len(stream.chunks)} chunks"


async def stream_deltas(subject: Subject) -> str:
    """The role is said once and first, the finish reason once and after the text."""
    stream = await subject.chat_stream()
    deltas = [dig(chunk, "choices", 0, "delta") for chunk in stream.chunks if dig(chunk, "choices")]
    roles = [index for index, delta in enumerate(deltas) if dig(delta, "role") is not None]
    expect(roles == [0], f"the role stands in chunks {roles} instead of the first only")
    expect(len(stream.finishes) == 1, f"{len(stream.finishes)} finish reasons in one choice")
    expect(stream.finishes[0] in FINISHES, "the finish reason is none of OpenAI's")
    finish = next(i for i, chunk in enumerate(stream.chunks) if dig(chunk, "choices", 0, "finish_reason"))
    late = [chunk for chunk in stream.chunks[finish + 1 :] if dig(chunk, "choices", 0, "delta", "content")]
    expect(not late, "text follows the finish reason")
    return f"one role, {len(stream.texts())} pieces of text, finish reason {stream.finishes[0]}"


async def stream_usage(subject: Subject) -> str:
    """With include_usage the last chunk before [DONE] has the usage and no choices."""
    stream = await subject.chat_stream()
    last = stream.chunks[-1] if stream.chunks else None
    expect(dig(last, "choices") == [], "the last chunk's `choices` is not empty")
    total = stream.used("total_tokens")
    expect(total == stream.used("prompt_tokens") + stream.used("completion_tokens"), "total_tokens is not the sum")
    expect(dig(last, "usage") is not None, "the last chunk has no usage")
    return f"usage of {total} tokens in the last chunk"


async def stream_usage_always(subject: Subject) -> str:
    """A stream has its usage also where nobody asked for it."""
    stream = await subject.chat_stream(stream_options=None)
    expect(stream.usage is not None, "a stream without stream_options has no usage")
    return f"{stream.used('total_tokens')} tokens without stream_options"


async def stream_incremental(subject: Subject) -> str:
    """Text arrives while it is made, not at the end."""
    for _ in range(2):  # a busy machine may hold everything up once
        stream = await subject.chat_stream(max_tokens=96)
        moments = sorted(set(stream.arrived))
        first = stream.first_text_s
        if first is None:
            raise Fault("the stream has no text")
        pieces = len(stream.texts())
        in_time = first < 0.8 * stream.took_s or stream.took_s < 0.05
        if pieces > 1 and (pieces < 8 or (len(moments) >= 4 and in_time)):
            return f"first text after {first * 1000:.0f} of {stream.took_s * 1000:.0f} ms, at {len(moments)} moments"
    expect(pieces > 1, "the whole text came in one piece")
    expect(in_time, "the first text came with the last")
    raise Fault(f"{pieces} pieces of text arrived at {len(moments)} moments")


async def stream_equals_whole(subject: Subject) -> str:
    """A greedy answer is the same streamed and whole: text, finish reason and counts."""
    for start in (11, 31, 51):  # a quantised model may tip even here
        given: dict[str, Any] = {"content": counting(start), "temperature": 0, "max_tokens": 24}
        whole, stream = await subject.chat(**given), await subject.chat_stream(**given)
        name = "prompt_tokens"
        expect(stream.used(name) == whole.used(name), f"usage.{name} differs between stream and whole answer")
        if stream.text == whole.text:
            break
    else:
        raise Fault("the greedy text differs between stream and whole answer")
    expect(stream.finishes == [whole.finish], "the finish reason differs between stream and whole answer")
    name = "completion_tokens"
    expect(stream.used(name) == whole.used(name), f"usage.{name} differs between stream and whole answer")
    return f"{len(whole.text)} characters, {whole.used(name)} tokens"


async def stream_choices(subject: Subject) -> str:
    """`n` gives so many choices, whole and streamed, each with its index and its own end."""
    whole = await subject.chat(n=3, max_tokens=8, temperature=1)
    expect([dig(choice, "index") for choice in whole.choices] == [0, 1, 2], "n=3 does not give the choices 0, 1, 2")
    stream = await subject.chat_stream(n=3, max_tokens=8, temperature=1)
    expect(len(stream.finishes) == 3, f"{len(stream.finishes)} finish reasons in a stream of three choices")
    expect(all(stream.texts(index) for index in range(3)), "a choice of the stream has no text")
    return "three choices in both forms"


async def request_ids(subject: Subject) -> str:
    """Answers carry a request id that support can be asked about."""
    reply = await subject.chat(SHORT, max_tokens=2)
    found = reply.headers.get("x-request-id") or reply.headers.get("request-id")
    if not found:
        raise Fault("no x-request-id header")
    other = await subject.chat(SHORT, max_tokens=2)
    expect(other.headers.get("x-request-id", other.headers.get("request-id")) != found, "two answers have one id")
    return f"x-request-id {clean(found, 60)}"


PROBES = named(
    chat_whole, chat_sizes, chat_roles, stream_sse, stream_done, stream_deltas, stream_usage, stream_usage_always,
    stream_incremental, stream_equals_whole, stream_choices, request_ids,
)  # fmt: skip
