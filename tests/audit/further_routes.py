"""The provider's routes that do not generate in OpenAI's chat form: lists, documents, tokenizer, other interfaces."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.audit import toy_model
from tests.audit.provider import CONTEXT, MODEL, MOST, PRICES, Answer, Job, Refusal, packed

if TYPE_CHECKING:
    from tests.audit.provider import Provider

_PARAMETERS = {
    "model": {"type": "string"},
    "messages": {"type": "array"},
    "stream": {"type": "boolean"},
    "stop": {"type": ["string", "array"]},
    "temperature": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 2, "default": 1}, {"type": "null"}]},
    "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": MOST},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
}
_PAGE = """<html>POST /v1/chat/completions. curl -H 'Authorization: Bearer KEY' …; Python: …; JavaScript: …
Keys are rotated with an overlap and revoked at once. Tokens are counted by a tokenizer, control tokens too.</html>"""
_FINISHES = {"type": "string", "enum": ["stop", "length", "tool_calls", "content_filter"]}
_METRICS = """# HELP toy_ttft_seconds From arrival to the first token.
# TYPE toy_ttft_seconds histogram
toy_ttft_seconds_bucket{model="a\\"b",le="0.1"} 1
toy_ttft_seconds_bucket{model="a\\"b",le="+Inf"} 3
toy_ttft_seconds_count{model="a\\"b"} 3
toy_ttft_seconds_sum{model="a\\"b"} 0.5
# TYPE toy_inter_token_seconds histogram
toy_inter_token_seconds_bucket{le="+Inf"} 0
toy_inter_token_seconds_count 0
# TYPE toy_queue_seconds histogram
toy_queue_seconds_bucket{le="+Inf"} 0
toy_queue_seconds_count 0
# TYPE toy_errors_total counter
toy_errors_total 4
# TYPE toy_tokens_total counter
toy_tokens_total{kind="prompt"} 1e+03 1790000000000
"""
_CONTACT = "operator@example.com"


def entry(provider: Provider) -> dict[str, Any]:
    return {
        "id": MODEL,
        "object": "model",
        "created": 1_790_000_000,
        "owned_by": "tests",
        "name": "Toy",
        "description": "A toy. It says words.",
        "context_length": CONTEXT,
        "max_output_tokens": MOST,
        "pricing": PRICES,
        "input_modalities": ["text", "image"] if provider.vision else ["text"],
        "output_modalities": ["text"],
        "capabilities": ["chat", "completion", "tools"],
        "supported_parameters": ["temperature", "response_format", "structured_outputs"],
        "family": "toy",
        "knowledge_cutoff": "2025-01",
        "intended_use": "Tests.",
        "strengths": "Says words.",
        "limitations": "Says nothing but words.",
        "languages": ["en"],
        "released": "2026-11",
        "quantization": "fp32",
        "license": "apache-2.0",
        "defaults": {"temperature": 1.0, "top_p": 1.0},
    }


def _embedder() -> dict[str, Any]:
    return {
        "id": "toy-embed",
        "object": "model",
        "created": 1_790_000_000,
        "owned_by": "tests",
        "output_modalities": ["embedding"],
        "capabilities": ["embedding"],
    }


def _openapi() -> dict[str, Any]:
    schema = {"type": "object", "properties": _PARAMETERS}
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Chat"}, "example": {}}}}
    answers = {status: {"description": "…"} for status in ("200", "400", "401", "404", "429")}
    post = {"post": {"requestBody": body, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "paths": {"/v1/chat/completions": post, "/v1/completions": post, "/v1/models": {"get": {}}},
        "components": {
            "schemas": {"Chat": schema, "Finish": _FINISHES},
            "securitySchemes": {"bearer": {"type": "http"}},
        },
    }


def _published(provider: Provider) -> dict[str, Any]:
    """What is published of the provider, by path."""
    million = {"prompt": "0.02", "completion": "0.06", "cached_prompt": "0.01", "cache_write": "0.03", "request": None}
    limits = {
        "requests_per_minute": provider.limit,
        "requests_per_day": None,
        "tokens_per_minute": provider.tokens,
        "tokens_per_day": None,
        "concurrent_requests": provider.concurrent,
    }
    return {
        "/pricing": {
            "currency": "USD",
            "unit": "per million tokens",
            "models": [
                {"id": MODEL, "announced": True, "prices": {"prompt": "9", "completion": "9"}, "tiers": []},
                {"id": MODEL, "announced": False, "prices": million, "tiers": []},
            ],
            "policy": {"cancelled": "used", "failed": "free", "text": "Cancelled ones are charged, failed ones free."},
            "payment": "By credit card, with automatic top-up; invoices come monthly.",
        },
        "/privacy": {
            "training_on_prompts": False,
            "training_on_completions": False,
            "retention": [{"what": "log lines", "days": 30, "content": False}],
            "deletion": "Ask for it.",
            "operator": {"name": "Toys", "email": _CONTACT, "locations": ["DE", "FR"]},
            "certifications": ["GDPR", "SOC 2", "HIPAA"],
        },
        "/policy": {"text": "Nothing bad is filtered in.", "finish_reason": "content_filter"},
        "/status": {"ready": True, "uptime_s": 5, "maintenance": None},
        "/support": (
            f"<html><style>p {{}}</style><p>Support: {_CONTACT}. Availability: 99.9 %. Incidents are told.</p></html>"
        ).encode(),
        "/limits": {"limits": limits, "models": [], "raise": "Ask, and they are raised."},
        "/metrics": _METRICS.encode(),
    }


def _feed() -> dict[str, Any]:
    prices = [{"type": "prompt", "unit": "token", "cost_usd": PRICES["prompt"]}]
    return {
        "data": [
            {
                "schema_version": "2.4",
                "id": MODEL,
                "name": "Toy",
                "input_modalities": [{"type": "text", "pricing": prices}],
                "output_modalities": [{"type": "text", "supported_parameters": {}}],
            }
        ]
    }


def get(provider: Provider, path: str) -> Answer | None:
    """A document or list, None if there is none."""
    documents: dict[str, Any] = {
        "/health": {"status": "ok"},
        "/docs": _PAGE.encode(),
        "/openapi.json": _openapi(),
        "/openrouter/models": _feed(),
        "/v1/models": {"object": "list", "data": [_embedder(), entry(provider)]},
        "/page": b"Privacy: personal data. Retention: deleted. Price: $1. Status: operational. Terms. GDPR. Support. "
        b"Policy. Requests per minute.",
        **_published(provider),
    }
    if unquote(path) == f"/v1/models/{MODEL}":
        return 200, {}, entry(provider)
    if path == "/v1/chat/completions":
        raise Refusal(405, "This address takes POST only.", code="method_not_allowed")
    return (200, {}, documents[path]) if path in documents else None


async def post(provider: Provider, path: str, fields: dict[str, Any]) -> Answer | None:
    """The answer of any interface but OpenAI's completions."""
    if path == "/tokenize":
        return 200, {}, {"tokens": toy_model.encode(fields["content"], special=fields["parse_special"])}
    if path == "/apply-template":
        return 200, {}, {"prompt": toy_model.rendered(fields["messages"])}
    if path == "/v1/embeddings":
        vectors = [[0.5, -0.25, float(index)] for index in range(len(fields["input"]))]
        as_text = fields["encoding_format"] == "base64"
        data = [{"index": i, "embedding": packed(each) if as_text else each} for i, each in enumerate(vectors)]
        return 200, {}, {"object": "list", "data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    if path == "/v1/responses":
        return await _responses(provider, fields)
    if path.startswith("/v1/messages"):
        return await _anthropic(provider, path, fields)
    if unquote(path).startswith(f"/v1beta/models/{MODEL}:"):
        return await _google(provider, path.rpartition(":")[2], fields)
    return None


async def _said(provider: Provider, messages: list[dict[str, Any]], limit: int) -> tuple[list[str], dict[str, Any]]:
    job = Job(provider, {"messages": messages, "max_tokens": limit}, chat=True)
    pieces = [piece async for piece, _, _, _ in job._pieces(0) if piece]
    return pieces, job.usage()


def _sse(events: list[dict[str, Any]], *, named: bool) -> Answer:
    lines = [(f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n" for event in events]
    return 200, {"content-type": "text/event-stream"}, "".join(lines).encode()


async def _anthropic(provider: Provider, path: str, fields: dict[str, Any]) -> Answer:
    if "messages" not in fields:
        error = {"type": "invalid_request_error", "message": "messages: missing"}
        return 400, {}, {"type": "error", "error": error}
    pieces, usage = await _said(provider, fields["messages"], fields.get("max_tokens", 1))
    if path.endswith("/count_tokens"):
        return 200, {}, {"input_tokens": usage["prompt_tokens"]}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL, "usage": counts}
    if not fields.get("stream"):
        text = {"type": "text", "text": "".join(pieces)}
        return 200, {"request-id": "req_a"}, {**message, "content": [text], "stop_reason": "max_tokens"}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
            for piece in pieces
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": counts},
        {"type": "message_stop"},
    ]
    return _sse(events, named=True)


async def _google(provider: Provider, verb: str, fields: dict[str, Any]) -> Answer:
    messages = [{"role": "user", "content": fields["contents"][0]["parts"][0]["text"]}]
    limit = fields.get("generationConfig", {}).get("maxOutputTokens", 4)
    pieces, usage = await _said(provider, messages, limit)
    counts = {
        "promptTokenCount": usage["prompt_tokens"],
        "candidatesTokenCount": usage["completion_tokens"],
        "totalTokenCount": usage["total_tokens"],
    }
    if verb.startswith("countTokens"):
        return 200, {}, {"totalTokens": usage["prompt_tokens"]}

    def body(text: str, finish: str | None) -> dict[str, Any]:
        candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish}
        return {"candidates": [candidate], "usageMetadata": counts}

    if verb.startswith("generateContent"):
        return 200, {}, body("".join(pieces), "MAX_TOKENS")
    return _sse([*(body(piece, None) for piece in pieces[:-1]), body(pieces[-1], "MAX_TOKENS")], named=False)


async def _responses(provider: Provider, fields: dict[str, Any]) -> Answer:
    messages = [{"role": "user", "content": fields["input"]}]
    pieces, usage = await _said(provider, messages, fields["max_output_tokens"])
    item = {"type": "message", "content": [{"type": "output_text", "text": "".join(pieces)}]}
    counts = {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
    body = {"object": "response", "status": "incomplete", "output": [item], "usage": counts}
    if not fields.get("stream"):
        return 200, {}, body
    kinds = ["response.created", "response.in_progress", "response.output_item.added"]
    kinds += ["response.output_text.delta"] * len(pieces) + ["response.output_item.done", "response.incomplete"]
    return _sse([{"type": kind, "sequence_number": at} for at, kind in enumerate(kinds)], named=True)
