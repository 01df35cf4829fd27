"""Probes of limits: parameters together, what is documented is what is enforced, and what does not fit is refused."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

from ocserve.audit.server import Reply, dig
from ocserve.audit.subject import LIST, Subject, named
from ocserve.audit.verdict import Fault, Refused, Unproven, clean, expect

_VALUES: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "stop": ["\x00never"],
    "seed": 7,
    "top_k": 20,
    "min_p": 0.02,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"1000": -100},
    "max_tokens": 6,
}
# OpenAI's and OpenRouter's ranges, for servers that publish none; a value beyond each end.
_CONVENTIONAL: dict[str, tuple[float, ...]] = {
    "temperature": (-0.1, 2.5),
    "top_p": (-0.1, 1.5),
    "presence_penalty": (-2.5, 2.5),
    "frequency_penalty": (-2.5, 2.5),
}
_REPEATS = 5  # in which a seed has to draw an answer again: close calls of a quantised model may tip
_WRONG: dict[str, Any] = {
    "temperature": "hot",
    "top_p": [],
    "max_tokens": -1,
    "stop": 5,
    "seed": "x",
    "stream": "yes",
    "messages": "hello",
    "logit_bias": [1],
}


async def _accepted(subject: Subject) -> dict[str, Any]:
    """The parameters of the table that the server takes at all."""
    found = {}
    for name, value in _VALUES.items():
        try:
            await subject.chat(LIST, **{"max_tokens": 1, name: value})
        except Refused:
            continue
        found[name] = value
    return found


async def parameters_together(subject: Subject) -> str:
    """All sampling parameters that are taken alone are taken in pairs and all at once, and still hold."""
    taken = await _accepted(subject)
    required = {"temperature", "top_p", "stop", "seed", "max_tokens"}
    expect(required <= taken.keys(), f"refused alone: {', '.join(sorted(required - taken.keys()))}")
    for one, other in combinations(taken, 2):
        reply = await subject.chat(LIST, **{"max_tokens": 2, one: taken[one], other: taken[other]})
        expect(reply.used("completion_tokens") <= 6, f"max_tokens does not hold with {one} and {other}")
    texts: set[str] = set()
    for _ in range(_REPEATS):
        reply = await subject.chat(LIST, **taken)
        expect(reply.used("completion_tokens") <= 6, "max_tokens does not hold with all the others")
        if reply.text in texts:
            break
        texts.add(reply.text)
    else:
        raise Fault("the seed does not hold with all the others")
    return f"{len(taken)} parameters: {len(taken) * (len(taken) - 1) // 2} pairs, and all at once"


async def _documented(subject: Subject) -> dict[str, Any]:
    """The chat request's properties in the server's OpenAPI document. Raises `Unproven` without one."""
    document = await subject.document("/openapi.json")
    paths = dig(document, "paths") or {}
    path = next((name for name in paths if name.endswith("/chat/completions")), None)
    schema = dig(paths, path or "", "post", "requestBody", "content", "application/json", "schema")
    for _ in range(3):
        if isinstance(reference := dig(schema, "$ref"), str):
            schema = dig(document, *reference.removeprefix("#/").split("/"))
    properties = dig(schema, "properties")
    if not isinstance(properties, dict):
        raise Unproven("the server publishes no OpenAPI document with the chat request's parameters")
    return properties


def _bounds(described: Any) -> dict[str, float]:
    """The numeric bounds of a property, also inside a union with null."""
    kinds = [described, *(dig(described, "anyOf") or []), *(dig(described, "oneOf") or [])]
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    for kind in kinds:
        types = dig(kind, "type")
        if any(name in ("number", "integer") for name in (types if isinstance(types, list) else [types])):
            return {
                name: value
                for name in names
                if isinstance(value := dig(kind, name), int | float) and not isinstance(value, bool)
            }
    return {}


def _beyond(bounds: dict[str, float]) -> list[float]:
    """A value past each bound, or on one that is excluded."""
    found = []
    for name, value in bounds.items():
        step = 0 if name.startswith("exclusive") else 1
        found.append(value - step if name.endswith("inimum") else value + step)
    return [int(value) if float(value).is_integer() else value for value in found]


def _refusal(reply: Reply, name: str, what: str) -> None:
    expect(reply.status in (400, 422), f"{what} was answered with status {reply.status}")
    param = reply.error.get("param")
    message = str(reply.error.get("message", ""))
    expect(param == name or name in message, f"the refusal of {what} does not name {name}")


async def ranges_enforced(subject: Subject) -> str:
    """Every documented bound holds: what lies beyond is refused by name."""
    try:
        described = {name: _bounds(each) for name, each in (await _documented(subject)).items()}
        source = "the OpenAPI document"
        tries = {name: _beyond(bounds) for name, bounds in described.items() if bounds}
    except Unproven:
        source, tries = "OpenAI's ranges", {name: list(values) for name, values in _CONVENTIONAL.items()}
    count = 0
    for name, values in tries.items():
        for value in values:
            reply = await subject.refused(LIST, **{"max_tokens": 1, name: value})
            _refusal(reply, name, f"{name} {value:g}")
            count += 1
    expect(count, "no bound is documented")
    return f"{count} values beyond the bounds of {len(tries)} parameters ({source}) were refused by name"


async def ranges_documented(subject: Subject) -> str:
    """Each parameter's range is published, in the OpenAPI document or the listing."""
    properties = await _documented(subject)
    missing = [name for name in ("temperature", "top_p", "max_tokens") if not _bounds(properties.get(name))]
    expect(not missing, f"no range is documented for {', '.join(missing)}")
    return f"{sum(bool(_bounds(each)) for each in properties.values())} parameters with a range in /openapi.json"


