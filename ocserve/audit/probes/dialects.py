"""Probes of the other interfaces: Anthropic's, Google's, OpenAI's responses, embeddings, and OpenRouter's feed."""

from __future__ import annotations

import base64
import re
import struct
from typing import Any
from urllib.parse import quote

import msgspec

from ocserve.audit.server import Reply, dig
from ocserve.audit.subject import STORY, Subject, named
from ocserve.audit.verdict import Fault, Unproven, clean, expect

_ANTHROPIC = {"anthropic-version": "2023-06-01"}
_ANTHROPIC_STOPS = ("end_turn", "max_tokens", "stop_sequence")
_GOOGLE_STOPS = ("STOP", "MAX_TOKENS")
_FEED_KEYS = {
    "schema_version", "id", "name", "input_modalities", "output_modalities", "hugging_face_id", "created",
    "quantization", "tokenizer", "description", "pricing", "capacity", "passthrough_parameters", "deprecation_date",
    "is_ready", "is_free", "service_tier", "discount_to_user", "openrouter", "datacenters", "deployment_region",
}  # fmt: skip
_FEED_PATHS = ("/openrouter/models", "/v1/openrouter/models", "/api/openrouter/models")
_PRICE = re.compile(r"\d+(\.\d+)?")


def _events(reply: Reply) -> list[tuple[str, Any]]:
    """(event name, data) of an event stream that was read whole."""
    found = []
    for block in reply.body.replace(b"\r\n", b"\n").split(b"\n\n"):
        name, data = "", b""
        for line in block.split(b"\n"):
            if line.startswith(b"event:"):
                name = line[6:].strip().decode(errors="replace")
            elif line.startswith(b"data:"):
                data += line[5:].strip()
        if data and data != b"[DONE]":
            try:
                found.append((name, msgspec.json.decode(data)))
            except msgspec.DecodeError:
                raise Fault(f"an event of {reply.what} is not JSON") from None
    return found


async def _anthropic(subject: Subject, path: str, **fields: Any) -> Reply:
    given = {"model": subject.model, "messages": [{"role": "user", "content": STORY}], **fields}
    key = {"x-api-key": subject.server.key} if subject.server.key else {}
    return (await subject.server.send("POST", path, given, headers={**_ANTHROPIC, **key})).ok()


async def anthropic_messages(subject: Subject) -> str:
    """Anthropic's messages are answered, with usage and a stop reason."""
    reply = await _anthropic(subject, "/messages", max_tokens=16)
    body = reply.json
    expect(dig(body, "type") == "message" and dig(body, "role") == "assistant", "it is no message of the assistant")
    expect(dig(body, "content", 0, "type") == "text" and dig(body, "content", 0, "text"), "there is no text block")
    expect(dig(body, "stop_reason") in _ANTHROPIC_STOPS, "the stop reason is none of Anthropic's")
    for name in ("input_tokens", "output_tokens"):
        expect(isinstance(dig(body, "usage", name), int), f"usage.{name} is missing")
    return f"stop reason {dig(body, 'stop_reason')}, {dig(body, 'usage', 'output_tokens')} tokens"


async def anthropic_stream(subject: Subject) -> str:
    """Anthropic's stream has its events, named, in order."""
    events = _events(await _anthropic(subject, "/messages", max_tokens=16, stream=True))
    names = [name for name, _ in events if name != "ping"]
    expect(names[:2] == ["message_start", "content_block_start"], "it does not begin as Anthropic's do")
    expect(names[-3:] == ["content_block_stop", "message_delta", "message_stop"], "it does not end as Anthropic's do")
    expect(set(names[2:-3]) == {"content_block_delta"}, "there are other events between")
    expect(all(dig(data, "type") == name for name, data in events), "an event's name is not its type")
    expect(isinstance(dig(events[-2][1], "usage", "output_tokens"), int), "message_delta has no usage.output_tokens")
    return f"{len(events)} events"


