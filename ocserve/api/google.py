"""Google's generateContent: requests for one model, whole and streamed; and the count of a prompt's tokens.

The path names the model and says whether the answer streams, so a dialect is made for each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ocserve.api import fields, google_wire, json_body, protojson, sampling, tools
from ocserve.api.dialect import Framing, Models, Parsed, Reply
from ocserve.api.fields import Field, Values
from ocserve.api.google_config import CONFIG, TOOL, TOOL_CONFIG, ConfigReader
from ocserve.api.google_contents import CONTENT, MAX_CONTENTS, TEXT, ContentReader
from ocserve.api.google_wire import ContentEncoder, error_body
from ocserve.api.questions import Asked
from ocserve.errors import ErrorInfo, InvalidRequest, ModelNotFound
from ocserve.generation import Answer, ChatPrompt, Encoded, EncodeRequest, GenerateRequest
from ocserve.modelcard import ServedModel

__all__ = ["COUNTED", "PARAMETERS", "CountTokens", "GenerateContent", "error_body"]

# Names of the vendor's own models, which its clients send unasked: the default answers.
_VENDOR = "gemini-"

_PROMPT: tuple[Field, ...] = (
    Field("contents", "effective", fields.items(MAX_CONTENTS, least=1), required=True, of=CONTENT),
    Field("systemInstruction", "effective", fields.pairs(8), of=TEXT),
    Field("tools", "effective", fields.items(tools.MAX_TOOLS), of=TOOL),
    Field("toolConfig", "effective", fields.pairs(8), of=TOOL_CONFIG),
    Field("generationConfig", "effective", fields.pairs(64), of=CONFIG),
)
PARAMETERS: tuple[Field, ...] = (
    *_PROMPT,
    Field("safetySettings", "advisory", fields.items(64)),
    Field("labels", "advisory", fields.pairs(64)),
    Field("serviceTier", "advisory", fields.string(64)),
    Field("store", "advisory", fields.boolean(), neutral=(False,)),
    Field("cachedContent", "unsupported", fields.string(1024), neutral=("",)),
)
# A count takes contents, or the whole request that is to be counted.
COUNTED: tuple[Field, ...] = (
    Field("contents", "effective", fields.items(MAX_CONTENTS, least=1), of=CONTENT),
    Field("generateContentRequest", "effective", fields.pairs(64), of=protojson.table(*PARAMETERS)),
)
_TABLE = protojson.table(*PARAMETERS)
_COUNT_TABLE = protojson.table(*COUNTED)
_WHOLE_TABLE = protojson.table(*PARAMETERS, Field("model", "effective", fields.string(256)))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What a generation and a count share."""

    chat: ChatPrompt
    show_reasoning: bool
    config: Values
    reader: ConfigReader
    ignored: tuple[str, ...]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GenerateContent:
    """A `Dialect` for one request; `framing` None is an answer as a whole."""

    model: str
    framing: Framing | None = None

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
        """The request in `body`."""
        values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
        model, ignored = _model(self.model, models)
        prompt = _prompt(values, model, "", refuse_unknown=refuse_unknown)
        reader, config = prompt.reader, prompt.config
        limit = config.get("maxOutputTokens", int)
        request = GenerateRequest(
            request_id="",
            model=model.id,
            prompt=prompt.chat,
            sampling=reader.sampling(config),
            max_tokens=sampling.output_limit(limit, "generationConfig.maxOutputTokens", model),
            choices=config.get("candidateCount", int) or 1,
            constraint=reader.constraint(config),
            tool_choice=reader.choice(values.get("toolConfig", dict), prompt.chat.tools),
            logprobs=reader.logprobs(config),
            stop=config.get("stopSequences", tuple) or (),
            deadline_s=model.wall_clock_s,
        )
        return Parsed(
            request=request,
            model=model,
            stream=self.framing is not None,
            ignored=(*ignored, *values.ignored, *prompt.ignored, *reader.ignored),
            show_reasoning=prompt.show_reasoning,
            framing=self.framing or google_wire.EVENTS,
            paths=reader.paths,
            labels=prompt.labels,
        )

    def encoder(self, reply: Reply) -> ContentEncoder:
        """A fresh encoder for one reply."""
        return ContentEncoder(reply)

    def error_body(self, info: ErrorInfo) -> bytes:
        """The body of an error answer."""
        return error_body(info)


@dataclass(frozen=True, slots=True)
class CountTokens:
    """A `QuestionDialect` for one request: how many tokens its prompt has."""

    model: str

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Asked:
        """The question in `body`."""
        outer = fields.read(json_body.decode(body), _COUNT_TABLE, refuse_unknown=refuse_unknown)
        whole = outer.get("generateContentRequest", dict)
        if whole is not None and "contents" in outer:
            raise InvalidRequest(
                "'contents' and 'generateContentRequest' exclude one another.", param="generateContentRequest"
            )
        path = "" if whole is None else "generateContentRequest"
        values = outer if whole is None else fields.read(whole, _WHOLE_TABLE, refuse_unknown=refuse_unknown, path=path)
        if "contents" not in values:
            raise fields.missing("contents")
        model, ignored = _model(self.model, models)
        prompt = _prompt(values, model, path, refuse_unknown=refuse_unknown)
        prompt.reader.choice(values.get("toolConfig", dict), prompt.chat.tools)  # of no effect, but refused if wrong
        question = EncodeRequest(request_id="", model=model.id, prompt=prompt.chat, count_only=True)
        named = outer.ignored if whole is None else (*outer.ignored, *values.ignored)
        ignored = (*ignored, *named, *prompt.ignored, *prompt.reader.ignored)
        return Asked(question=question, model=model, reply=_count, ignored=ignored, paths=prompt.reader.paths)

    def error_body(self, info: ErrorInfo) -> bytes:
        """The body of an error answer."""
        return error_body(info)


def _count(answer: Answer) -> bytes:
    assert isinstance(answer, Encoded)
    return google_wire.dumps({"totalTokens": answer.count})


def _prompt(values: Values, model: ServedModel, path: str, *, refuse_unknown: bool) -> _Prompt:
    at = f"{path}." if path else ""
    reader = ConfigReader(model, at, refuse_unknown=refuse_unknown)
    turns = ContentReader(model, at, refuse_unknown=refuse_unknown)
    config = reader.config(values.get("generationConfig", dict))
    reasoning, shown = reader.thinking(config)
    messages = (*turns.system(values.get("systemInstruction", dict)), *turns.contents(values.get("contents", list)))
    chat = ChatPrompt(messages=messages, tools=reader.tools(values.get("tools", list)), reasoning=reasoning)
    return _Prompt(chat, shown, config, reader, tuple(turns.ignored), turns.labels)


def _model(name: str, models: Models) -> tuple[ServedModel, tuple[str, ...]]:
    """The model that the path names, and what was ignored to find it."""
    try:
        return models(name), ()
    except ModelNotFound:
        if not name.startswith(_VENDOR):
            raise
        return models("default"), ("model",)  # the answer says which one it is
