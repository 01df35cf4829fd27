"""What leaves on Google's surface: error and usage objects, finish reasons, the records of a reply and its whole."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.api import blocks, charge
from ocserve.api.blocks import Block
from ocserve.api.dialect import Frame, Framing, Reply
from ocserve.api.json_body import dumps as dumps
from ocserve.errors import ErrorInfo
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

# There is no word for a tool call: the call itself says it. A cancelled generation has no reader left.
FINISH_REASONS: dict[FinishReason, str] = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "content_filter": "SAFETY",
    "cancelled": "STOP",
}
_STATUSES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_REASONS = {"invalid_api_key": "API_KEY_INVALID"}
_TYPE = "type.googleapis.com/google.rpc"

# The vendor's client parses whatever is not `data: …` and not an empty line, comments too; so silence is an empty line.
EVENTS = Framing(keep_alive=b"\n")
ARRAY = Framing(
    media_type="application/json",
    opening=b"[",
    prefix=b"",
    suffix=b"",
    separator=b",\r\n",
    closing=b"]",
    keep_alive=b"\n",
)

Part = dict[str, object]


def error_body(info: ErrorInfo) -> bytes:
    """The error object; what is machine-readable beside the status stands in `details`."""
    message = info.message
    if info.prompt_tokens is not None and info.context_length is not None:  # the words that clients look for
        message = (
            f"The input token count ({info.prompt_tokens}) exceeds the maximum number of tokens allowed "
            f"({info.context_length - 1})."
        )
    reason = _REASONS.get(info.code, info.code.upper())
    about: dict[str, object] = {"@type": f"{_TYPE}.ErrorInfo", "reason": reason, "domain": "ocserve"}
    if info.category is not None:
        about["metadata"] = {"category": info.category}
    details = [about]
    if info.param is not None:
        violation = {"field": info.param, "description": message}
        details.append({"@type": f"{_TYPE}.BadRequest", "fieldViolations": [violation]})
    if info.retry_after_s is not None:
        details.append({"@type": f"{_TYPE}.RetryInfo", "retryDelay": f"{info.retry_after_s:.3f}s"})
    status = _STATUSES.get(info.status, "INVALID_ARGUMENT" if info.status < 500 else "INTERNAL")
    return dumps({"error": {"code": info.status, "message": message, "status": status, "details": details}})


def usage(counts: Usage) -> dict[str, object]:
    """The usage object; thoughts are counted apart from the candidates' tokens."""
    modalities = {"TEXT": counts.prompt_tokens - counts.image_tokens, "IMAGE": counts.image_tokens}
    return {
        "promptTokenCount": counts.prompt_tokens,
        "candidatesTokenCount": counts.completion_tokens - counts.reasoning_tokens,
        "thoughtsTokenCount": counts.reasoning_tokens,
        "totalTokenCount": counts.total_tokens,
        "cachedContentTokenCount": counts.cached_tokens,
        "promptTokensDetails": [
            {"modality": name, "tokenCount": tokens} for name, tokens in modalities.items() if tokens
        ],
        **charge.cost(counts.cost),
    }


class _Candidate:
    """What one candidate has not said yet: a call is said when it is whole, log-probabilities with their text."""

    def __init__(self) -> None:
        self.calls = 0
        self.call: Block | None = None
        self.logprobs: list[TokenLogprob] = []

    def taken(self) -> list[TokenLogprob]:
        """The log-probabilities so far; they are the caller's now."""
        logprobs, self.logprobs = self.logprobs, []
        return logprobs


