"""Google's `generationConfig`, `tools` and `toolConfig`: what they may hold and what they become."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ocserve.api import fields, google_schema, protojson, sampling, tools
from ocserve.api.fields import Field, Values
from ocserve.errors import InvalidRequest
from ocserve.generation import (
    Constraint,
    GrammarConstraint,
    JsonConstraint,
    Reasoning,
    Sampling,
    Tool,
    ToolChoice,
)
from ocserve.modelcard import ServedModel

MAX_CANDIDATES = 8
_MAX_INT = 2**31 - 1
_MAX_STOPS = 16
_SCHEMA = {"type": "object"}
_TEXT, _JSON, _ENUM = "text/plain", "application/json", "text/x.enum"
_LEVELS = ("MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH")
_UNSPECIFIED = "THINKING_LEVEL_UNSPECIFIED"

THINKING = protojson.table(
    Field("includeThoughts", "effective", fields.boolean()),
    Field("thinkingBudget", "effective", protojson.whole(-1, _MAX_INT)),
    Field("thinkingLevel", "effective", protojson.enum(*_LEVELS, _UNSPECIFIED)),
)
CONFIG = protojson.table(
    Field("temperature", "effective", fields.number(0, 2)),
    Field("topP", "effective", fields.number(0, 1, above_low=True)),
    Field("topK", "effective", protojson.whole(0, _MAX_INT)),
    Field("candidateCount", "effective", protojson.whole(1, MAX_CANDIDATES)),
    Field("maxOutputTokens", "effective", protojson.whole(1, _MAX_INT)),
    Field("stopSequences", "effective", fields.strings(_MAX_STOPS, fields.MAX_STOP_LENGTH)),
    Field("seed", "effective", protojson.whole(-(2**31), _MAX_INT)),
    Field("presencePenalty", "effective", fields.number(-2, 2)),
    Field("frequencyPenalty", "effective", fields.number(-2, 2)),
    Field("responseLogprobs", "effective", fields.boolean()),
    Field("logprobs", "effective", protojson.whole(0, 20)),
    Field("responseMimeType", "effective", fields.word(_TEXT, _JSON, _ENUM)),
    Field("responseSchema", "effective", fields.mapping, shape=_SCHEMA),
    Field("responseJsonSchema", "effective", fields.mapping, shape=_SCHEMA),
    Field("thinkingConfig", "effective", fields.pairs(8), of=THINKING),
    Field("mediaResolution", "advisory", fields.string(64)),
    Field("enableEnhancedCivicAnswers", "advisory", fields.boolean()),
    Field("responseModalities", "unsupported", fields.items(8), neutral=(["TEXT"], [])),
    *(
        Field(name, "unsupported")
        for name in (
            "responseFormat", "speechConfig", "imageConfig", "audioTimestamp", "routingConfig", "modelSelectionConfig",
            "enableAffectiveDialog", "audioTranscriptionConfig", "translationConfig", "continuationToken",
        )
    ),
)  # fmt: skip

FUNCTION = protojson.table(
    Field("name", "effective", tools.tool_name(), required=True),
    Field("description", "effective", fields.string(tools.MAX_DESCRIPTION)),
    Field("parameters", "effective", fields.mapping, shape=_SCHEMA),
    Field("parametersJsonSchema", "effective", tools.parameters_schema()),
    Field("response", "advisory", fields.mapping, shape=_SCHEMA),
    Field("responseJsonSchema", "advisory", fields.mapping, shape=_SCHEMA),
    Field("behavior", "advisory", fields.string(64)),
)
TOOL = protojson.table(
    Field("functionDeclarations", "effective", fields.items(tools.MAX_TOOLS), of=FUNCTION),
    *(
        Field(name, "unsupported")
        for name in (
            "googleSearch", "googleSearchRetrieval", "codeExecution", "urlContext", "computerUse", "fileSearch",
            "googleMaps", "mcpServers", "retrieval", "enterpriseWebSearch", "parallelAiSearch", "exaAiSearch",
        )
    ),
)  # fmt: skip
_MODES: dict[str, tools.Mode] = {
    "AUTO": "auto",
    "VALIDATED": "auto",
    "MODE_UNSPECIFIED": "auto",
    "ANY": "required",
    "NONE": "none",
}
CALLING = protojson.table(
    Field("mode", "effective", protojson.enum(*_MODES)),
    Field("allowedFunctionNames", "effective", fields.strings(tools.MAX_TOOLS, 1024)),
    Field("streamFunctionCallArguments", "unsupported", fields.boolean(), neutral=(False,)),
)
TOOL_CONFIG = protojson.table(
    Field("functionCallingConfig", "effective", fields.pairs(8), of=CALLING),
    Field("retrievalConfig", "unsupported"),
    Field("includeServerSideToolInvocations", "unsupported", fields.boolean(), neutral=(False,)),
)


class ConfigReader:
    """Reads one request's settings and tools and gathers the names of what it ignored in them.

    `at` stands before all paths: a request may be part of another.
    """

    def __init__(self, model: ServedModel, at: str = "", *, refuse_unknown: bool) -> None:
        self._model = model
        self._at = at
        self._config_path = f"{at}generationConfig"
        self.paths = {"messages": f"{at}contents"}  # what the engine calls parts of a request, and what they are here
        self._refuse_unknown = refuse_unknown
        self.ignored: list[str] = []

    def config(self, value: dict[str, object] | None) -> Values:
        """`generationConfig` itself; the other methods take what this gives."""
        return self._read(value or {}, CONFIG, self._config_path)

    def sampling(self, config: Values) -> Sampling:
        """How to draw tokens."""
        return sampling.sampling(
            {
                "temperature": config.get("temperature", float),
                "top_p": config.get("topP", float),
                "top_k": config.get("topK", int),
                "seed": config.get("seed", int),
                "presence_penalty": config.get("presencePenalty", float),
                "frequency_penalty": config.get("frequencyPenalty", float),
            },
            self._model,
        )

    def logprobs(self, config: Values) -> int | None:
        """How many alternatives of each token are asked for; None without `responseLogprobs`."""
        wanted, most = config.get("responseLogprobs", bool), config.get("logprobs", int)
        if most is not None and not wanted:
            where = f"{self._config_path}.logprobs"
            raise InvalidRequest(f"'{where}' is only allowed where 'responseLogprobs' is true.", param=where)
        return (most or 0) if wanted else None

    def thinking(self, config: Values) -> tuple[Reasoning, bool]:
        """How the model is to think, and whether the client wants to see it."""
        given = config.get("thinkingConfig", dict) or {}
        values = self._read(given, THINKING, f"{self._config_path}.thinkingConfig")
        budget, level = values.get("thinkingBudget", int), values.get("thinkingLevel", str)
        reasoning = Reasoning(
            enabled=None if budget in (None, -1) else budget != 0,  # -1: as the model likes
            effort=level.lower() if level not in (None, _UNSPECIFIED) else None,
            max_tokens=budget if budget is not None and budget > 0 else None,
        )
        if "reasoning" not in self._model.capabilities:
            wishes = {"thinkingBudget": reasoning.enabled, "thinkingLevel": reasoning.effort}
            self.ignored += [f"{self._config_path}.thinkingConfig.{name}" for name, wish in wishes.items() if wish]
        return reasoning, values.get("includeThoughts", bool) or False

    def constraint(self, config: Values) -> Constraint | None:
        """What the answer must be."""
        kind = config.get("responseMimeType", str) or _TEXT
        path = self._config_path
        own, standard = config.get("responseSchema", dict), config.get("responseJsonSchema", dict)
        if own is not None and standard is not None:
            where = f"{path}.responseJsonSchema"
            raise InvalidRequest(f"'{where}' and 'responseSchema' exclude one another.", param=where)
        name = "responseSchema" if standard is None else "responseJsonSchema"
        where = f"{path}.{name}"
        if kind == _TEXT:
            if own is not None or standard is not None:
                raise InvalidRequest(f"'{where}' needs a 'responseMimeType' of '{_JSON}'.", param=where)
            return None
        if kind == _ENUM:
            if own is None:
                raise fields.missing(f"{path}.responseSchema")
            self.paths["response_format.grammar"] = where
            return GrammarConstraint(text=google_schema.alternatives(own, where), syntax="regex")
        self.paths["response_format.json_schema.schema"] = where
        schema = google_schema.json_schema(own, where) if own is not None else standard
        return JsonConstraint(schema=None if schema is None else json.dumps(schema, ensure_ascii=False))

    def tools(self, given: list[object] | None) -> tuple[Tool, ...]:
        """The functions of all entries of `tools`."""
        found: list[Tool] = []
        paths: list[str] = []
        for index, value in enumerate(given or []):
            path = f"{self._at}tools[{index}]"
            declared = self._read(value, TOOL, path).get("functionDeclarations", list) or []
            for number, function in enumerate(declared):
                paths.append(f"{path}.functionDeclarations[{number}]")
                if len(paths) > tools.MAX_TOOLS:
                    raise InvalidRequest(f"A request has at most {tools.MAX_TOOLS} functions.", param=paths[-1])
                self.paths[f"tools[{len(found)}].function.parameters"] = f"{paths[-1]}.parameters"
                found.append(self._function(function, paths[-1]))
        return tools.distinct(found, lambda index: f"{paths[index]}.name")

    def choice(self, value: dict[str, object] | None, given: tuple[Tool, ...]) -> ToolChoice:
        """What `toolConfig` makes of the tools."""
        path = f"{self._at}toolConfig"
        where = f"{path}.functionCallingConfig"
        outer = self._read(value or {}, TOOL_CONFIG, path)
        config = self._read(outer.get("functionCallingConfig", dict) or {}, CALLING, where)
        word = config.get("mode", str) or "AUTO"
        names = config.get("allowedFunctionNames", tuple) or ()
        at = f"{where}.allowedFunctionNames"
        if names and word not in ("ANY", "VALIDATED"):
            raise InvalidRequest(f"'{at}' is only allowed where 'mode' is ANY or VALIDATED.", param=at)
        for index, name in enumerate(names):
            tools.named(name, given, f"{at}[{index}]")
        return tools.choice(_MODES[word], given, where, names=names, parallel=True)

    def _function(self, value: object, path: str) -> Tool:
        values = self._read(value, FUNCTION, path)
        own, standard = values.get("parameters", dict), values.get("parametersJsonSchema", str)
        if own is not None:
            if standard is not None:
                where = f"{path}.parametersJsonSchema"
                raise InvalidRequest(f"'{where}' and 'parameters' exclude one another.", param=where)
            schema = google_schema.json_schema(own, f"{path}.parameters")
            standard = tools.parameters_schema()(schema, f"{path}.parameters")
        name, description = values.get("name", str) or "", values.get("description", str) or ""
        return Tool(name=name, description=description, parameters=standard)

    def _read(self, value: object, table: Mapping[str, Field], path: str) -> Values:
        values = fields.read(fields.mapping(value, path), table, refuse_unknown=self._refuse_unknown, path=path)
        self.ignored += values.ignored
        return values
