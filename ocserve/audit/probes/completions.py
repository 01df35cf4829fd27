"""Probes of text completions: every form of prompt, whole and streamed."""

from __future__ import annotations

from ocserve.audit.server import dig
from ocserve.audit.subject import Subject, named
from ocserve.audit.verdict import expect

_BEGINNING = "Once upon a time there was a lighthouse keeper, and every night he"
_IDS = [300, 400, 500, 600]  # every vocabulary has them


async def completions_whole(subject: Subject) -> str:
    """A text completion is answered whole, in OpenAI's shape."""
    reply = await subject.complete(_BEGINNING)
    expect(dig(reply.json, "object") == "text_completion", "`object` is not `text_completion`")
    expect(isinstance(dig(reply.choices, 0, "text"), str), "the choice has no `text`")
    expect(reply.text, "the text is empty")
    expect(reply.finish in ("stop", "length", "content_filter"), "the finish reason is none of OpenAI's")
    return f"finish reason {reply.finish} after {reply.took_s * 1000:.0f} ms"


async def completions_usage(subject: Subject) -> str:
    """A whole text completion has its usage, and the sum is right."""
    reply = await subject.complete(_BEGINNING)
    prompt, completion = reply.used("prompt_tokens"), reply.used("completion_tokens")
    expect(prompt > 0, "usage.prompt_tokens is 0")
    expect(0 < completion <= 16, "usage.completion_tokens is not within max_tokens")
    expect(reply.used("total_tokens") == prompt + completion, "total_tokens is not the sum")
    return f"{prompt} + {completion} tokens"


async def completions_stream(subject: Subject) -> str:
    """A text completion streams, piece by piece, and ends with [DONE]."""
    stream = await subject.complete_stream(_BEGINNING)
    expect(stream.headers.get("content-type", "").startswith("text/event-stream"), "not text/event-stream")
    expect(stream.done, "the stream has no [DONE]")
    expect(len(stream.texts()) > 1, "the whole text came in one piece")
    expect(len(stream.finishes) == 1, f"{len(stream.finishes)} finish reasons in one choice")
    return f"{len(stream.texts())} pieces"


async def completions_stream_usage(subject: Subject) -> str:
    """A streamed text completion ends with its usage."""
    stream = await subject.complete_stream(_BEGINNING)
    total = stream.used("prompt_tokens") + stream.used("completion_tokens")
    expect(stream.used("total_tokens") == total, "total_tokens is not the sum")
    return f"{total} tokens"


async def completions_prompts(subject: Subject) -> str:
    """A prompt may be a text, several texts, token ids, or several lists of them."""
    several = await subject.complete([_BEGINNING, "One, two,"], max_tokens=4)
    expect([dig(choice, "index") for choice in several.choices] == [0, 1], "two texts do not give two choices")
    ids = await subject.complete(_IDS, max_tokens=4)
    expect(ids.used("prompt_tokens") in (len(_IDS), len(_IDS) + 1), "token ids are not counted as they are")
    lists = await subject.complete([_IDS, _IDS[:2]], max_tokens=4)
    expect(len(lists.choices) == 2, "two lists of ids do not give two choices")
    return "text, texts, ids, lists of ids"


async def completions_echo(subject: Subject) -> str:
    """`echo` puts the prompt before the text, to the letter."""
    prompt = "One, two, three,"
    reply = await subject.complete(prompt, echo=True, max_tokens=4)
    expect(reply.text.startswith(prompt), "the text does not begin with the prompt")
    expect(len(reply.text) > len(prompt), "nothing follows the prompt")
    return "the prompt comes back"


PROBES = named(
    completions_whole, completions_usage, completions_stream, completions_stream_usage, completions_prompts,
    completions_echo,
)  # fmt: skip
