"""OpenAI's tools and tool choices, nested and flat: what they become, and every refusal's exact path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.api.tools import ToolReader
from ocserve.errors import InvalidRequest
from ocserve.generation import Tool, ToolChoice

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA, "strict": True}


def read(tools: list[Any], choice: Any = None, *, nested: bool = True, parallel: bool = True) -> Any:
    reader = ToolReader(refuse_unknown=True, nested=nested)
    found = reader.tools(tools)
    return found, reader.choice(choice, found, parallel=parallel), reader.ignored


def nest(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**WEATHER, **function}}


def flat(**function: Any) -> dict[str, Any]:
    return {"type": "function", **WEATHER, **function}


def test_a_tool_is_read_in_both_shapes() -> None:
    for tools, nested in (([nest()], True), ([flat()], False)):
        (tool,), choice, ignored = read(tools, nested=nested)
        assert tool == Tool(
            name="get_weather", description="Weather.", parameters=json.dumps(SCHEMA, ensure_ascii=False), strict=True
        )
        assert choice == ToolChoice()
        assert ignored == []


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_tool_without_parameters_takes_none(parameters: Any) -> None:
    (tool,), _, _ = read([nest(parameters=parameters)])
    assert tool.parameters is None


TWO = [nest(), nest(name="now")]


@pytest.mark.parametrize(
    ("given", "mode", "names"),
    [
        (None, "auto", ()),
        ("none", "none", ()),
        ("auto", "auto", ()),
        ("required", "required", ()),
        ({"type": "function", "function": {"name": "now"}}, "required", ("now",)),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]},
            },
            "auto",
            ("now",),
        ),
    ],
)
def test_every_choice(given: Any, mode: str, names: tuple[str, ...]) -> None:
    _, choice, _ = read(TWO, given, parallel=False)
    assert (choice.mode, choice.names, choice.parallel) == (mode, names, False)


def test_flat_choices() -> None:
    tools = [flat(), flat(name="now")]
    assert read(tools, {"type": "function", "name": "now"}, nested=False)[1].names == ("now",)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    choice = read(tools, allowed, nested=False)[1]
    assert (choice.mode, choice.names) == ("required", ("now",))


def allowed(**inner: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": inner}


REFERENCE = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([1], None, "tools[0]"),
        ([nest(), []], None, "tools[1]"),
        ([{"function": WEATHER}], None, "tools[0].type"),
        ([{"type": 1}], None, "tools[0].type"),
        ([{"type": "custom", "custom": {"name": "f"}}], None, "tools[0].type"),
        ([{"type": "poem"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].function"),
        ([{"type": "function", "function": []}], None, "tools[0].function"),
        ([{**nest(), "x": 1}], None, "tools[0].x"),
        ([nest(name=None)], None, "tools[0].function.name"),
        ([nest(name="")], None, "tools[0].function.name"),
        ([nest(name="a b")], None, "tools[0].function.name"),
        ([nest(name="x" * 129)], None, "tools[0].function.name"),
        ([nest(name=1)], None, "tools[0].function.name"),
        ([nest(description=1)], None, "tools[0].function.description"),
        ([nest(strict="yes")], None, "tools[0].function.strict"),
        ([nest(parameters=[])], None, "tools[0].function.parameters"),
        ([nest(parameters="{}")], None, "tools[0].function.parameters"),
        ([nest(parameters={"type": "array"})], None, "tools[0].function.parameters.type"),
        ([nest(parameters={"type": None})], None, "tools[0].function.parameters.type"),
        ([nest(parameter={})], None, "tools[0].function.parameter"),
        ([nest(), nest()], None, "tools[1].function.name"),
        ([], "required", "tool_choice"),
        ([nest()], "any", "tool_choice"),
        ([nest()], 1, "tool_choice"),
        ([nest()], [], "tool_choice"),
        ([nest()], {}, "tool_choice.type"),
        ([nest()], {"type": "custom"}, "tool_choice.type"),
        ([nest()], {"type": "function"}, "tool_choice.function"),
        ([nest()], {"type": "function", "function": {}}, "tool_choice.function.name"),
        ([nest()], {"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
        ([nest()], {"type": "function", "function": {"name": 1}}, "tool_choice.function.name"),
        ([nest()], {"type": "function", "function": {"name": "g", "x": 1}}, "tool_choice.function.x"),
        ([nest()], {"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ([nest()], allowed(tools=[REFERENCE]), "tool_choice.allowed_tools.mode"),
        ([nest()], allowed(mode="none", tools=[REFERENCE]), "tool_choice.allowed_tools.mode"),
        ([nest()], allowed(mode="auto"), "tool_choice.allowed_tools.tools"),
        ([nest()], allowed(mode="auto", tools=[]), "tool_choice.allowed_tools.tools"),
        ([nest()], allowed(mode="auto", tools=[1]), "tool_choice.allowed_tools.tools[0]"),
        (
            [nest()],
            allowed(mode="auto", tools=[{"type": "function", "function": {"name": "g"}}]),
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_what_is_wrong_is_named(tools: list[Any], choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tools, choice)
    assert caught.value.param == param