async def defaults_documented(subject: Subject) -> str:
    """The values that hold where a request is silent are published."""
    listed = dig(subject.entry, "defaults") or dig(subject.entry, "default_parameters")
    if isinstance(listed, dict) and "temperature" in listed:
        return f"{len(listed)} defaults in the model list"
    properties = await _documented(subject)
    found = [name for name, each in properties.items() if dig(each, "default") is not None]
    expect("temperature" in found, "no default is documented for temperature")
    return f"{len(found)} defaults in /openapi.json"


async def wrong_types(subject: Subject) -> str:
    """A parameter of the wrong type is a 400 that names it."""
    for name, value in _WRONG.items():
        _refusal(await subject.refused(LIST, **{name: value}), name, f"a wrong `{name}`")
    return f"{len(_WRONG)} parameters of the wrong type were refused by name"


async def output_limit(subject: Subject) -> str:
    """The listed largest answer is accepted, and one token more is refused rather than cut."""
    most = subject.max_output_tokens
    if most is None:
        raise Fault("the listing has no largest answer")
    await subject.chat_stream(LIST, max_tokens=most, leave_after=2)
    _refusal(await subject.refused(LIST, max_tokens=most + 1), "max_tokens", f"max_tokens {most + 1}")
    return f"{most} accepted, {most + 1} refused"


async def _words_for(subject: Subject, tokens: int) -> str:
    """A text of at most `tokens` tokens of a chat prompt, and close to it."""
    few, many = 20, 220
    counts = [(await subject.chat(_words(size), max_tokens=1)).used("prompt_tokens") for size in (few, many)]
    each = (counts[1] - counts[0]) / (many - few)
    expect(each > 0, "usage.prompt_tokens does not grow with the prompt")
    return _words(int((tokens - counts[0]) / each) + few)


def _words(count: int) -> str:
    return " ".join(("sea", "ship", "rock", "wave", "light")[i % 5] for i in range(count))


async def context_near(subject: Subject) -> str:
    """A prompt that nearly fills the context is taken whole."""
    context = subject.context_length
    if context is None:
        raise Fault("the listing has no context length")
    if subject.quick:
        raise Unproven("left out by --quick")
    text = await _words_for(subject, context - max(32, context // 100))
    reply = await subject.chat_stream(text, max_tokens=8)  # which says that it lives while a slow machine reads
    used = reply.used("prompt_tokens")
    expect(used > 0.9 * context, f"a prompt made for {context} tokens was counted as {used}: it was cut")
    expect(used + reply.used("completion_tokens") <= context, "prompt and answer exceed the listed context")
    return f"a prompt of {used} tokens in a context of {context}, {reply.took_s:.1f} s"


async def context_over(subject: Subject) -> str:
    """A prompt larger than the context is a 400 with both counts, never shortened."""
    context = subject.context_length
    if context is None:
        raise Fault("the listing has no context length")
    text = await _words_for(subject, context + max(64, context // 20))
    reply = await subject.refused(text, max_tokens=8)
    expect(reply.status in (400, 413, 422), f"a prompt beyond the context was answered with status {reply.status}")
    message = str(reply.error.get("message", ""))
    expect(re.search(r"\d{3,}", message), "the refusal does not say the limit")
    return f"status {reply.status}, code {clean(reply.error.get('code'), 60)}"


PROBES = named(
    parameters_together, ranges_enforced, ranges_documented, defaults_documented, wrong_types, output_limit,
    context_near, context_over,
)  # fmt: skip
