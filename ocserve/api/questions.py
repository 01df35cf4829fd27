"""What the dialects of questions share: requests that are answered at once and whole, without a slot.

As dialects of generations they are pure codecs; a module fulfils `QuestionDialect` with `parse` and `error_body`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ocserve.api import fields
from ocserve.api.dialect import Models
from ocserve.errors import ErrorInfo, InvalidRequest
from ocserve.generation import Answer, Question
from ocserve.modelcard import Capability, ServedModel

_NOT_CAPABLE: dict[Capability, str] = {
    "embedding": "does not compute embeddings",
    "rerank": "does not compare documents with a query",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question understood. `reply` writes the body of the answer; `ignored` names parameters without effect.

    `paths` are what the engine calls parts of a request and what this client called them, for refusals.
    """

    question: Question
    model: ServedModel
    reply: Callable[[Answer], bytes]
    ignored: tuple[str, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)


class QuestionDialect(Protocol):
    """A vendor's wire format for questions. Modules fulfil it."""

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
        """The question in `body`; raises `ApiError` with the exact path of what is wrong."""

    def error_body(self, info: ErrorInfo) -> bytes:
        """The body of an error answer."""


def capable(model: ServedModel, capability: Capability) -> ServedModel:
    """The model, or the refusal of one that cannot do what is asked."""
    if capability not in model.capabilities:
        raise InvalidRequest(
            f"The model {model.id} {_NOT_CAPABLE[capability]}. GET /v1/models lists what each model does.",
            param="model",
            code="model_not_capable",
        )
    return model


def dimensions(asked: int | None, where: str, model: ServedModel) -> int | None:
    """How many numbers of each vector to keep, by the parameter `where`; None is all of them."""
    least = model.card.shortest_vector
    if asked is None or asked == model.dimensions:
        return None
    if least is None:
        raise fields.unsupported(where, f"vectors of this model cannot be shortened; accepted: {model.dimensions}.")
    return fields.integer(least, model.dimensions)(asked, where)
