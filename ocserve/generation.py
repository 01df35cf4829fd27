"""The words that all parts speak about one generation: request, events, usage, record.

Frozen msgspec structs, so that they are values in the front process and frames on the engine's wire. Nothing here knows
HTTP, a vendor, a key or a price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from ocserve.errors import ErrorInfo

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "cancelled"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an assistant turn of the history made. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a message, as the bytes of its file. It stands before character `at` of the message's content.

    `where` is the field of the request that a refusal of it names. One that is still to be fetched has a `url` and no
    data.
    """

    data: bytes
    at: int
    where: str = "messages"
    url: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn. `content` is plain text; every string in it is untrusted and never becomes a control token.

    `reasoning` is what an assistant turn of the history thought before its content.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    images: tuple[Image, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def joined(run: Sequence[Message], gap: str = "\n\n") -> Message:
    """A run of turns as one, of the first's role and name, with `gap` between two that have content."""
    pieces: list[str] = []
    images: list[Image] = []
    length = 0
    for turn in run:
        if length and turn.content:
            pieces.append(gap)
            length += len(gap)
        images += (replace(image, at=image.at + length) for image in turn.images)
        pieces.append(turn.content)
        length += len(turn.content)
    return replace(
        run[0],
        content="".join(pieces),
        reasoning="".join(turn.reasoning for turn in run),
        images=tuple(images),
        tool_calls=tuple(call for turn in run for call in turn.tool_calls),
    )


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call. `parameters` is JSON Schema as JSON text; None means that it takes none.

    `strict` is the client's wish; arguments are held to the schema with and without it.
    """

    name: str
    description: str = ""
    parameters: str | None = None
    strict: bool = False


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the model is to think before it answers, as far as its template lets that be chosen; None is its default.

    `effort` is one of the words that clients use (minimal, low, medium, high, …), `max_tokens` bounds the thought.
    """

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = None


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="chat"):
    """Messages for the model's chat template. A trailing assistant turn is continued, not answered."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    reasoning: Reasoning = Reasoning()


class TextPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Raw text: the caller writes the scaffolding, so special-token text in it is parsed as special tokens."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Token ids, taken as they are after a bounds check against the vocabulary."""

    tokens: tuple[int, ...]


class FillPrompt(msgspec.Struct, frozen=True, kw_only=True, tag="fill"):
    """Fill in the middle: what belongs between `prefix` and `suffix`, by the vocabulary's own tokens for that.

    `files` are (name, text) of other files for orientation. All strings are untrusted.
    """

    prefix: str
    suffix: str
    files: tuple[tuple[str, str], ...] = ()


Prompt = ChatPrompt | TextPrompt | TokenPrompt | FillPrompt


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn. Defaults leave the model's distribution as it is.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 are off; `seed` None draws a random one.
    Frequency and presence penalties count generated tokens only (OpenAI's definition); repetition_penalty is
    multiplicative and counts the prompt too. logit_bias maps token id to an additive bias.

    The rarer ones as llama.cpp defines them, off by default: top_a keeps p >= top_a * p_max²; typical_p, top_n_sigma
    (standard deviations below the best logit); DRY penalises repeated sequences (`dry_window` tokens back, -1: all),
    XTC drops the best candidates; mirostat 1 or 2 replaces the truncating samplers; dynamic temperature ranges over
    temperature ± dynamic_range. `penalty_window` is how many tokens the penalties look back (None: all).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int | None = None
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    top_a: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    dynamic_range: float = 0.0
    dynamic_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1


class JsonConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="json"):
    """The answer is one JSON value. `schema` is JSON Schema as JSON text; None allows any object."""

    schema: str | None = None


class GrammarConstraint(msgspec.Struct, frozen=True, kw_only=True, tag="grammar"):
    """The answer is in the language of `text`."""

    text: str
    syntax: Literal["lark", "regex"]