class ContentEncoder:
    """One reply as records, each a response with parts of one candidate, or as one response."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._candidates = [_Candidate() for _ in range(reply.choices)]
        self._unfinished = reply.choices
        self._last: dict[str, object] | None = None

    def open(self) -> Sequence[Frame]:
        """Nothing: the first record has text."""
        return ()

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """What a stream says about `event`. The last candidate's end waits for the usage."""
        match event:
            case TextDelta() | ReasoningDelta() | ToolCallDelta():
                parts = self._parts(event)
                return (self._record(event.index, parts),) if parts else ()
            case Finished(reason=reason, index=index):
                # Clients drop a call that has an empty text beside it.
                parts = self._whole_call(index) or [{"text": ""}]
                candidate = self._candidate(index, parts, self._candidates[index].taken(), FINISH_REASONS[reason])
                self._unfinished -= 1
                if not self._unfinished:
                    self._last = candidate
                    return ()
                return (Frame(dumps(self._response([candidate]))),)
            case Failed(error=error):
                return (Frame(error_body(error)),)
            case _:
                return ()

    def close(self, counts: Usage) -> Sequence[Frame]:
        """The end of the last candidate, with the usage of all."""
        assert self._last is not None
        return (Frame(dumps(self._response([self._last], counts))),)

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole response, its candidates in the order of their indices."""
        own: list[list[GenerateEvent]] = [[] for _ in self._candidates]
        for event in events:
            if isinstance(event, TextDelta | ReasoningDelta | ToolCallDelta | Finished):
                own[event.index].append(event)
        candidates = [self._whole(index, said) for index, said in enumerate(own)]
        return dumps(self._response(candidates, counts))

    def _whole(self, index: int, events: list[GenerateEvent]) -> dict[str, object]:
        last = events[-1]
        assert isinstance(last, Finished)
        state = self._candidates[index]
        parts: list[Part] = []
        for block in blocks.blocks(events):
            if block.kind == "call":
                parts += self._call(index, block)
            elif block.kind == "text":
                parts.append({"text": block.text})
            elif self._reply.show_reasoning:
                parts.append({"text": block.text, "thought": True})
        for event in events:
            if isinstance(event, TextDelta | ReasoningDelta | ToolCallDelta):
                state.logprobs += self._logprobs(event)
        logprobs = state.taken()
        found = self._candidate(index, parts or [{"text": ""}], logprobs, FINISH_REASONS[last.reason])
        if logprobs:
            found["avgLogprobs"] = sum(token.chosen.logprob for token in logprobs) / len(logprobs)
        return found

    def _logprobs(self, event: TextDelta | ReasoningDelta | ToolCallDelta) -> Sequence[TokenLogprob]:
        """Those of `event` that may be seen: a hidden thought's tokens are hidden too."""
        return () if isinstance(event, ReasoningDelta) and not self._reply.show_reasoning else event.logprobs

    def _parts(self, event: TextDelta | ReasoningDelta | ToolCallDelta) -> list[Part]:
        """What can be said now that `event` has come."""
        state = self._candidates[event.index]
        state.logprobs += self._logprobs(event)
        match event:
            case ToolCallDelta(name=None, arguments=piece):
                assert state.call is not None
                state.call.pieces.append(piece)
                return []
            case ToolCallDelta(name=str(name), arguments=piece):
                parts = self._whole_call(event.index)
                state.call = Block("call", name, [piece])
                return parts
            case TextDelta(text=text) if text:
                return [*self._whole_call(event.index), {"text": text}]
            case ReasoningDelta(text=text) if text and self._reply.show_reasoning:
                return [*self._whole_call(event.index), {"text": text, "thought": True}]
            case _:
                return []

    def _whole_call(self, index: int) -> list[Part]:
        """The call that is waiting, if one is: no more of it comes."""
        state = self._candidates[index]
        call, state.call = state.call, None
        return [] if call is None else self._call(index, call)

    def _call(self, index: int, block: Block) -> list[Part]:
        if (arguments := block.arguments) is None:  # one that the limit cut off must not be run
            return []
        state = self._candidates[index]
        state.calls += 1
        name = f"call_{self._reply.call_id(index, state.calls - 1)}"
        return [{"functionCall": {"id": name, "name": block.name, "args": arguments}}]

    def _record(self, index: int, parts: list[Part]) -> Frame:
        return Frame(dumps(self._response([self._candidate(index, parts, self._candidates[index].taken(), None)])))

    def _candidate(
        self, index: int, parts: list[Part], logprobs: list[TokenLogprob], reason: str | None
    ) -> dict[str, object]:
        found: dict[str, object] = {"content": {"role": "model", "parts": parts}, "index": index}
        if reason is not None:
            found["finishReason"] = reason
        if logprobs:
            found["logprobsResult"] = _logprobs(logprobs)
        return found

    def _response(self, candidates: list[dict[str, object]], counts: Usage | None = None) -> dict[str, object]:
        spent = {} if counts is None else {"usageMetadata": usage(counts)}
        head = {"modelVersion": self._reply.model, "responseId": self._reply.id}
        return {"candidates": candidates, **spent, **head}


def _logprobs(tokens: list[TokenLogprob]) -> dict[str, object]:
    found: dict[str, object] = {"chosenCandidates": [_chance(token.chosen) for token in tokens]}
    if any(token.top for token in tokens):
        found["topCandidates"] = [{"candidates": [_chance(chance) for chance in token.top]} for token in tokens]
    return found


def _chance(chance: TokenChance) -> dict[str, object]:
    token = chance.piece.decode("utf-8", "replace")
    return {"token": token, "tokenId": chance.id, "logProbability": chance.logprob}
