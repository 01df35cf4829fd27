"""Every surface that generates: its stream put together as a client does it, and its whole answer, in one form."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ocserve.api import anthropic, google, google_wire, ollama_chat, openai_chunks, openai_texts
from ocserve.api.dialect import Encoder, Frame, Reply
from ocserve.generation import Finished, GenerateEvent
from tests.api.test_openai_responses import dialect as responses_dialect
from tests.api.test_openai_responses import models as responses_models


@dataclass
class Shown:
    """What a client gets to see: thoughts, words and calls (name, arguments), in the order of their beginnings.

    `reason` is why the answer ended in the surface's own words, `tokens` the bytes of those whose log-probabilities
    were told, None where a surface has none.
    """

    parts: list[tuple[str, str, Any]] = field(default_factory=list)
    reason: object = None
    tokens: list[bytes] | None = None

    def add(self, kind: str, text: str) -> None:
        """More text of one kind."""
        if self.parts and self.parts[-1][0] == kind:
            text = self.parts.pop()[1] + text
        if text:
            self.parts.append((kind, text, None))

    def call(self, name: str, arguments: Any) -> None:
        """A call; its arguments as JSON text or as what that says."""
        self.parts.append(("call", name, json.loads(arguments) if isinstance(arguments, str) else arguments))

    def told(self, tokens: Iterable[dict[str, Any]] | None) -> None:
        """Tokens as OpenAI's and Ollama's surfaces list them."""
        if tokens is not None:
            self.tokens = [*(self.tokens or []), *(bytes(token["bytes"]) for token in tokens)]

    def all(self, kind: str) -> Any:
        """All text of a kind, or all calls."""
        own = [part for part in self.parts if part[0] == kind]
        return [(name, arguments) for _, name, arguments in own] if kind == "call" else "".join(t for _, t, _ in own)


class Surface(ABC):
    """One reply on one surface. `ordered`: it keeps the order of thoughts, words and calls."""

    ordered = True

    def __init__(self) -> None:
        self.reply = Reply(id="cafe", model="tiny", created=1, include_usage=True)

    @abstractmethod
    def encoder(self) -> Encoder:
        """A fresh one."""

    @abstractmethod
    def streamed(self, records: list[Any]) -> Shown:
        """What the records of a stream say."""

    @abstractmethod
    def whole(self, body: Any) -> Shown:
        """What a whole answer says."""

    def both(self, events: Sequence[GenerateEvent]) -> tuple[Shown, Shown]:
        """What these events say as a stream and as a whole."""
        last = events[-1]
        assert isinstance(last, Finished)
        encoder = self.encoder()
        frames: list[Frame] = [*encoder.open()]
        for event in events:
            frames += encoder.event(event)
        frames += encoder.close(last.usage)
        records = [json.loads(frame.data) for frame in frames if frame.data != b"[DONE]"]
        return self.streamed(records), self.whole(json.loads(self.encoder().complete(events, last.usage)))


class Chat(Surface):
    """OpenAI's chat completions."""

    ordered = False

    def encoder(self) -> Encoder:
        return openai_chunks.ChatEncoder(self.reply, calls=True, logprobs=True)

    def streamed(self, records: list[Any]) -> Shown:
        shown = Shown(tokens=[])
        calls: dict[int, dict[str, str]] = {}
        for record in records:
            for choice in record["choices"]:
                delta = choice["delta"]
                shown.add("thought", delta.get("reasoning_content") or "")
                shown.add("words", delta.get("content") or "")
                for part in delta.get("tool_calls", ()):
                    function = part["function"]
                    call = calls.setdefault(part["index"], {"name": function.get("name"), "arguments": ""})
                    call["arguments"] += function["arguments"]
                shown.told((choice["logprobs"] or {}).get("content"))
                shown.reason = choice["finish_reason"] or shown.reason
        for call in calls.values():
            shown.call(**call)
        return shown

    def whole(self, body: Any) -> Shown:
        [choice] = body["choices"]
        shown = Shown(reason=choice["finish_reason"])
        message = choice["message"]
        shown.add("thought", message.get("reasoning_content") or "")
        shown.add("words", message["content"] or "")
        for call in message.get("tool_calls", ()):
            shown.call(call["function"]["name"], call["function"]["arguments"])
        shown.told(choice["logprobs"]["content"])
        return shown


class Completions(Surface):
    """OpenAI's text completions."""

    def encoder(self) -> Encoder:
        return openai_texts.CompletionEncoder(self.reply, logprobs=True)

    def streamed(self, records: list[Any]) -> Shown:
        shown = Shown(tokens=[])
        for record in records:
            for choice in record["choices"]:
                shown.add("words", choice["text"])
                shown.reason = choice["finish_reason"] or shown.reason
        return shown

    def whole(self, body: Any) -> Shown:
        [choice] = body["choices"]
        shown = Shown(reason=choice["finish_reason"], tokens=[])
        shown.add("words", choice["text"])
        return shown