Constraint = JsonConstraint | GrammarConstraint


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether tools of the prompt may or must be called. `names` narrows them (empty: all of them).

    Without `parallel` an answer has one call at most.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation of one or more choices, free of any dialect.

    `max_tokens` is an upper bound on a choice's sampled tokens: a prompt that fits runs to the context's end with
    `length`; 0 computes the prompt only. `choices` answers to the same prompt are generated independently of each
    other. `logprobs` asks for the log-probability of every token of the answer and of so many alternatives,
    `prompt_logprobs` the same for the prompt. `prediction` is text that much of the answer may repeat. `salt` separates
    tenants in every shared structure of the engine; `deadline_s` is wall-clock time from start.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    max_tokens: int
    choices: int = 1
    constraint: Constraint | None = None
    tool_choice: ToolChoice = ToolChoice()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prediction: str | None = None
    stop: tuple[str, ...] = ()
    deadline_s: float = 600.0
    salt: bytes = b""


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Vectors for texts or token lists, of an embedding model. Texts are content: they never become control tokens.

    `dimensions` keeps so many numbers of each vector; `normalise`: of length 1. `count_only`: nothing is computed, the
    answer has the tokens of each input and no vectors. `salt` as in `GenerateRequest`.
    """

    request_id: str
    model: str
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    dimensions: int | None = None
    normalise: bool = True
    count_only: bool = False
    deadline_s: float = 600.0
    salt: bytes = b""


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag="embedded", omit_defaults=True):
    """One vector for each input, as little-endian float32, and the tokens of each input. `cost` is as in `Usage`."""

    vectors: tuple[bytes, ...]
    tokens: tuple[int, ...]
    cost: int | None = None


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, tag="score"):
    """How well each document answers the query, by a reranking model. `count_only` and `salt` as in `EmbedRequest`."""

    request_id: str
    model: str
    query: str
    documents: tuple[str, ...]
    count_only: bool = False
    deadline_s: float = 600.0
    salt: bytes = b""


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored"):
    """One relevance for each document, in [0, 1], and the tokens computed for each. `cost` is as in `Usage`."""

    scores: tuple[float, ...]
    tokens: tuple[int, ...]
    cost: int | None = None


class EncodeRequest(msgspec.Struct, frozen=True, kw_only=True, tag="encode"):
    """What a prompt is in tokens, without computing anything. `plain`: text as content, not as scaffolding.

    `add_bos`: with the token that this model's prompts begin with, if it has one. `count_only`: nothing is wanted but
    how many tokens there are. `salt` as in `GenerateRequest`.
    """

    request_id: str
    model: str
    prompt: Prompt
    plain: bool = False
    add_bos: bool = True
    count_only: bool = False
    deadline_s: float = 600.0
    salt: bytes = b""


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """A prompt's number of tokens, their ids, the bytes of each (control tokens as the vocabulary spells them), and the
    whole as text.

    A chat prompt's text is what its template renders, that of token ids what their bytes spell. All but the count is
    empty where only that was asked for.
    """

    count: int
    tokens: tuple[int, ...] = ()
    pieces: tuple[bytes, ...] = ()
    text: str = ""


Question = EmbedRequest | ScoreRequest | EncodeRequest
Answer = Embedded | Scored | Encoded


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts, exact. `image_tokens` are part of the prompt's, `reasoning_tokens` of the completion's.

    `completion_tokens` counts every token of the answer, the end-of-generation token included. `cached_tokens` is the
    part of the prompt that was not computed for this request because its KV cells existed. Drafted tokens that the
    model agreed with are `accepted_draft_tokens` (they are completion tokens too), the others `rejected_draft_tokens`.
    `cost` is in picodollars (1e-12 US dollars), None until it is known and where nothing is charged.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    image_tokens: int = 0
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0
    cost: int | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The request holds a slot and its prompt is being computed; of `cached_tokens` it is known by now that they exist.

    A prompt whose beginning another request is computing may yet have more; `Finished` tells the final count.
    """

    prompt_tokens: int
    cached_tokens: int = 0


class TokenChance(msgspec.Struct, frozen=True, array_like=True):
    """A token, its bytes, and its natural log-probability before any sampler changed the distribution."""

    id: int
    piece: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The token that was chosen (or stands in the prompt) and its best alternatives, likeliest first.

    `chosen.logprob` of the prompt's first token is 0: nothing precedes it.
    """

    chosen: TokenChance
    top: tuple[TokenChance, ...] = ()


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True, tag="prompt_logprobs"):
    """Every token of the prompt; sent once, before the first text. `index` is that of the prompt's first choice."""

    tokens: tuple[TokenLogprob, ...]
    index: int = 0


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text", omit_defaults=True):
    """More text of one choice; `tokens` sampled tokens became visible with it (0 for held-back text).

    `logprobs` are those tokens', in order, if they were asked for.
    """

    text: str
    tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning", omit_defaults=True):
    """More of what one choice thinks before it answers; otherwise as `TextDelta`."""

    text: str
    tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, tag="tool_call", omit_defaults=True):
    """A tool call begins (`name` is given, once) or goes on; `arguments` concatenate to JSON text.

    `call` numbers the calls of a choice from 0. Ids are the dialects' to give.
    """

    call: int
    name: str | None = None
    arguments: str = ""
    tokens: int = 0
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


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


GenerateEvent = Started | PromptLogprobs | TextDelta | ReasoningDelta | ToolCallDelta | Finished | Failed


# Bounds of the times from one token of an answer to its next, in seconds.
GAP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one request did, made once when it ends; log line, metrics and the limiter's settlement are views of it.

    Times are milliseconds. `queue_ms` is arrival to slot, `ttft_ms` arrival to first text; None where it did not
    get that far. `limit` names what refused it. `token_gaps` counts the times between tokens, each by the first of
    `GAP_BOUNDS_S` that it does not exceed; together they are `token_gaps_s` seconds. `traceparent` is what its client
    says it is part of. Never holds content.
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
    limit: str | None = None
    token_gaps: tuple[int, ...] = ()
    token_gaps_s: float = 0.0
    traceparent: str | None = None
