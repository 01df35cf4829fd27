"""The parameters of OpenAI's Responses beside its items: tables, and what becomes of the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from ocserve.api import fields, openai_format, openai_sampling, tools
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.openai_reasoning import EFFORTS
from ocserve.errors import InvalidRequest
from ocserve.generation import Constraint, JsonConstraint, Reasoning, Sampling, Tool, ToolChoice
from ocserve.modelcard import ServedModel

Wire = dict[str, object]

_TEXT = 64 * 1024 * 1024  # the body's own limit is far below
_MAX_INT = 2**31 - 1
_MAX_ID = 256
_LOGPROBS = "message.output_text.logprobs"
# What the others add belongs to tools that are not offered here, or is there anyway.
_INCLUDES = (
    _LOGPROBS, "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip
_SUMMARIES = fields.word("auto", "concise", "detailed")


def _metadata() -> Reader[dict[str, str]]:
    """Up to 16 strings by name; they come back with the response and are kept with it."""
    name_of, value_of = fields.string(256), fields.string(2048)

    def reader(value: object, where: str) -> dict[str, str]:
        return {name_of(name, where): value_of(text, where) for name, text in fields.pairs(16)(value, where).items()}

    return Reader(reader, {"type": "object", "maxProperties": 16, "additionalProperties": value_of.schema})


FORMAT = fields.table(
    Field("type", "effective", fields.word("text", "json_object", "json_schema"), required=True),
    *(replace(field, required=False) for field in openai_format.JSON_SCHEMA.values()),  # of that type only
)
TEXT = fields.table(
    Field("format", "effective", fields.pairs(8), of=FORMAT),
    Field("verbosity", "advisory", fields.word("low", "medium", "high")),
)
REASONING = fields.table(
    Field("effort", "effective", fields.word(*EFFORTS)),
    Field("summary", "effective", _SUMMARIES),
    Field("generate_summary", "effective", _SUMMARIES),
    Field("mode", "unsupported", fields.string(64), neutral=("standard",)),
    Field("context", "advisory", fields.word("auto", "current_turn", "all_turns")),
)

# What chat completions have too, and read alike.
_SHARED = (
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "seed", "logit_bias", "stop", "user", "safety_identifier", "session_id",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier",
)  # fmt: skip
# What a response repeats although it had no effect.
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "max_tool_calls")
PARAMETERS: tuple[Field, ...] = (
    Field("input", "effective", required=True, shape={"type": ["string", "array"]}),
    *(field for field in openai_sampling.SHARED if field.name in _SHARED),
    Field("instructions", "effective", fields.string(_TEXT)),
    Field("previous_response_id", "effective", fields.string(_MAX_ID, empty=False)),
    Field("store", "effective", fields.boolean()),
    Field("metadata", "effective", _metadata()),
    Field("max_output_tokens", "effective", fields.integer(1, _MAX_INT)),
    Field("tools", "effective", fields.items(tools.MAX_TOOLS)),
    Field("tool_choice", "effective", shape={"type": ["string", "object"]}),
    Field("parallel_tool_calls", "effective", fields.boolean()),
    Field("text", "effective", fields.pairs(8), of=TEXT),
    Field("reasoning", "effective", fields.pairs(8), of=REASONING),
    Field("top_logprobs", "effective", fields.integer(0, 20)),
    Field("include", "effective", fields.items(32)),
    Field("truncation", "effective", fields.word("auto", "disabled")),
    Field("max_tool_calls", "advisory", fields.integer(1, _MAX_INT)),  # of tools that a server runs by itself
    Field("client_metadata", "advisory", fields.pairs(64)),
    Field("background", "unsupported", fields.boolean(), neutral=(False,)),
    Field("conversation", "unsupported"),
    Field("prompt", "unsupported"),
    Field("context_management", "unsupported", fields.items(8), neutral=([],)),
    Field("moderation", "unsupported"),
)
_TABLE = fields.table(*PARAMETERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The parameters of one request, read. `form` is `text.format` as a response repeats it; so are the `labels`.

    `paths` are what the engine calls the tools' schemas, and what the client called them.
    """

    values: Values
    labels: Wire
    constraint: Constraint | None
    form: Wire
    tools: tuple[Tool, ...]
    tool_choice: ToolChoice
    effort: str | None
    summary: str | None
    logprobs: int | None
    ignored: tuple[str, ...]
    paths: Mapping[str, str]

    def text(self, name: str) -> str | None:
        """A parameter that is a string."""
        return self.values.get(name, str)

    @property
    def reasoning(self) -> Reasoning:
        """How the model is to think."""
        if self.effort is None or self.effort == "none":
            return Reasoning(enabled=None if self.effort is None else False)
        return Reasoning(enabled=True, effort=self.effort)

    def check(self, model: ServedModel) -> None:
        """Refuse what this model cannot do."""
        if self.reasoning.enabled and "reasoning" not in model.capabilities:
            raise fields.unsupported("reasoning.effort", "this model does not reason.")

    def limit(self, model: ServedModel) -> int:
        """The bound on sampled tokens."""
        limit = self.values.get("max_output_tokens", int)
        if limit is None:
            return min(model.default_output_tokens, model.max_output_tokens)
        return fields.integer(1, model.max_output_tokens)(limit, "max_output_tokens")

    def echo(self, model: ServedModel, sampling: Sampling, *, store: bool) -> Wire:
        """The fields of a response that say what it was made with. Nothing is ever cut from a prompt to make it fit."""
        return {
            "model": model.id,
            "instructions": self.text("instructions"),
            "previous_response_id": self.text("previous_response_id"),
            "store": store,
            "background": False,
            "metadata": self.values.get("metadata", dict) or {},
            "max_output_tokens": self.values.get("max_output_tokens", int),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "top_logprobs": self.values.get("top_logprobs", int) or 0,
            "tools": [_function(tool) for tool in self.tools],
            "tool_choice": self.values.get("tool_choice", object) or "auto",
            "parallel_tool_calls": self.tool_choice.parallel,
            "text": {"format": self.form, "verbosity": "medium"},
            "reasoning": {"effort": self.effort, "summary": self.summary},
            "truncation": "disabled",
            "service_tier": "default",
            **self.labels,
        }


