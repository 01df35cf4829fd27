"""A language model that fits on a page: words over a small vocabulary, drawn with every sampling parameter.

Its distributions depend on the prompt and the last word, and it likes to repeat itself, so that penalties show.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

END, START = 0, 4096  # <|im_end|>, <|im_start|>
_WORD = re.compile(r" w(\d{3,4})(?!\d)")
_SPECIAL = {"<|im_end|>": END, "<|im_start|>": START}
_CANDIDATES = 30


def piece(token: int) -> bytes:
    """What a token says."""
    if token in (END, START):
        return b""
    return bytes([token - 1]) if token <= 256 else f" w{token}".encode()


def encode(text: str, *, special: bool = False) -> list[int]:
    """Words are tokens, all else is bytes; control tokens only if `special`."""
    if special:
        parts = re.split(r"(<\|im_end\|>|<\|im_start\|>)", text)
        return [token for part in parts for token in ([_SPECIAL[part]] if part in _SPECIAL else encode(part))]
    found, at = [], 0
    for match in _WORD.finditer(text):
        if 257 <= int(match[1]) < START:
            found += [byte + 1 for byte in text[at : match.start()].encode()]
            found.append(int(match[1]))
            at = match.end()
    return found + [byte + 1 for byte in text[at:].encode()]


def rendered(messages: Sequence[dict[str, Any]]) -> str:
    """The conversation as the model reads it."""
    turns = (f"<|im_start|>{each['role']}\n{content(each)}<|im_end|>\n" for each in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def content(message: dict[str, Any]) -> str:
    """A message's text, with its calls."""
    given = message.get("content") or ""
    parts = given if isinstance(given, str) else "".join(part.get("text", "") for part in given)
    return parts + "".join(str(call["function"]) for call in message.get("tool_calls") or [])


def prompt_tokens(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The conversation's tokens; what messages say is text."""
    found: list[int] = []
    for each in messages:
        found += [START, *encode(each["role"] + "\n"), *encode(content(each)), END, *encode("\n")]
    return [*found, START, *encode("assistant\n")]


@dataclass
class Step:
    """A drawn token with its log-probability and the best candidates."""

    token: int
    logprob: float
    best: list[tuple[int, float]] = field(default_factory=list)


class Generation:
    """One generation: call `step` for each token."""

    def __init__(self, prompt: Sequence[int], fields: dict[str, Any], index: int) -> None:
        self._prompt = zlib.crc32(repr(list(prompt)).encode())
        self._fields = fields
        self._made: list[int] = []
        seed = fields.get("seed")
        self._random = random.Random() if seed is None else random.Random(f"{seed}/{index}")

    def step(self) -> Step:
        logits = self._logits()
        top = max(logits.values())
        total = sum(math.exp(value - top) for value in logits.values())
        logprobs = {token: value - top - math.log(total) for token, value in logits.items()}
        token = self._draw(logits)
        self._made.append(token)
        best = sorted(logprobs.items(), key=lambda each: -each[1])[:20]
        return Step(token, logprobs[token], best)

    def _logits(self) -> dict[int, float]:
        last = self._made[-1] if self._made else 0
        source = random.Random(f"{self._prompt}/{last}")
        logits = {source.randrange(300, START): 6 - 0.15 * rank for rank in range(_CANDIDATES)}
        for token in self._made[-4:]:
            logits[token] = logits.get(token, 3.0) + 2.5
        given = self._fields
        for token, count in Counter(self._made).items():
            if token in logits:
                factor = given.get("repetition_penalty") or 1
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
                logits[token] -= count * (given.get("frequency_penalty") or 0) + (given.get("presence_penalty") or 0)
        for name, bias in (given.get("logit_bias") or {}).items():
            logits[int(name)] = logits.get(int(name), 0.0) + bias
        return logits

    def _draw(self, logits: dict[int, float]) -> int:
        given = self._fields
        temperature = 1.0 if given.get("temperature") is None else given["temperature"]
        ranked = sorted(logits.items(), key=lambda each: -each[1])
        if temperature == 0:
            return ranked[0][0]
        top = ranked[0][1]
        weights = [(token, math.exp((value - top) / temperature)) for token, value in ranked]
        total = sum(weight for _, weight in weights)
        kept = [(token, weight / total) for token, weight in weights][: given.get("top_k") or None]
        best = kept[0][1]
        kept = [each for each in kept if each[1] >= (given.get("min_p") or 0) * best]
        kept = [each for each in kept if each[1] >= (given.get("top_a") or 0) * best * best]
        mass, inside = 0.0, []
        for each in kept:
            inside.append(each)
            mass += each[1]
            if mass >= (given.get("top_p") or 1):
                break
        [(token, _)] = self._random.choices(inside, [weight for _, weight in inside])
        return token


def instance(schema: Any, source: random.Random, root: Any = None) -> Any:
    """A value that satisfies a schema of the audit's kind."""
    root = schema if root is None else root
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return instance(target, source, root)
    if "anyOf" in schema:
        return instance(source.choice(schema["anyOf"]), source, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return source.choice(schema["enum"])
    kind = schema["type"][0] if isinstance(schema["type"], list) else schema["type"]
    if kind == "object":
        return {name: instance(each, source, root) for name, each in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema["items"], source, root) for _ in range(schema.get("minItems", 1))]
    if kind == "string":
        return "AB-123" if "pattern" in schema else "x" * max(2, schema.get("minLength", 0))
    return {"integer": source.randrange(0, 99), "number": 1.5, "boolean": True, "null": None}[kind]
