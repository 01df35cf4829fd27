"""OpenAI's chat completions: the request. How the answer is written is `openai_chunks`'."""

from __future__ import annotations

from functools import partial

from ocserve.api import fields, json_body, openai_format, openai_reasoning, openai_sampling, openai_wire
from ocserve.api.dialect import Models, Parsed, Reply
from ocserve.api.fields import Field, Values
from ocserve.api.openai_chunks import ChatEncoder
from ocserve.api.openai_messages import MAX_MESSAGES, MESSAGE, MessageReader
from ocserve.api.openai_wire import error_body
from ocserve.api.tools import MAX_TOOLS, NESTED, TOOL_CHOICE, ToolReader
from ocserve.errors import InvalidRequest
from ocserve.generation import ChatPrompt, GenerateRequest, Tool, ToolChoice

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_INT = 2**31 - 1
_MAX_TOP = 20
_MAX_PARTS = 1024
_TEXT = 64 * 1024 * 1024  # the body's own limit is far below

TEXT_PART = fields.table(
    Field("type", "effective", fields.word("text"), required=True),
    Field("text", "effective", fields.string(_TEXT), required=True),
)
PREDICTION = fields.table(
    Field("type", "effective", fields.word("content"), required=True),
    Field("content", "effective", required=True, shape={"anyOf": [{"type": "string"}, {"type": "array"}]}),
)
PARAMETERS: tuple[Field, ...] = (
    Field("messages", "effective", fields.items(MAX_MESSAGES, least=1), required=True, of=MESSAGE),
    *openai_sampling.SHARED,
    Field("max_tokens", "effective", fields.integer(1, _MAX_INT)),
    Field("max_completion_tokens", "effective", fields.integer(1, _MAX_INT)),
    Field("logprobs", "effective", fields.boolean()),
    Field("top_logprobs", "effective", fields.integer(0, _MAX_TOP)),
    Field("tools", "effective", fields.items(MAX_TOOLS), of=NESTED),
    Field("tool_choice", "effective", shape=TOOL_CHOICE),
    Field("parallel_tool_calls", "effective", fields.boolean()),
    Field("response_format", "effective", fields.pairs(8), of=openai_format.FORMAT),
    *openai_format.GUIDED,
    *openai_reasoning.PARAMETERS,
    Field("prediction", "effective", fields.pairs(8), of=PREDICTION),
    Field("verbosity", "advisory", fields.word("low", "medium", "high", "xhigh", "max")),
    Field("functions", "unsupported", fields.items(128), neutral=([],)),
    Field("function_call", "unsupported", neutral=("none", "auto")),
    Field("modalities", "unsupported", fields.items(8), neutral=(["text"],)),
    Field("audio", "unsupported"),
    Field("web_search_options", "unsupported"),
    Field("moderation", "unsupported"),
)
_TABLE = openai_sampling.table(*PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The chat request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    model = openai_sampling.model_of(values, models)
    options = openai_sampling.stream_options(values, refuse_unknown=refuse_unknown)
    reader = MessageReader(model, refuse_unknown=refuse_unknown)
    turns = reader.read(values.get("messages", list))
    tools, choice, unread_tools = _tools(values, refuse_unknown=refuse_unknown)
    constraint, paths, unread = openai_format.asked(values, refuse_unknown=refuse_unknown)
    wish = openai_reasoning.read(values, model, refuse_unknown=refuse_unknown)
    logprobs = _logprobs(values)
    request = GenerateRequest(
        request_id="",
        model=model.id,
        prompt=ChatPrompt(messages=turns, tools=tools, reasoning=wish.reasoning),
        sampling=openai_sampling.sampling(values, model),
        max_tokens=openai_sampling.output_limit(values, model),
        choices=values.get("n", int) or 1,
        constraint=constraint,
        tool_choice=choice,
        logprobs=logprobs,
        prediction=_prediction(values, refuse_unknown=refuse_unknown),
        stop=values.get("stop", tuple) or (),
        deadline_s=model.wall_clock_s,
    )
    return Parsed(
        request=request,
        model=model,
        stream=values.get("stream", bool) or False,
        ignored=(
            *(*values.ignored, *options.ignored, *reader.ignored, *unread_tools, *unread, *wish.ignored),
            *(("prediction",) if request.prediction is not None and not _is_drafted(request) else ()),
        ),
        include_usage=options.get("include_usage", bool),
        show_reasoning=wish.shown,
        paths=paths,
        encoder=partial(
            ChatEncoder,
            fingerprint=openai_wire.fingerprint(model),
            service_tier=openai_sampling.served_tier(values),
            calls=bool(tools) and choice.mode != "none",
            logprobs=logprobs is not None,
        ),
    )


def _tools(values: Values, *, refuse_unknown: bool) -> tuple[tuple[Tool, ...], ToolChoice, list[str]]:
    """The tools, the choice among them, and the paths of what was ignored."""
    reader = ToolReader(refuse_unknown=refuse_unknown, nested=True)
    tools = reader.tools(values.get("tools", list) or [])
    parallel = values.get("parallel_tool_calls", bool)
    choice = reader.choice(values.get("tool_choice", object), tools, parallel=parallel is not False)
    return tools, choice, reader.ignored


def _logprobs(values: Values) -> int | None:
    """How many alternatives to each token, None if no log-probabilities are wanted."""
    top = values.get("top_logprobs", int)
    if values.get("logprobs", bool):
        return top or 0
    if top:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    return None


def _is_drafted(request: GenerateRequest) -> bool:
    """Whether the engine may draft at all: not with a seed, since batches round otherwise, nor where masks hold."""
    tools = isinstance(request.prompt, ChatPrompt) and request.prompt.tools and request.tool_choice.mode != "none"
    return request.sampling.seed is None and request.constraint is None and not tools


def _prediction(values: Values, *, refuse_unknown: bool) -> str | None:
    """The predicted text."""
    given = values.get("prediction", dict)
    if given is None:
        return None
    content = fields.read(given, PREDICTION, refuse_unknown=refuse_unknown, path="prediction").get("content", object)
    path = "prediction.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong_type(path, "a string or an array of parts", content)
    texts = []
    for index, item in enumerate(fields.array(content, path, 1, _MAX_PARTS)):
        where = f"{path}[{index}]"
        part = fields.read(fields.mapping(item, where), TEXT_PART, refuse_unknown=refuse_unknown, path=where)
        texts.append(part.get("text", str) or "")
    return "".join(texts)


def encoder(reply: Reply) -> ChatEncoder:
    """A fresh encoder for one reply to a request that asked for nothing special."""
    return ChatEncoder(reply)
