"""Probes of the usage: counts that can be recomputed are recomputed."""

from __future__ import annotations

import time

from ocserve.audit.server import dig
from ocserve.audit.subject import SHORT, STORY, Subject, named
from ocserve.audit.verdict import Fault, Unproven, expect

_TEXTS = (
    "The lighthouse stands on a rock.",
    "naïve café, 日本語, Ελληνικά, עברית, 👩‍👩‍👧 and a tab\there",
    "x = {'a': [1, 2, 3]}\n\n\n    return x  # done",
    "    leading spaces and trailing ones    ",
)


async def usage_whole(subject: Subject) -> str:
    """A whole answer has prompt, completion and total tokens, and the sum is right."""
    reply = await subject.chat()
    prompt, completion = reply.used("prompt_tokens"), reply.used("completion_tokens")
    expect(prompt > 0, "usage.prompt_tokens is 0")
    expect(completion > 0, "usage.completion_tokens is 0")
    expect(reply.used("total_tokens") == prompt + completion, "total_tokens is not the sum")
    return f"{prompt} + {completion} tokens"


async def usage_exact_text(subject: Subject) -> str:
    """A raw prompt counts for as many tokens as the server's tokenizer makes of it."""
    counts = []
    for text in _TEXTS:
        expected = len(await subject.tokens(text, special=True))
        reply = await subject.complete(text, max_tokens=1)
        found = reply.used("prompt_tokens")
        expect(found == expected, f"a prompt of {expected} tokens was counted as {found}")
        counts.append(found)
    return f"prompts of {', '.join(map(str, counts))} tokens, each as /tokenize counts it"


async def usage_exact_chat(subject: Subject) -> str:
    """A conversation counts for as many tokens as its rendered form has."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another: ñ, 日本?"},
    ]
    rendered = await subject.rendered(messages)
    exact = {len(await subject.tokens(rendered, special=special)) for special in (False, True)}
    reply = await subject.chat(messages=messages, max_tokens=1)
    found = reply.used("prompt_tokens")
    expect(found in exact, f"a conversation of {min(exact)} tokens was counted as {found}")
    return f"{found} tokens, as /apply-template and /tokenize count them"


async def usage_completion(subject: Subject) -> str:
    """An answer that ends by its limit counts for exactly that many tokens, also over several choices."""
    seen = 0
    for limit in (1, 7, 23):
        reply = await subject.chat(max_tokens=limit)
        found = reply.used("completion_tokens")
        expect(found <= limit, f"max_tokens {limit} gave {found} tokens")
        if reply.finish == "length":
            expect(found == limit, f"an answer cut at {limit} tokens was counted as {found}")
            seen += 1
    if not seen:
        raise Unproven("no answer was long enough to end by its limit")
    return f"{seen} answers that ended by their limit were counted exactly"


async def usage_consistent(subject: Subject) -> str:
    """The same prompt always counts the same, and a longer one for more."""
    counts = [(await subject.chat(SHORT, max_tokens=1)).used("prompt_tokens") for _ in range(3)]
    expect(len(set(counts)) == 1, f"one prompt was counted as {sorted(set(counts))}")
    longer = (await subject.chat(f"{SHORT} {STORY}", max_tokens=1)).used("prompt_tokens")
    expect(longer > counts[0], "a longer prompt counted for no more")
    return f"{counts[0]} tokens three times, {longer} for a longer prompt"


async def usage_cache(subject: Subject) -> str:
    """Tokens of a prompt that were read from a cache are said, and are part of the prompt's."""
    # A text of its own for each audit, so that the first request computes it.
    text = f"Log {time.time_ns()}. " + " ".join(f"Ship number {i} is at sea." for i in range(60))
    cached: list[int] = []
    for _ in range(3):
        reply = await subject.chat(text, max_tokens=1)
        found = dig(reply.json, "usage", "prompt_tokens_details", "cached_tokens")
        if not isinstance(found, int):
            raise Fault("usage.prompt_tokens_details.cached_tokens is missing")
        expect(0 <= found <= reply.used("prompt_tokens"), "cached_tokens exceeds the prompt")
        cached.append(found)
    expect(cached[0] < reply.used("prompt_tokens") / 2, "a text that was never sent counts as cached")
    if not any(cached[1:]):
        raise Unproven("cached_tokens is reported, but a repeated prompt was not read from a cache")
    return f"{cached[0]} cached tokens at first, {max(cached)} of {reply.used('prompt_tokens')} when repeated"


async def usage_special_text(subject: Subject) -> str:
    """A control token's name in a message is text and counts as text, so that it cannot end the message."""
    plain = (await subject.chat("Say ab now.", max_tokens=1)).used("prompt_tokens")
    for name in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>"):
        ids = await subject.tokens(name, special=False)
        if len(ids) == 1:  # a control token of this model
            found = (await subject.chat(f"Say {name} now.", max_tokens=1)).used("prompt_tokens")
            expect(found > plain + 1, f"`{name}` in a message counts as one token: it is read as the control token")
            return f"`{name}` counts as text"
    raise Unproven("none of the usual control tokens is one of this model's")


PROBES = named(
    usage_whole, usage_exact_text, usage_exact_chat, usage_completion, usage_consistent, usage_cache,
    usage_special_text,
)  # fmt: skip
