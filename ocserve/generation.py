"""The words that all parts speak about one generation: request, events, usage, record.

Frozen msgspec structs, so that they are values in the front process and frames on the engine's wire. Nothing here knows
HTTP, a vendor, a key or a price.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ocserve.errors import ErrorInfo

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an assistant turn of the history made. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn. `content` is plain text; every string in it is untrusted and never becomes a control token."""

    role: Role
    content: str = ""
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """Messages for the model's chat template. A trailing assistant turn is continued, not answered."""

    messages: tuple[Message, ...]


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Raw text: the caller writes the scaffolding, so special-token text in it is parsed as special tokens."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Token ids, taken as they are after a bounds check against the vocabulary."""

    tokens: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn. Defaults leave the model's distribution as it is.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 are off; `seed` None draws a random one.
    Frequency and presence penalties count generated tokens only (OpenAI's definition); repetition_penalty is
    multiplicative and counts the prompt too. logit_bias maps token id to an additive bias.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}


class JsonConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="json"):
    """The answer is one JSON value. `schema` is JSON Schema as JSON text; None allows any object."""

    schema: str | None = None


Constraint = JsonConstraint


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation of one or more choices, free of any dialect.

    `max_tokens` is an upper bound on a choice's sampled tokens: a prompt that fits runs to the context's end with
    `length`. `choices` answers to the same prompt are generated independently of each other. `salt` separates tenants
    in every shared structure of the engine; `deadline_s` is wall-clock time from start.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    max_tokens: int
    choices: int = 1
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    deadline_s: float = 600.0
    salt: bytes = b""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts, exact.

    `completion_tokens` counts every token of the answer, the end-of-generation token included. `cached_tokens` is the
    part of the prompt that was not computed for this request because its KV cells existed. Drafted tokens that the
    model agreed with are `accepted_draft_tokens` (they are completion tokens too), the others `rejected_draft_tokens`.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The request holds a slot and its prompt is being computed; of `cached_tokens` it is known by now that they exist.

    A prompt whose beginning another request is computing may yet have more; `Finished` tells the final count.
    """

    prompt_tokens: int
    cached_tokens: int = 0


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """More text of one choice; `tokens` sampled tokens became visible with it (0 for held-back text)."""

    text: str
    tokens: int
    index: int = 0


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The choice is complete. `stop_sequence` is the stop string that matched, if one did."""

    reason: FinishReason
    usage: Usage
    stop_sequence: str | None = None
    index: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The generation ended in an error; no further event follows."""

    error: ErrorInfo
    usage: Usage = Usage()


GenerateEvent = Started | TextDelta | Finished | Failed


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one request did, made once when it ends; the log line and the limiter's settlement are views of it.

    Times are milliseconds. `queue_ms` is arrival to slot, `ttft_ms` arrival to first text; None where it did not
    get that far. Never holds content.
    """

    request_id: str
    route: str
    key_id: str
    model: str | None
    status: int
    stream: bool
    usage: Usage
    finish_reason: str | None
    error_code: str | None
    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float