async def anthropic_count(subject: Subject) -> str:
    """Anthropic's count_tokens says what the message then costs."""
    counted = dig((await _anthropic(subject, "/messages/count_tokens")).json, "input_tokens")
    usage = dig((await _anthropic(subject, "/messages", max_tokens=1)).json, "usage")
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    paid = sum(dig(usage, name) or 0 for name in kinds)
    expect(counted == paid, f"{clean(counted, 20)} tokens were counted and {paid} used")
    return f"{counted} tokens"


async def anthropic_errors(subject: Subject) -> str:
    """Errors on Anthropic's interface have Anthropic's shape."""
    reply = await subject.server.send("POST", "/messages", {"model": subject.model}, headers=_ANTHROPIC)
    expect(reply.status == 400, f"a request without messages is answered with status {reply.status}")
    expect(dig(reply.json, "type") == "error", "the answer's type is not `error`")
    expect(dig(reply.json, "error", "type") == "invalid_request_error", "error.type is not invalid_request_error")
    return "400, invalid_request_error"


async def _google(subject: Subject, verb: str, **fields: Any) -> Reply:
    path = f"/v1beta/models/{quote(subject.model)}:{verb}"
    content = {"contents": [{"role": "user", "parts": [{"text": STORY}]}], **fields}
    key = {"x-goog-api-key": subject.server.key} if subject.server.key else {}
    return (await subject.server.send("POST", path, content, at_root=True, headers=key)).ok()


async def google_generate(subject: Subject) -> str:
    """Google's generateContent is answered, with usage and a finish reason."""
    body = (await _google(subject, "generateContent", generationConfig={"maxOutputTokens": 16})).json
    expect(dig(body, "candidates", 0, "content", "role") == "model", "the content's role is not `model`")
    expect(dig(body, "candidates", 0, "content", "parts", 0, "text"), "there is no text")
    expect(dig(body, "candidates", 0, "finishReason") in _GOOGLE_STOPS, "the finish reason is none of Google's")
    for name in ("promptTokenCount", "candidatesTokenCount", "totalTokenCount"):
        expect(isinstance(dig(body, "usageMetadata", name), int), f"usageMetadata.{name} is missing")
    return f"finish reason {dig(body, 'candidates', 0, 'finishReason')}"


async def google_stream(subject: Subject) -> str:
    """Google's stream is plain data events, each a response; no comments, names or [DONE]."""
    reply = await _google(subject, "streamGenerateContent?alt=sse", generationConfig={"maxOutputTokens": 16})
    lines = [line for line in reply.body.splitlines() if line.strip()]
    expect(all(line.startswith(b"data: {") for line in lines), "a line is no `data:` of an object")
    events = _events(reply)
    texts = [dig(data, "candidates", 0, "content", "parts", 0, "text") for _, data in events]
    expect(sum(bool(text) for text in texts) > 1, "the text came in one piece")
    last = events[-1][1] if events else None
    expect(dig(last, "candidates", 0, "finishReason") in _GOOGLE_STOPS, "the last event has no finish reason")
    expect(isinstance(dig(last, "usageMetadata", "totalTokenCount"), int), "the last event has no usage")
    return f"{len(events)} events"


async def google_count(subject: Subject) -> str:
    """Google's countTokens says what the request then costs."""
    counted = dig((await _google(subject, "countTokens")).json, "totalTokens")
    short = await _google(subject, "generateContent", generationConfig={"maxOutputTokens": 1})
    paid = dig(short.json, "usageMetadata", "promptTokenCount")
    expect(counted == paid, f"{clean(counted, 20)} tokens were counted and {clean(paid, 20)} used")
    return f"{counted} tokens"


async def responses_whole(subject: Subject) -> str:
    """OpenAI's responses are answered, with output items and usage."""
    fields = {"model": subject.model, "input": STORY, "max_output_tokens": 16, "store": False}
    body = (await subject.server.post("/responses", fields)).json
    expect(dig(body, "object") == "response", "`object` is not `response`")
    expect(dig(body, "status") in ("completed", "incomplete"), "the status is neither completed nor incomplete")
    items = dig(body, "output") or []
    message = next((item for item in items if dig(item, "type") == "message"), None)
    expect(dig(message, "content", 0, "type") == "output_text", "there is no message with output_text")
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        expect(isinstance(dig(body, "usage", name), int), f"usage.{name} is missing")
    return f"status {dig(body, 'status')}"


