"""llama-server's `/infill`: what belongs between two pieces of a file. The answer is as `/completion`'s."""

from __future__ import annotations

from ocserve.api import fields, json_body, llama_completion
from ocserve.api.dialect import Models, Parsed
from ocserve.api.fields import Field, Values
from ocserve.api.llama_completion import encoder
from ocserve.api.llama_server import model_of
from ocserve.api.openai_wire import error_body
from ocserve.generation import FillPrompt

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_FILES = 256
_TEXT = fields.string(64 * 1024 * 1024)  # the body's own limit is far below

EXTRA = fields.table(
    Field("filename", "effective", fields.string(4096)),
    Field("text", "effective", _TEXT, required=True),
)
PARAMETERS: tuple[Field, ...] = (
    Field("input_prefix", "effective", _TEXT),
    Field("input_suffix", "effective", _TEXT),
    Field("input_extra", "effective", fields.items(_MAX_FILES), of=EXTRA),
    Field("prompt", "effective", _TEXT),
    *llama_completion.SHARED,
)
_TABLE = llama_completion.table(PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    extra = [
        _file(item, f"input_extra[{index}]", refuse_unknown=refuse_unknown)
        for index, item in enumerate(values.get("input_extra", list) or [])
    ]
    prompt = FillPrompt(
        # `prompt` is the beginning of the current line: it continues the prefix.
        prefix=(values.get("input_prefix", str) or "") + (values.get("prompt", str) or ""),
        suffix=values.get("input_suffix", str) or "",
        files=tuple((file.get("filename", str) or "", file.get("text", str) or "") for file in extra),
    )
    return llama_completion.parsed(values, model_of(values, models), prompt)


def _file(value: object, path: str, *, refuse_unknown: bool) -> Values:
    return fields.read(fields.mapping(value, path), EXTRA, refuse_unknown=refuse_unknown, path=path)
