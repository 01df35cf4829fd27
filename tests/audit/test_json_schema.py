"""The audit's small validator agrees with a complete one on every schema that the probes send."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from ocserve.audit.json_schema import mismatch
from ocserve.audit.probes import structured, tools
from tests.audit import toy_model

SCHEMAS = {**structured._FLAT, **structured._NESTED, **tools._SCHEMAS}


def variants(value: Any, source: random.Random) -> Any:
    """`value` with something changed somewhere."""
    if isinstance(value, dict) and value and source.random() < 0.8:
        name = source.choice(list(value))
        if source.random() < 0.3:
            return {key: each for key, each in value.items() if key != name}
        return {**value, name: variants(value[name], source), **({"further": 1} if source.random() < 0.1 else {})}
    if isinstance(value, list) and source.random() < 0.6:
        return value + value if source.random() < 0.5 else [variants(each, source) for each in value]
    return source.choice([None, True, -1, 100, 3.5, 7.0, "", "x" * 13, "AB-12", [], {}, value])


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_agrees_with_jsonschema(name: str) -> None:
    schema, source = SCHEMAS[name], random.Random(name)
    validator = jsonschema.Draft202012Validator(schema)
    verdicts = set()
    for _ in range(400):
        value = toy_model.instance(schema, source)
        if source.random() < 0.8:
            value = variants(value, source)
        value = json.loads(json.dumps(value))
        valid = validator.is_valid(value)
        verdicts.add(valid)
        assert (mismatch(value, schema) is None) == valid, value
    assert verdicts == {True, False}


def test_an_unknown_keyword_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="multipleOf"):
        mismatch(4, {"multipleOf": 2})
