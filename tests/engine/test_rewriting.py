"""What a schema is turned into before it is compiled: as strict as it was, and formats stricter than the compiler's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from ocserve.engine.rewriting import Unsupported, simplified
from tests.engine.test_schema_suites import Compiling, accepted, compiling


@pytest.fixture(scope="module")
def by_bytes(tiny_model: Path) -> Compiling:
    return compiling(tiny_model)


def takes(by_bytes: Compiling, schema: dict[str, Any], *values: Any) -> list[bool]:
    start = by_bytes.guide(schema)
    return [accepted(by_bytes, start, value) for value in values]


def is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text) is not None
    except ValueError:
        return False


def test_dates_are_those_of_the_calendar(by_bytes: Compiling) -> None:
    years = (0, 4, 400, 1900, 1999, 2000, 2020, 2100)
    days = [f"{year:04}-{month:02}-{day:02}" for year in years for month in (1, 2, 4) for day in (1, 28, 29, 30, 31)]
    expected = [is_date(day) for day in days]
    assert 80 < sum(expected) < len(days)
    assert takes(by_bytes, {"type": "string", "format": "date"}, *days) == expected
    moments = [f"{day}T23:59:59.5+01:00" for day in days]
    assert takes(by_bytes, {"type": "string", "format": "date-time"}, *moments) == expected


def test_formats_hold_beside_patterns_of_clients(by_bytes: Compiling) -> None:
    schema = {"type": "string", "format": "date", "pattern": "^20"}
    assert takes(by_bytes, schema, "2020-02-29", "2021-02-29", "1999-01-01") == [True, False, False]
    schema = {"format": "time", "pattern": "^2", "allOf": [{"pattern": "Z$"}]}
    assert takes(by_bytes, schema, "23:59:59Z", "23:59:60Z", "23:59:59+00:00", 7) == [True, False, False, True]


def test_host_names_are_of_letters_digits_and_hyphens_and_short(by_bytes: Compiling) -> None:
    long = ".".join(["a" * 60] * 4)
    values = (
        "example.org",
        "x",
        "xn.nx",
        "x-n-y",
        "xy--z.xa",
        "XN--9n2bp8q.test",
        "a.xn--x",
        long,
        long + ".b1234567890",
    )
    assert takes(by_bytes, {"type": "string", "format": "hostname"}, *values) == [True] * 5 + [False] * 2 + [
        True,
        False,
    ]
    bounded = {"type": "string", "format": "hostname", "maxLength": 3}
    assert takes(by_bytes, bounded, "abc", "abcd") == [True, False]


def test_no_space_is_none_of_ecmascripts_spaces(by_bytes: Compiling) -> None:
    for pattern in (r"^\S$", r"^[\S]$", r"^[_\S]$"):
        assert takes(by_bytes, {"type": "string", "pattern": pattern}, "a", "_", " ", "\ufeff") == [
            True,
            True,
            False,
            False,
        ]
    assert takes(by_bytes, {"type": "string", "pattern": r"^\\S$"}, r"\S", r"\a") == [True, False]


@pytest.mark.parametrize(
    ("pattern", "taken", "refused"),
    [
        ("^[[a]b]$", "ab]", "b"),
        ("^[a&&b]$", "&", "c"),
        ("^[+--]$", ",", "~"),
        ("^[a~~b]$", "~", "-"),
        (r"^[\]&&a]$", "]", "b"),
    ],
)
def test_a_class_has_no_operations_on_sets(by_bytes: Compiling, pattern: str, taken: str, refused: str) -> None:
    """The compiler's syntax has some, and clients write ECMAScript's."""
    assert takes(by_bytes, {"type": "string", "pattern": pattern}, taken, refused) == [True, False]


def test_counts_of_integral_value_are_integers() -> None:
    names = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
    assert simplified(dict.fromkeys(names, 1.0)) == dict.fromkeys(names, 1)
    assert simplified({"maxItems": 2.5, "maximum": 2.0}) == {"maxItems": 2.5, "maximum": 2.0}


def test_a_format_that_no_draft_defines_says_nothing(by_bytes: Compiling) -> None:
    assert takes(by_bytes, {"type": "string", "format": "semver"}, "1.2", "any") == [True, True]
    assert takes(by_bytes, {"type": "string", "format": "ipv4"}, "1.2.3.4", "any") == [True, False]


def test_up_to_draft_7_an_id_beside_a_reference_means_nothing(by_bytes: Compiling) -> None:
    schema = {
        "$id": "http://example.org/a/",
        "definitions": {
            "x": {"$id": "y", "type": "integer"},
            "z": {"$id": "http://example.org/a/b/y", "type": "string"},
        },
        "allOf": [{"$id": "http://example.org/a/b/", "$ref": "y"}],
    }
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    assert takes(by_bytes, draft7, 1, "1") == [True, False]
    assert takes(by_bytes, schema, 1, "1") == [False, True]


def test_data_is_left_as_it_is() -> None:
    data: list[Any] = [{"format": "date", "pattern": r"\S", "maxItems": 2.0}]
    for keyword in ("enum", "examples"):
        assert simplified({keyword: data}) == {keyword: data}
    named = {"properties": {"format": {"const": "date"}, "pattern": {"enum": [r"\S"]}}}
    assert simplified(named) == named


DATE = {"type": "string", "format": "date"}
DATES = ("2020-02-29", "2021-02-29")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/components/schemas/Day", "components": {"schemas": {"Day": DATE}}},
        {"$ref": "#/x-foo/y", "x-foo": {"y": DATE}},
        {"$ref": "#/x/1", "x": [True, DATE]},
        {"$ref": "#/a~1b~0c%25d%20e", "a/b~c%d e": DATE},
        {"$ref": "#/x/a", "x": {"a": {"$ref": "#/y/b"}}, "y": {"b": {"anyOf": [DATE]}}},
        {"$ref": "#/x/a", "x": {"a": {"anyOf": [{"$ref": "#/x/a/z/b"}], "z": {"b": DATE}}}},
        {
            "anyOf": [{"$ref": "#/x/a/z/b"}, {"$ref": "#/x/c"}],
            "x": {"a": {"z": {"b": DATE}}, "c": {"$ref": "#/x/a/z/b"}},
        },
        {"$id": "http://example.org/s", "$ref": "http://example.org/s#/x/a", "x": {"a": DATE}},
        {"allOf": [{"$id": "http://example.org/t", "properties": {"n": {"$ref": "#/x/a"}}, "x": {"a": DATE}}]},
    ],
)
def test_targets_of_references_are_rewritten_wherever_they_lie(by_bytes: Compiling, schema: dict[str, Any]) -> None:
    values = [{"n": date} for date in DATES] if "allOf" in schema else DATES
    assert takes(by_bytes, schema, *values) == [True, False]


def test_targets_that_contain_others_and_themselves_are_rewritten_once(by_bytes: Compiling) -> None:
    node = {
        "type": "object",
        "properties": {"on": DATE, "next": {"$ref": "#/x/node"}, "last": {"$ref": "#/x/node/z/leaf"}},
        "additionalProperties": False,
        "z": {"leaf": {"type": "string", "format": "date", "pattern": "^2"}},
    }
    schema = {"$ref": "#/x/node", "x": {"node": node}}
    before = json.dumps(schema)
    found = simplified(schema)
    assert json.dumps(schema) == before
    leaf = found["x"]["node"]["z"]["leaf"]  # type: ignore[index]
    assert leaf["pattern"] == "^2"
    assert len(leaf["allOf"]) == 1
    good, bad = {"on": DATES[0], "next": {"last": DATES[0]}}, {"on": DATES[0], "next": {"last": DATES[1]}}
    assert takes(by_bytes, schema, good, bad, {"next": {"on": DATES[1]}}) == [True, False, False]


def test_what_cannot_be_held_to_is_refused_in_targets_too() -> None:
    few = {"type": "object", "minProperties": 5}
    with pytest.raises(Unsupported, match="minProperties"):
        simplified({"$ref": "#/x/a", "x": {"a": few}})
    assert simplified({"x": {"a": few}}) == {"x": {"a": few}}, "nobody refers to it"
    with pytest.raises(Unsupported, match="const"):
        simplified({"anyOf": [{"$ref": "#/anyOf/1/const"}, {"const": DATE}]})
    assert simplified({"const": {"$ref": "#/x/a"}, "x": {"a": few}})["x"] == {"a": few}, "data"


def test_very_many_targets_are_refused_and_not_looked_through() -> None:
    names = [f"a{number}" for number in range(2000)]
    schema = {"anyOf": [{"$ref": f"#/x/{name}"} for name in names], "x": {name: {} for name in names}}
    with pytest.raises(Unsupported, match="too many"):
        simplified(schema)


def test_an_index_of_thousands_of_digits_points_at_nothing() -> None:
    schema = {"x": [{}], "$ref": "#/x/" + "1" * 5000}
    assert simplified(schema) is not None
