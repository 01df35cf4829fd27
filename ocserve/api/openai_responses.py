"""OpenAI's Responses: a request of items, with what is remembered of earlier ones, becomes a conversation to answer.

Unlike the other dialects this one has a memory, so it is a value made for each request: what it may recall is handed to
it, and what is to be remembered it hands back. The memory itself is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ocserve.api import json_body, openai_responses_parameters, openai_sampling, openai_wire
from ocserve.api.dialect import Encoder, Models, Parsed, Reply
from ocserve.api.openai_responses_events import ResponseEncoder, Wire
from ocserve.api.openai_responses_items import Item, ItemReader, check_calls, turns
from ocserve.errors import ErrorInfo, InvalidRequest
from ocserve.generation import ChatPrompt, GenerateRequest
from ocserve.modelcard import ServedModel

# What the engine calls parts of a request, and what they are called here.
_LABELS = {"tool_call_id": "input[].call_id"}
_PATHS = {
    "messages": "input",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A finished response: its JSON, and the items of the conversation before it, of its request and of its output."""

    id: str
    body: bytes
    before: tuple[Item, ...]
    input: tuple[Item, ...]
    output: tuple[Item, ...]

    @property
    def conversation(self) -> tuple[Item, ...]:
        """What a response that continues this one begins with."""
        return self.before + self.input + self.output


class Memory(Protocol):
    """What one caller has stored. `keeps` says whether anything can be."""

    keeps: bool

    def response(self, name: str) -> StoredResponse | None:
        """The response of this id."""

    def item(self, name: str) -> Item | None:
        """The item of this id."""

    def keep(self, stored: StoredResponse, *, lasting: bool) -> bool:
        """Remember a response, `lasting` if its client is to find it again; whether it will."""


class ResponseDialect:
    """The dialect of one request. `now` tells Unix time in seconds, `token` makes the ids of items."""

    def __init__(self, memory: Memory, token: str, now: Callable[[], int]) -> None:
        self._memory = memory
        self._token = token
        self._now = now
        self._model: ServedModel | None = None
        self._before: tuple[Item, ...] = ()
        self._input: tuple[Item, ...] = ()
        self._echo: Wire = {}
        self._summary = False
        self._generate = True

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
        """The request in `body`, with the conversation that it continues."""
        return self.understand(json_body.decode(body), models, refuse_unknown=refuse_unknown)

    def understand(
        self, source: dict[str, object], models: Models, *, refuse_unknown: bool, generate: bool = True
    ) -> Parsed:
        """The request in `source`. Without `generate` its prompt is only computed, for a response that continues it."""
        self._generate = generate
        wishes = openai_responses_parameters.read(source, refuse_unknown=refuse_unknown)
        model = openai_sampling.model_of(wishes.values, models)
        wishes.check(model)
        reader = self._reader(model, refuse_unknown=refuse_unknown)
        earlier = self._earlier(wishes.text("previous_response_id"))
        self._before = earlier.conversation if earlier else ()
        reader.recall(self._before, "previous_response_id")
        # What was only made ready may be answered as it is, and instructions may be made ready alone.
        enough = (self._before and earlier and not earlier.output) or (not generate and wishes.text("instructions"))
        self._input = reader.read(wishes.values.get("input", object), "input", least=0 if enough else 1)
        check_calls(self._before, self._input, "input")
        self._model = model
        sampling = openai_sampling.sampling(wishes.values, model)
        self._echo = wishes.echo(model, sampling, store=self._stores(wishes.values.get("store", bool)))
        self._summary = wishes.summary is not None
        # Instructions are of this request only: those of an earlier one are not in its conversation.
        messages = turns(wishes.text("instructions"), (*self._before, *self._input))
        request = GenerateRequest(
            request_id="",
            model=model.id,
            prompt=ChatPrompt(messages=messages, tools=wishes.tools, reasoning=wishes.reasoning),
            sampling=sampling,
            max_tokens=wishes.limit(model) if generate else 0,
            constraint=wishes.constraint if generate else None,
            tool_choice=wishes.tool_choice,
            logprobs=wishes.logprobs,
            stop=wishes.values.get("stop", tuple) or (),
            deadline_s=model.wall_clock_s,
        )
        return Parsed(
            request=request,
            model=model,
            stream=wishes.values.get("stream", bool) or False,
            ignored=(*wishes.ignored, *reader.ignored),
            paths={**_PATHS, **wishes.paths},
            labels=_LABELS,
        )

    def encoder(self, reply: Reply) -> Encoder:
        """A fresh encoder for the reply to the request that was parsed."""
        return ResponseEncoder(
            reply, self._echo, summary=self._summary, generate=self._generate, now=self._now, keep=self._keep
        )

    def error_body(self, info: ErrorInfo) -> bytes:
        """The error object of all of OpenAI's dialects."""
        return openai_wire.error_body(info)

    def _reader(self, model: ServedModel, *, refuse_unknown: bool) -> ItemReader:
        return ItemReader(model, refuse_unknown=refuse_unknown, find=self._memory.item, token=self._token)

    def _earlier(self, name: str | None) -> StoredResponse | None:
        if name is None:
            return None
        found = self._memory.response(name)
        if found is None:
            raise InvalidRequest(
                "The previous response is not stored here: it has expired, was deleted or never was.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return found

    def _stores(self, wanted: bool | None) -> bool:
        if wanted and not self._memory.keeps:
            raise InvalidRequest("This server stores no responses.", param="store", code="unsupported_parameter")
        return self._memory.keeps and wanted is not False

    def _keep(self, response: Wire, output: list[Wire]) -> bool:
        assert self._model is not None
        reader = self._reader(self._model, refuse_unknown=True)
        said = tuple(reader.item(item, "output") for item in output)
        stored = StoredResponse(
            id=str(response["id"]),
            body=openai_wire.dumps(response),
            before=self._before,
            input=self._input,
            output=said,
        )
        return self._memory.keep(stored, lasting=response["store"] is True)
