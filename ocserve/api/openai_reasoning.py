"""How a chat request says that the model is to think, under the names of OpenAI, OpenRouter and vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from ocserve.api import fields
from ocserve.api.fields import Field, Value, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import Reasoning
from ocserve.modelcard import ServedModel

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAX_INT = 2**31 - 1

REASONING = fields.table(
    Field("effort", "effective", fields.word(*EFFORTS)),
    Field("max_tokens", "effective", fields.integer(0, _MAX_INT)),
    Field("enabled", "effective", fields.boolean()),
    Field("exclude", "effective", fields.boolean()),
    Field("summary", "advisory", fields.word("auto", "concise", "detailed")),
)
TEMPLATE = fields.table(
    Field("enable_thinking", "effective", fields.boolean()),
    Field("thinking", "effective", fields.boolean()),
    Field("reasoning_effort", "effective", fields.word(*EFFORTS)),
)
PARAMETERS: tuple[Field, ...] = (
    Field("reasoning_effort", "effective", fields.word(*EFFORTS)),
    Field("reasoning", "effective", fields.pairs(8), of=REASONING),
    Field("include_reasoning", "effective", fields.boolean()),
    Field("chat_template_kwargs", "effective", fields.pairs(8), of=TEMPLATE),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """How to think, whether the answer shows it, and what was ignored."""

    reasoning: Reasoning
    shown: bool
    ignored: tuple[str, ...]


def read(values: Values, model: ServedModel, *, refuse_unknown: bool) -> Wish:
    """The request's wish; one that this model cannot fulfil, or that contradicts another, is refused."""
    inner = fields.read(values.get("reasoning", dict) or {}, REASONING, refuse_unknown=refuse_unknown, path="reasoning")
    path = "chat_template_kwargs"
    template = fields.read(values.get(path, dict) or {}, TEMPLATE, refuse_unknown=refuse_unknown, path=path)
    effort = _agreed(
        ("reasoning_effort", values.get("reasoning_effort", str)),
        ("reasoning.effort", inner.get("effort", str)),
        (f"{path}.reasoning_effort", template.get("reasoning_effort", str)),
    )
    budget = inner.get("max_tokens", int)
    enabled = _agreed(
        ("reasoning.enabled", inner.get("enabled", bool)),
        (f"{path}.enable_thinking", template.get("enable_thinking", bool)),
        (f"{path}.thinking", template.get("thinking", bool)),
        (effort.where, None if effort.value is None else effort.value != "none"),
        ("reasoning.max_tokens", None if budget is None else budget > 0),
    )
    if enabled.value and "reasoning" not in model.capabilities:
        raise fields.unsupported(enabled.where, "this model does not reason.")
    excluded = _agreed(
        ("reasoning.exclude", inner.get("exclude", bool)),
        ("include_reasoning", None if (shown := values.get("include_reasoning", bool)) is None else not shown),
    )
    return Wish(
        Reasoning(
            enabled=enabled.value,
            effort=None if effort.value == "none" else effort.value,
            max_tokens=budget or None,
        ),
        shown=not excluded.value,
        ignored=(*inner.ignored, *template.ignored),
    )


@dataclass(frozen=True, slots=True)
class _Said(Generic[Value]):
    where: str
    value: Value | None


def _agreed(*said: tuple[str, Value | None]) -> _Said[Value]:
    """What was said under one or several names, and the first of them."""
    found = [_Said(where, value) for where, value in said if value is not None]
    for other in found[1:]:
        if other.value != found[0].value:
            raise InvalidRequest(f"'{other.where}' contradicts '{found[0].where}'.", param=other.where)
    return found[0] if found else _Said("", None)
