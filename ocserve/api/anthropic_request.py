"""What Anthropic's messages and counts share: the prompt's parameters, and what they become."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ocserve.api import fields, tools
from ocserve.api.anthropic_messages import MAX_MESSAGES, MessageReader
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest, ModelNotFound
from ocserve.generation import ChatPrompt, JsonConstraint, Reasoning, Tool, ToolChoice
from ocserve.modelcard import ServedModel

_MAX_INT = 2**31 - 1
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
# Names of the vendor's own models, which its clients send unasked (for titles, for summaries): the default answers.
_VENDOR = "claude-"

THINKING = fields.table(
    Field("type", "effective", fields.word("enabled", "adaptive", "disabled"), required=True),
    Field("budget_tokens", "effective", fields.integer(1, _MAX_INT)),
    Field("display", "effective", fields.word("summarized", "omitted")),
)
FORMAT = fields.table(
    Field("type", "effective", fields.word("json_schema"), required=True),
    Field("schema", "effective", fields.mapping, required=True, shape={"type": "object"}),
)
OUTPUT = fields.table(
    Field("effort", "effective", fields.word(*_EFFORTS)),
    Field("format", "effective", fields.pairs(8), of=FORMAT),
)
TOOL = fields.table(
    Field("type", "effective", fields.word("custom")),
    Field("name", "effective", tools.tool_name(), required=True),
    Field("description", "effective", fields.string(tools.MAX_DESCRIPTION)),
    Field("input_schema", "effective", tools.parameters_schema(), required=True),
    Field("strict", "effective", fields.boolean()),
    Field("cache_control", "advisory", fields.pairs(8)),
    Field("input_examples", "advisory", fields.items(64)),
    Field("eager_input_streaming", "advisory", fields.boolean()),
    Field("defer_loading", "unsupported", fields.boolean(), neutral=(False,)),
    Field("allowed_callers", "unsupported", fields.items(8), neutral=([], ["direct"])),
)
CHOICE = fields.table(
    Field("type", "effective", fields.word("auto", "any", "tool", "none"), required=True),
    Field("name", "effective", fields.string(1024, empty=False)),
    Field("disable_parallel_tool_use", "effective", fields.boolean()),
)
_MODES: dict[str, tools.Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}

PROMPT: tuple[Field, ...] = (
    Field("model", "effective", fields.string(256, empty=False), required=True),
    Field("messages", "effective", fields.items(MAX_MESSAGES, least=1), required=True),
    Field("system", "effective", shape={"anyOf": [{"type": "string"}, {"type": "array"}]}),
    Field("tools", "effective", fields.items(tools.MAX_TOOLS), of=TOOL),
    Field("tool_choice", "effective", fields.pairs(8), of=CHOICE),
    Field("thinking", "effective", fields.pairs(8), of=THINKING),
    Field("output_config", "effective", fields.pairs(8), of=OUTPUT),
    Field("cache_control", "advisory", fields.pairs(8)),
    Field("context_management", "advisory", fields.pairs(8)),
    Field("speed", "advisory", fields.word("standard", "fast"), neutral=("standard",)),
    Field("mcp_servers", "unsupported", fields.items(64), neutral=([],)),
)


@dataclass(slots=True)
class _Thinking:
    reasoning: Reasoning
    shown: bool


class Request:
    """Reads the parts of one request that are tables of their own, and gathers the names of what it ignored."""

    def __init__(self, values: Values, models: Models, *, refuse_unknown: bool) -> None:
        self._values = values
        self._refuse_unknown = refuse_unknown
        self.ignored = [*values.ignored]
        self.model = self._model(models)
        self._output = self._inner(values.get("output_config", dict) or {}, OUTPUT, "output_config")
        self._thinking = self._read_thinking()
        if "reasoning" not in self.model.capabilities:
            wishes = {
                "thinking": self._thinking.reasoning.enabled,
                "output_config.effort": self._output.get("effort", str),
            }
            self.ignored += [name for name, wish in wishes.items() if wish]

    @property
    def thoughts_shown(self) -> bool:
        """Whether the client wants the text of what the model thinks."""
        return self._thinking.shown

    def prompt(self) -> ChatPrompt:
        """The conversation, the tools and how to think."""
        reader = MessageReader(self.model, refuse_unknown=self._refuse_unknown)
        system = reader.system(self._values.get("system", object))
        turns = (*system, *reader.messages(self._values.get("messages", list)))
        self.ignored += reader.ignored
        return ChatPrompt(messages=turns, tools=self._tools(), reasoning=self._thinking.reasoning)

    @property
    def paths(self) -> dict[str, str]:
        """What the engine calls parts of a request, and what they are called here."""
        form = "output_config.format" if self._values.get("output_format", dict) is None else "output_format"
        return {"response_format.json_schema.schema": f"{form}.schema", ".function.parameters": ".input_schema"}

    def choice(self, given: tuple[Tool, ...]) -> ToolChoice:
        """What `tool_choice` makes of the tools."""
        value = self._values.get("tool_choice", dict)
        if value is None:
            return ToolChoice()
        values = self._inner(value, CHOICE, "tool_choice")
        kind, name = values.get("type", str) or "auto", values.get("name", str)
        names: tuple[str, ...] = ()
        if kind == "tool":
            names = (tools.named(name, given, "tool_choice.name"),)
        elif name is not None:
            raise InvalidRequest(
                "'tool_choice.name' is only allowed where 'tool_choice.type' is 'tool'.", param="tool_choice.name"
            )
        parallel = not values.get("disable_parallel_tool_use", bool)
        return tools.choice(_MODES[kind], given, "tool_choice", names=names, parallel=parallel)

    def constraint(self) -> JsonConstraint | None:
        """What the answer must be: `output_config.format`, or `output_format`, its name in the beta."""
        older = self._values.get("output_format", dict)
        newer = self._output.get("format", dict)
        if older is not None and newer is not None:
            raise InvalidRequest(
                "'output_format' and 'output_config.format' are two names of one thing.", param="output_format"
            )
        given, where = (older, "output_format") if newer is None else (newer, "output_config.format")
        if given is None:
            return None
        schema = self._inner(given, FORMAT, where).get("schema", dict)
        return JsonConstraint(schema=json.dumps(schema, ensure_ascii=False))

    def _model(self, models: Models) -> ServedModel:
        name = self._values.get("model", str)
        assert name is not None
        try:
            return models(name)
        except ModelNotFound:
            if not name.startswith(_VENDOR):
                raise
            self.ignored.append("model")  # the answer says which one it is
            return models("default")

    def _tools(self) -> tuple[Tool, ...]:
        given: list[object] = self._values.get("tools", list) or []
        found = [self._tool(value, f"tools[{index}]") for index, value in enumerate(given)]
        return tools.distinct(found, lambda index: f"tools[{index}].name")

    def _tool(self, value: object, path: str) -> Tool:
        kind = fields.mapping(value, path).get("type")
        if isinstance(kind, str) and kind != "custom":
            raise fields.unsupported(f"{path}.type", "tools that run on the server are not offered.")
        values = self._inner(value, TOOL, path)
        return Tool(
            name=values.get("name", str) or "",
            description=values.get("description", str) or "",
            parameters=values.get("input_schema", str),
            strict=values.get("strict", bool) or False,
        )

    def _read_thinking(self) -> _Thinking:
        effort = self._output.get("effort", str)
        given = self._values.get("thinking", dict)
        if given is None:
            return _Thinking(Reasoning(effort=effort), shown=True)
        values = self._inner(given, THINKING, "thinking")
        kind, budget, where = values.get("type", str), values.get("budget_tokens", int), "thinking.budget_tokens"
        if kind == "enabled" and budget is None:
            raise fields.missing(where)
        if kind != "enabled" and budget is not None:
            raise InvalidRequest(f"'{where}' is only allowed where 'thinking.type' is 'enabled'.", param=where)
        limit = self._values.get("max_tokens", int)
        if budget is not None and limit is not None and budget >= limit:
            raise InvalidRequest(f"Invalid '{where}': it must be less than 'max_tokens' ({limit}).", param=where)
        reasoning = Reasoning(enabled=kind != "disabled", effort=effort, max_tokens=budget)
        return _Thinking(reasoning, shown=values.get("display", str) != "omitted")

    def _inner(self, value: object, table: dict[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values
