"""llama-server's `/completion`: raw text or token ids in, `content` out.

Editors' completion plug-ins and scripts speak it. Only the prompt is required; `n_predict` -1 is as many tokens as this
server gives, and what a request does not say is as the model's card has it, not as llama-server's command line would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ocserve.api import charge, fields, json_body, openai_format, openai_sampling
from ocserve.api.dialect import Frame, Models, Parsed, Reply
from ocserve.api.fields import Field, Reader, Values
from ocserve.api.llama_server import MODEL, model_of
from ocserve.api.openai_wire import dumps, error_body
from ocserve.api.sampling import output_limit, seed
from ocserve.generation import (
    Failed,
    Finished,
    GenerateEvent,
    GenerateRequest,
    JsonConstraint,
    Prompt,
    TextDelta,
    TextPrompt,
    TokenChance,
    TokenLogprob,
    TokenPrompt,
    Usage,
)
from ocserve.modelcard import ServedModel

__all__ = ["PARAMETERS", "encoder", "error_body", "parse"]

_MAX_INT = 2**31 - 1
_MAX_TOKENS = 2**20  # above any context; the engine knows the real limit
_TEXT = fields.string(64 * 1024 * 1024)  # the body's own limit is far below


def _prompt() -> Reader[Prompt]:
    def reader(value: object, where: str) -> Prompt:
        if isinstance(value, str):
            return TextPrompt(text=value)
        if not isinstance(value, list):
            raise fields.wrong_type(where, "a string or an array of token ids", value)
        return TokenPrompt(tokens=fields.token_ids(fields.array(value, where, 1, _MAX_TOKENS), where))

    return Reader(reader, {"anyOf": [{"type": "string"}, fields.lists_of_ids(_MAX_TOKENS)]})


def _biases() -> Reader[dict[int, float]]:
    """As OpenAI writes it, or as pairs of a token id and a bias or `false`, which is never to be drawn."""
    mapping, token, bias = fields.logit_biases(), fields.TOKEN_ID, fields.number(-100, 100)

    def reader(value: object, where: str) -> dict[int, float]:
        if isinstance(value, dict):
            return mapping(value, where)
        found: dict[int, float] = {}
        for index, item in enumerate(fields.array(value, where, 0, fields.MAX_BIASES)):
            pair = fields.array(item, f"{where}[{index}]", 2, 2)
            number = token(pair[0], f"{where}[{index}][0]")
            found[number] = -100.0 if pair[1] is False else bias(pair[1], f"{where}[{index}][1]")
        return found

    pair = {"type": "array", "prefixItems": [token.schema, {"anyOf": [bias.schema, {"const": False}]}]}
    pairs = {"type": "array", "items": {**pair, "minItems": 2, "maxItems": 2}, "maxItems": fields.MAX_BIASES}
    return Reader(reader, {"anyOf": [mapping.schema, pairs]})


def _schema() -> Reader[JsonConstraint]:
    def reader(value: object, where: str) -> JsonConstraint:
        return JsonConstraint(schema=json.dumps(fields.mapping(value, where), ensure_ascii=False))

    return Reader(reader, {"type": "object"})


# What tunes llama-server's own machinery and leaves the answer's distribution as it is.
_MACHINERY = (
    "cache_prompt", "samplers", "id_slot", "n_keep", "n_cache_reuse", "t_max_predict_ms", "t_max_prompt_ms",
    "timings_per_token", "return_progress", "sse_ping_interval", "response_fields", "min_keep",
)  # fmt: skip
_REFUSED: dict[str, tuple[object, ...]] = {
    "grammar": ("",),
    "ignore_eos": (False,),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "n_indent": (0,),
    "lora": ([],),
    "image_data": ([],),
}
SHARED: tuple[Field, ...] = (
    MODEL,
    Field("stream", "effective", fields.boolean()),
    Field("n_predict", "effective", fields.integer(-1, _MAX_INT)),
    Field("temperature", "effective", fields.number(0, 2)),
    Field("top_p", "effective", fields.number(0, 1, above_low=True)),
    Field("frequency_penalty", "effective", fields.number(-2, 2)),
    Field("presence_penalty", "effective", fields.number(-2, 2)),
    *openai_sampling.SAMPLERS,
    Field("seed", "effective", seed(fields.integer(-1, 2**63 - 1))),
    Field("logit_bias", "effective", _biases()),
    Field("stop", "effective", fields.strings(32, fields.MAX_STOP_LENGTH)),
    Field("n_probs", "effective", fields.integer(0, 20)),
    Field("json_schema", "effective", _schema()),
    *(Field(name, "advisory", shape={}) for name in _MACHINERY),
    *(Field(name, "unsupported", neutral=neutral) for name, neutral in _REFUSED.items()),
)
# Other spellings of two of them.
_ALIASES = {"repeat_penalty": "repetition_penalty", "max_tokens": "n_predict"}
PARAMETERS: tuple[Field, ...] = (Field("prompt", "effective", _prompt(), required=True), *SHARED)


def table(parameters: Sequence[Field]) -> Mapping[str, Field]:
    """The parameters by every name that they have."""
    found = fields.table(*parameters)
    return {**found, **{alias: found[name] for alias, name in _ALIASES.items()}}


_TABLE = table(PARAMETERS)


def parse(body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
    """The request in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    prompt = values.get("prompt", object)
    assert isinstance(prompt, TextPrompt | TokenPrompt)
    return parsed(values, model_of(values, models), prompt)


