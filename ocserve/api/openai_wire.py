"""What all of OpenAI's endpoints share on the wire: the error object, the usage object, the finish reasons."""

from __future__ import annotations

import json

from ocserve.errors import ErrorInfo
from ocserve.generation import FinishReason, Usage

# A cancelled generation has no reader left; its answer is never sent, and `stop` keeps the mapping total.
FINISH_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "cancelled": "stop"}

DONE = b"[DONE]"


def dumps(value: object) -> bytes:
    """JSON as it goes out: compact, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error_body(info: ErrorInfo) -> bytes:
    """The error object; all four keys are always present."""
    return dumps({"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}})


def usage(counts: Usage) -> dict[str, object]:
    """The usage object; clients read the details unconditionally, so they are always present."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
    }
