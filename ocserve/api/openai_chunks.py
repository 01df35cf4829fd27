"""The answer side of OpenAI's chat completions: chunks and whole messages."""

from __future__ import annotations

from collections.abc import Sequence

from ocserve.api.dialect import Frame, Reply
from ocserve.api.openai_wire import Answer, ReplyEncoder, choice, token_text
from ocserve.generation import (
    Finished,
    GenerateEvent,
    ReasoningDelta,
    TextDelta,
    TokenChance,
    TokenLogprob,
    ToolCallDelta,
)


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, object]]:
    """Tokens with their chances as chat completions list them."""
    return [{**_chance(token.chosen), "top_logprobs": [_chance(chance) for chance in token.top]} for token in tokens]


def _chance(chance: TokenChance) -> dict[str, object]:
    return {"token": token_text(chance.piece), "logprob": chance.logprob, "bytes": list(chance.piece)}


class ChatEncoder(ReplyEncoder):
    """A chat reply. SDKs concatenate whatever is repeated: the role, a call's id and its name are said once.

    `calls`: the answer may call tools. Then nothing is said before it is known whether the message begins with a call,
    which is announced together with the role. `logprobs`: they were asked for.
    """

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(
        self,
        reply: Reply,
        *,
        fingerprint: str | None = None,
        service_tier: str | None = None,
        calls: bool = False,
        logprobs: bool = False,
    ) -> None:
        super().__init__(reply, fingerprint=fingerprint, service_tier=service_tier)
        self._calls = calls
        self._logprobs = logprobs
        self._announced = 0  # choices that have said their role; lower indices come first
        self._thinking: set[int] = set()  # choices that have begun to show their reasoning

    def open(self) -> Sequence[Frame]:
        """The chunks that carry the role, one for each choice."""
        return () if self._calls else self._announce(self._reply.choices)

    def _announce(self, up_to: int) -> list[Frame]:
        """The role of every choice below `up_to` that has not said it."""
        first = range(self._announced, up_to)
        self._announced = max(self._announced, up_to)
        return [self._delta(index, {"role": "assistant", "content": "", "refusal": None}) for index in first]

    def _said(self, event: GenerateEvent) -> Sequence[Frame]:
        match event:
            case TextDelta(text=text, index=index, logprobs=logprobs) if text or logprobs:
                return [*self._announce(index + 1), self._delta(index, {"content": text}, logprobs)]
            case ReasoningDelta(text=text, index=index) if text and self._reply.show_reasoning:
                return [*self._announce(index + 1), self._delta(index, self._thought(index, text))]
            case ToolCallDelta():
                return self._call(event)
            case _:
                return ()

    def _thought(self, index: int, text: str) -> dict[str, object]:
        first = index not in self._thinking
        self._thinking.add(index)
        return _reasoning(text, first=first)

    def _call(self, event: ToolCallDelta) -> list[Frame]:
        frames = self._announce(event.index)
        logprobs = event.logprobs
        if event.name is not None:
            call = {"index": event.call, **self._tool_call(event.index, event.call, event.name, "")}
            delta: dict[str, object] = {"tool_calls": [call]}
            if self._announced <= event.index:
                self._announced = event.index + 1
                delta = {"role": "assistant", "content": None, **delta, "refusal": None}
            frames.append(self._delta(event.index, delta, () if event.arguments else logprobs))
        if event.arguments or (event.name is None and logprobs):
            part = {"index": event.call, "function": {"arguments": event.arguments}}
            frames.append(self._delta(event.index, {"tool_calls": [part]}, logprobs))
        return frames

    def _tool_call(self, index: int, call: int, name: str, arguments: str) -> dict[str, object]:
        return {
            "id": f"call_{self._reply.call_id(index, call)}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _ended(self, finished: Finished) -> Sequence[Frame]:
        last = self._chunk({"delta": {}}, finished.index, reason=finished.reason)
        return [*self._announce(finished.index + 1), last]

    def _delta(self, index: int, delta: dict[str, object], logprobs: Sequence[TokenLogprob] = ()) -> Frame:
        return self._chunk({"delta": delta}, index, logprobs=self._listed(logprobs))

    def _listed(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
        return {"content": token_logprobs(logprobs), "refusal": None} if self._logprobs else None

    def _whole(self, found: list[Answer]) -> list[dict[str, object]]:
        return [
            choice(
                index,
                {"message": self._message(index, answer)},
                answer.finished.reason,
                self._listed(answer.logprobs),
            )
            for index, answer in enumerate(found)
        ]

    def _message(self, index: int, answer: Answer) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                self._tool_call(index, number, call.name, call.arguments) for number, call in enumerate(answer.calls)
            ]
        if answer.reasoning and self._reply.show_reasoning:
            message |= _reasoning(answer.reasoning, first=True)
        return message


def _reasoning(text: str, *, first: bool) -> dict[str, object]:
    """A thought under the names that clients look for. Entries of a list need an index to be put together again, and
    what is said of their kind must be said once."""
    detail: dict[str, object] = {"type": "reasoning.text", "text": text, "index": 0}
    if first:
        detail["format"] = "unknown"
    return {"reasoning_content": text, "reasoning": text, "reasoning_details": [detail]}
