"""How many tokens a response's input would have, in OpenAI's words."""

from __future__ import annotations

from ocserve.api import fields, json_body, openai_wire
from ocserve.api.dialect import Models
from ocserve.api.openai_responses import ResponseDialect
from ocserve.api.openai_responses_parameters import PARAMETERS as OF_RESPONSES
from ocserve.api.questions import Asked
from ocserve.errors import ErrorInfo
from ocserve.generation import Answer, Encoded, EncodeRequest

# Those of a response's parameters that have a say in its input, or that clients send along with them.
_COUNTED = (
    "model", "input", "instructions", "previous_response_id", "tools", "tool_choice", "parallel_tool_calls", "text",
    "reasoning", "truncation", "conversation",
)  # fmt: skip
PARAMETERS = tuple(field for field in OF_RESPONSES if field.name in _COUNTED)
_TABLE = fields.table(*PARAMETERS)


class InputTokensDialect:
    """The dialect of one question. `responses` reads the same parameters of a response."""

    def __init__(self, responses: ResponseDialect) -> None:
        self._responses = responses

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
        """The question in `body`."""
        fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
        parsed = self._responses.parse(body, models, refuse_unknown=refuse_unknown)
        question = EncodeRequest(request_id="", model=parsed.model.id, prompt=parsed.request.prompt, count_only=True)
        return Asked(question=question, model=parsed.model, reply=_reply, ignored=parsed.ignored, paths=parsed.paths)

    def error_body(self, info: ErrorInfo) -> bytes:
        """The error object of all of OpenAI's dialects."""
        return openai_wire.error_body(info)


def _reply(answer: Answer) -> bytes:
    assert isinstance(answer, Encoded)
    return openai_wire.dumps({"object": "response.input_tokens", "input_tokens": answer.count})