def read(source: dict[str, object], *, refuse_unknown: bool) -> Wishes:
    """The parameters in `source`."""

    def inner(name: str, table: dict[str, Field]) -> Values:
        return fields.read(values.get(name, dict) or {}, table, refuse_unknown=refuse_unknown, path=name)

    values = fields.read(source, _TABLE, refuse_unknown=refuse_unknown)
    options = openai_sampling.stream_options(values, refuse_unknown=refuse_unknown)
    text, thought = inner("text", TEXT), inner("reasoning", REASONING)
    constraint, form, unused = _constraint(text.get("format", dict), refuse_unknown=refuse_unknown)
    given, choice, places, skipped = _tools(values, refuse_unknown=refuse_unknown)
    wants_logprobs, unread = _includes(values.get("include", list) or [])
    top = values.get("top_logprobs", int) or 0
    summary = thought.get("summary", str) or thought.get("generate_summary", str)
    without_effect = [
        *(["truncation"] if values.get("truncation", str) == "auto" else []),
        *(["reasoning.summary"] if summary == "concise" else []),
    ]
    return Wishes(
        values=values,
        labels={name: source.get(name) for name in _LABELS},
        constraint=constraint,
        form=form,
        tools=given,
        tool_choice=choice,
        effort=thought.get("effort", str),
        summary=summary,
        logprobs=top if top or wants_logprobs else None,
        ignored=(
            *values.ignored, *options.ignored, *text.ignored, *thought.ignored, *unused, *skipped, *unread,
            *without_effect,
        ),
        paths={
            f"tools[{number}].function.parameters": f"{place}.parameters" for number, place in enumerate(places)
        },
    )  # fmt: skip


def _includes(given: Sequence[object]) -> tuple[bool, list[str]]:
    """Whether log-probabilities are asked for, and the paths of what asks for nothing here."""
    one = fields.word(*_INCLUDES)
    asked = [one(value, f"include[{index}]") for index, value in enumerate(given)]
    return _LOGPROBS in asked, [f"include[{index}]" for index, name in enumerate(asked) if name != _LOGPROBS]


def _constraint(value: Wire | None, *, refuse_unknown: bool) -> tuple[Constraint | None, Wire, tuple[str, ...]]:
    """What the answer must be, None for text; the format as it is repeated; the paths of what was ignored."""
    if value is None:
        return None, {"type": "text"}, ()
    path = "text.format"
    form = fields.read(value, FORMAT, refuse_unknown=refuse_unknown, path=path)
    kind = form.get("type", str)
    if kind == "json_schema":
        return openai_format.of_schema(form, path), {"strict": False, **value}, form.ignored
    for name in openai_format.JSON_SCHEMA:
        if name in form:
            where = f"{path}.{name}"
            raise InvalidRequest(f"'{where}' is only allowed where '{path}.type' is 'json_schema'.", param=where)
    return (None if kind == "text" else JsonConstraint()), {"type": kind}, form.ignored


def _tools(values: Values, *, refuse_unknown: bool) -> tuple[tuple[Tool, ...], ToolChoice, list[str], list[str]]:
    """The functions among `tools`, the choice among them, the functions' paths, and those of what was ignored.

    Tools of other types are passed over, not refused: agents offer every tool that they know to any server.
    """
    reader = tools.ToolReader(refuse_unknown=refuse_unknown, nested=False)
    found: list[Tool] = []
    places: list[str] = []
    skipped: list[str] = []
    for index, value in enumerate(values.get("tools", list) or []):
        path = f"tools[{index}]"
        if fields.mapping(value, path).get("type", "function") != "function":
            skipped.append(path)
        else:
            found.append(reader.tool(value, path))
            places.append(path)
    given = tools.distinct(found, lambda number: f"{places[number]}.name")
    parallel = values.get("parallel_tool_calls", bool)
    choice = reader.choice(values.get("tool_choice", object), given, parallel=parallel is not False)
    return given, choice, places, [*skipped, *reader.ignored]


def _function(tool: Tool) -> Wire:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": None if tool.parameters is None else msgspec.Raw(tool.parameters.encode()),
        "strict": tool.strict,
    }