async def responses_stream(subject: Subject) -> str:
    """The responses' stream has its events in order, numbered, and one terminal event."""
    fields = {"model": subject.model, "input": STORY, "max_output_tokens": 16, "store": False, "stream": True}
    events = _events(await subject.server.post("/responses", fields))
    names = [dig(data, "type") for _, data in events]
    expect(names[:2] == ["response.created", "response.in_progress"], "it does not begin as OpenAI's do")
    expect(names[-1] in ("response.completed", "response.incomplete"), "the last event is not terminal")
    for name in ("response.output_item.added", "response.output_text.delta", "response.output_item.done"):
        expect(name in names, f"there is no {name}")
    numbers = [dig(data, "sequence_number") for _, data in events]
    expect(numbers == list(range(len(numbers))), "the sequence numbers do not count from 0")
    return f"{len(events)} events"


async def _embedding_model(subject: Subject) -> str:
    """The id of a listed model that embeds. Raises `Unproven`."""
    data = dig((await subject.server.send("GET", "/models")).ok().json, "data") or []
    for entry in data:
        words = [*(dig(entry, "output_modalities") or []), *(dig(entry, "capabilities") or [])]
        if {"embedding", "embeddings"} & set(words):
            return str(dig(entry, "id"))
    raise Unproven("no listed model says that it embeds")


async def embeddings(subject: Subject) -> str:
    """Embeddings come in both encodings, equal, in order and with usage."""
    model = await _embedding_model(subject)
    given = {"model": model, "input": ["a ship at sea", "a recipe for bread"]}
    floats = (await subject.server.post("/embeddings", {**given, "encoding_format": "float"})).json
    packed = (await subject.server.post("/embeddings", {**given, "encoding_format": "base64"})).json
    sizes = []
    for index in range(2):
        vector, text = (dig(body, "data", index, "embedding") for body in (floats, packed))
        expect(isinstance(vector, list) and vector and isinstance(text, str), "an embedding is missing")
        data = base64.b64decode(text)
        expect(len(data) == 4 * len(vector), "base64 is not as many 32-bit floats")
        both = zip(struct.unpack(f"<{len(vector)}f", data), vector, strict=True)
        expect(all(abs(one - other) < 1e-4 for one, other in both), "the encodings differ")
        sizes.append(len(vector))
    expect(isinstance(dig(floats, "usage", "prompt_tokens"), int), "usage.prompt_tokens is missing")
    return f"{clean(model, 60)}: {sizes[0]} dimensions"


async def feed(subject: Subject) -> str:
    """OpenRouter's feed is there, and no entry has a key that its strict schema forbids."""
    for path in _FEED_PATHS:
        reply = await subject.server.send("GET", path, at_root=True)
        if reply.status == 200:
            break
    else:
        raise Fault(f"no feed at {' or '.join(_FEED_PATHS)}")
    entries = dig(reply.json, "data")
    expect(isinstance(entries, list) and entries, "the feed has no `data`")
    for entry in entries:
        expect(re.fullmatch(r"2\.\d+", str(dig(entry, "schema_version"))), "schema_version is not 2.x")
        unknown = set(entry) - _FEED_KEYS
        expect(not unknown, f"a key that the schema forbids: {clean(', '.join(sorted(unknown)), 60)}")
        for name in ("id", "name", "input_modalities", "output_modalities"):
            expect(dig(entry, name), f"`{name}` is missing")
        sides = [*entry["input_modalities"], *entry["output_modalities"], entry]
        prices = [dig(price, "cost_usd") for side in sides for price in dig(side, "pricing") or []]
        expect(all(_PRICE.fullmatch(str(price)) for price in prices), "a price is not a plain decimal string")
    ids = [dig(entry, "id") for entry in entries]
    expect(subject.model in ids, "the audited model is not in the feed")
    return f"{len(entries)} entries at {path}"


PROBES = named(
    anthropic_messages, anthropic_stream, anthropic_count, anthropic_errors, google_generate, google_stream,
    google_count, responses_whole, responses_stream, embeddings, feed,
)  # fmt: skip
