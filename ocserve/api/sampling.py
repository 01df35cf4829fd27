"""What a request asks of sampling and length, reconciled with the model's defaults and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocserve.api.fields import Reader
from ocserve.errors import InvalidRequest
from ocserve.generation import Sampling
from ocserve.modelcard import SamplingDefaults, ServedModel


def sampling(given: Mapping[str, Any], model: ServedModel) -> Sampling:
    """How to draw tokens: the request's word (None: silent), else the model's default, else neutral."""
    defaults = {name: getattr(model.sampling, name) for name in SamplingDefaults.__struct_fields__}
    asked = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{name: value for name, value in (defaults | asked).items() if value is not None})


def seed(known: Reader[int]) -> Reader[int | None]:
    """A seed that `known` reads; -1 stands for a random one."""

    def reader(value: object, where: str) -> int | None:
        found = known(value, where)
        return None if found == -1 else found

    return Reader(reader, known.schema)


def output_limit(limit: int | None, where: str, model: ServedModel) -> int:
    """The bound on sampled tokens; `where` is the parameter that names it."""
    if limit is None:
        return min(model.default_output_tokens, model.max_output_tokens)
    if limit > model.max_output_tokens:
        raise InvalidRequest(
            f"Invalid '{where}': integer above maximum value. Expected a value <= {model.max_output_tokens}, "
            f"but got {limit} instead.",
            param=where,
            code="integer_above_max_value",
        )
    return limit