class Responses(Surface):
    """OpenAI's Responses."""

    def encoder(self) -> Encoder:
        dialect = responses_dialect()
        dialect.parse(b'{"model": "tiny", "input": "x"}', responses_models, refuse_unknown=True)
        return dialect.encoder(self.reply)

    def streamed(self, records: list[Any]) -> Shown:
        shown = Shown(tokens=[])
        for record in records:
            match record["type"]:
                case "response.output_text.delta":
                    shown.add("words", record["delta"])
                    shown.told(record["logprobs"])
                case "response.reasoning_text.delta":
                    shown.add("thought", record["delta"])
                case "response.output_item.added" if record["item"]["type"] == "function_call":
                    shown.parts.append(("call", record["item"]["name"], ""))
                case "response.function_call_arguments.delta":
                    kind, name, arguments = shown.parts.pop()
                    shown.parts.append((kind, name, arguments + record["delta"]))
        shown.parts = [(k, t, json.loads(a) if k == "call" else a) for k, t, a in shown.parts]
        shown.reason = records[-1]["response"]["incomplete_details"]
        assert self.whole(records[-1]["response"]) == shown
        return shown

    def whole(self, body: Any) -> Shown:
        shown = Shown(reason=body["incomplete_details"], tokens=[])
        for item in body["output"]:
            match item["type"]:
                case "message":
                    shown.add("words", item["content"][0]["text"])
                    shown.told(item["content"][0]["logprobs"])
                case "reasoning":
                    shown.add("thought", item["content"][0]["text"])
                case _:
                    shown.call(item["name"], item["arguments"])
        return shown


class Anthropic(Surface):
    """Anthropic's Messages."""

    def encoder(self) -> Encoder:
        return anthropic.encoder(self.reply)

    def streamed(self, records: list[Any]) -> Shown:
        blocks: dict[int, dict[str, Any]] = {}
        reason: object = None
        for record in records:
            match record:
                case {"type": "content_block_start", "index": index, "content_block": block}:
                    assert index == len(blocks)
                    blocks[index] = {**block, "json": ""}
                case {"type": "content_block_delta", "index": index, "delta": delta}:
                    assert index == len(blocks) - 1
                    for name, into in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
                        if name in delta:
                            blocks[index][into] += delta[name]
                case {"type": "message_delta", "delta": delta}:
                    reason = delta
        for block in blocks.values():
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["json"])
        return self._blocks(blocks.values(), reason)

    def whole(self, body: Any) -> Shown:
        return self._blocks(body["content"], {name: body[name] for name in ("stop_reason", "stop_sequence")})

    def _blocks(self, blocks: Iterable[dict[str, Any]], reason: object) -> Shown:
        shown = Shown(reason=reason)
        for block in blocks:
            match block["type"]:
                case "text":
                    shown.add("words", block["text"])
                case "thinking":
                    shown.add("thought", block["thinking"])
                case _:
                    shown.call(block["name"], block["input"])
        return shown


class Google(Surface):
    """Google's generateContent."""

    def encoder(self) -> Encoder:
        return google.GenerateContent("tiny", google_wire.EVENTS).encoder(self.reply)

    def streamed(self, records: list[Any]) -> Shown:
        shown = Shown(tokens=None)
        for record in records:
            [candidate] = record["candidates"]
            for part in candidate["content"]["parts"]:
                if "functionCall" in part:
                    shown.call(part["functionCall"]["name"], part["functionCall"]["args"])
                else:
                    shown.add("thought" if part.get("thought") else "words", part["text"])
            shown.reason = candidate.get("finishReason", shown.reason)
        return shown

    def whole(self, body: Any) -> Shown:
        return self.streamed([body])


class Ollama(Surface):
    """Ollama's chat."""

    ordered = False

    def encoder(self) -> Encoder:
        return ollama_chat.encoder(self.reply)

    def streamed(self, records: list[Any]) -> Shown:
        shown = Shown(tokens=[])
        for record in records:
            message = record["message"]
            shown.add("thought", message.get("thinking", ""))
            shown.add("words", message["content"])
            for call in message.get("tool_calls", ()):
                shown.call(call["function"]["name"], call["function"]["arguments"])
            shown.told(record.get("logprobs"))
            shown.reason = record.get("done_reason")
        return shown

    def whole(self, body: Any) -> Shown:
        return self.streamed([body])


TEXTS: tuple[Surface, ...] = (Chat(), Completions(), Responses(), Anthropic(), Google(), Ollama())
CHATS = tuple(surface for surface in TEXTS if not isinstance(surface, Completions))
