"""Whether a value satisfies a JSON Schema: the keywords that the audit's own schemas use, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "object": lambda value: isinstance(value, dict),
        "array": lambda value: isinstance(value, list),
        "string": lambda value: isinstance(value, str),
        "boolean": lambda value: isinstance(value, bool),
        "null": lambda value: value is None,
        "integer": lambda value: _number(value) and float(value).is_integer(),
        "number": _number,
    }
)
_ANNOTATIONS = frozenset({"$defs", "description", "title"})


_KEYWORDS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "enum": lambda value, given: value in given,
        "const": lambda value, given: bool(value == given),
        "minimum": lambda value, given: not _number(value) or value >= given,
        "maximum": lambda value, given: not _number(value) or value <= given,
        "minLength": lambda value, given: not isinstance(value, str) or len(value) >= given,
        "maxLength": lambda value, given: not isinstance(value, str) or len(value) <= given,
        "pattern": lambda value, given: not isinstance(value, str) or bool(re.search(given, value)),
        "minItems": lambda value, given: not isinstance(value, list) or len(value) >= given,
        "maxItems": lambda value, given: not isinstance(value, list) or len(value) <= given,
        "required": lambda value, given: not isinstance(value, dict) or set(given) <= value.keys(),
    }
)


def mismatch(value: Any, schema: Any, root: Any = None, path: str = "$") -> str | None:
    """Where and by which keyword `value` fails `schema`, None if it holds. Raises `ValueError` for other keywords."""
    root = schema if root is None else root
    for keyword, given in schema.items():
        if keyword in _ANNOTATIONS or keyword in ("properties", "additionalProperties"):
            continue
        if keyword == "type":
            if not any(_TYPES[name](value) for name in (given if isinstance(given, list) else [given])):
                return f"{path}: type"
        elif keyword == "$ref":
            target = root
            for step in given.removeprefix("#").strip("/").split("/"):
                target = target[step] if step else target
            if found := mismatch(value, target, root, path):
                return found
        elif keyword == "anyOf":
            if all(mismatch(value, each, root, path) for each in given):
                return f"{path}: anyOf"
        elif keyword == "items":
            for index, item in enumerate(value if isinstance(value, list) else []):
                if found := mismatch(item, given, root, f"{path}[{index}]"):
                    return found
        elif keyword in _KEYWORDS:
            if not _KEYWORDS[keyword](value, given):
                return f"{path}: {keyword}"
        else:
            raise ValueError(f"the audit's validator does not know `{keyword}`")
    return _properties(value, schema, root, path)


def _properties(value: Any, schema: Any, root: Any, path: str) -> str | None:
    if not isinstance(value, dict):
        return None
    known, further = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        expected = known.get(name, further)
        if expected is False:
            return f"{path}: additionalProperties"
        if isinstance(expected, dict) and (found := mismatch(item, expected, root, f"{path}.{name}")):
            return found
    return None