def parsed(values: Values, model: ServedModel, prompt: Prompt) -> Parsed:
    """The request that a prompt and the shared parameters make."""
    asked, probabilities = values.get("n_predict", int), values.get("n_probs", int)
    return Parsed(
        request=GenerateRequest(
            request_id="",
            model=model.id,
            prompt=prompt,
            sampling=openai_sampling.sampling(values, model),
            max_tokens=model.max_output_tokens if asked == -1 else output_limit(asked, "n_predict", model),
            constraint=values.get("json_schema", JsonConstraint),
            logprobs=probabilities or None,
            stop=values.get("stop", tuple) or (),
            deadline_s=model.wall_clock_s,
        ),
        model=model,
        stream=values.get("stream", bool) or False,
        ignored=values.ignored,
        paths={openai_format.SCHEMA: "json_schema"},
    )


_STOP_TYPES = {"length": "limit", "content_filter": "content_filter"}


class CompletionEncoder:
    """A reply: pieces of `content`, then what was counted. There is no end mark beside `stop`."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._end: dict[str, object] = {}

    def open(self) -> Sequence[Frame]:
        """Nothing: there is no role to announce."""
        return ()

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """The line of one event."""
        match event:
            case TextDelta(text=text, logprobs=logprobs) if text:
                piece = {"index": 0, "content": text, "tokens": [], "stop": False, "id_slot": -1}
                return (Frame(dumps({**piece, **_probabilities(logprobs)})),)
            case Finished():
                self._end = _end(event)
            case Failed(error=error):
                return (Frame(error_body(error)),)
        return ()

    def close(self, counts: Usage) -> Sequence[Frame]:
        """The last line."""
        return (Frame(dumps(self._answer("", counts))),)

    def complete(self, events: Sequence[GenerateEvent], counts: Usage) -> bytes:
        """The whole answer."""
        last = events[-1]
        assert isinstance(last, Finished)
        self._end = _end(last)
        deltas = [event for event in events if isinstance(event, TextDelta)]
        logprobs = [chosen for delta in deltas for chosen in delta.logprobs]
        content = "".join(delta.text for delta in deltas)
        return dumps({**self._answer(content, counts), **_probabilities(logprobs)})

    def _answer(self, content: str, counts: Usage) -> dict[str, object]:
        return {
            "index": 0,
            "content": content,
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": self._reply.model,
            "tokens_predicted": counts.completion_tokens,
            "tokens_evaluated": counts.prompt_tokens,
            "tokens_cached": counts.cached_tokens,
            "truncated": False,
            **charge.cost(counts.cost),
            **self._end,
            "timings": {
                "cache_n": counts.cached_tokens,
                "prompt_n": counts.prompt_tokens - counts.cached_tokens,
                "predicted_n": counts.completion_tokens,
            },
        }


def _end(finished: Finished) -> dict[str, object]:
    word = finished.stop_sequence
    kind = _STOP_TYPES.get(finished.reason) or ("eos" if word is None else "word")
    return {"stop_type": kind, "stopping_word": word or ""}


def _probabilities(logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
    if not logprobs:
        return {}
    found = [{**_chance(each.chosen), "top_logprobs": [_chance(other) for other in each.top]} for each in logprobs]
    return {"completion_probabilities": found}


def _chance(chance: TokenChance) -> dict[str, object]:
    token = chance.piece.decode(errors="replace")
    return {"id": chance.id, "token": token, "bytes": list(chance.piece), "logprob": chance.logprob}


def encoder(reply: Reply) -> CompletionEncoder:
    """A fresh encoder for one reply."""
    return CompletionEncoder(reply)
