"""OpenAI's Responses over HTTP: making one, and coming back to those that are stored."""

from __future__ import annotations

import secrets
import time

from starlette.types import Receive, Scope, Send

from ocserve.api import openai_responses_stored as stored_responses
from ocserve.api.openai_responses import ResponseDialect, StoredResponse
from ocserve.api.openai_responses_count import InputTokensDialect
from ocserve.errors import InvalidRequest, NotFound
from ocserve.http import answers
from ocserve.http.ask import Ask
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange
from ocserve.http.generate import Generate
from ocserve.http.response_store import ResponseStore, Shelf
from ocserve.service import Service


class CreateResponse:
    """`POST /v1/responses`."""

    def __init__(self, service: Service, store: ResponseStore, edge: Edge) -> None:
        self._service = service
        self._store = store
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Generate(self._service, _dialect(self._store, scope), self._edge)(scope, receive, send)


class CountInputTokens:
    """`POST /v1/responses/input_tokens`."""

    def __init__(self, service: Service, store: ResponseStore, edge: Edge) -> None:
        self._service = service
        self._store = store
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = InputTokensDialect(_dialect(self._store, scope))
        await Ask(self._service, dialect, self._edge)(scope, receive, send)


class RetrieveResponse:
    """`GET /v1/responses/{id}`."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answers.json(send, 200, _found(self._store, scope).body)


class DeleteResponse:
    """`DELETE /v1/responses/{id}`."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _found(self._store, scope)
        _shelf(self._store, scope).remove(found.id)
        await answers.json(send, 200, stored_responses.deleted(found))


class InputItems:
    """`GET /v1/responses/{id}/input_items`."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Exchange.of(scope).query
        await answers.json(send, 200, stored_responses.input_items(_found(self._store, scope), asked))


class CancelResponse:
    """`POST /v1/responses/{id}/cancel`: for responses made in the background, of which there are none.

    Any other ends when its client closes the connection.
    """

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _found(self._store, scope)
        raise InvalidRequest(
            "Only a response made with 'background' can be cancelled, and this one has ended. To end a response that "
            "is being made, close its connection.",
            param="response_id",
            code="response_not_cancellable",
        )


def _dialect(store: ResponseStore, scope: Scope) -> ResponseDialect:
    return ResponseDialect(_shelf(store, scope), secrets.token_hex(12), lambda: int(time.time()))


def _shelf(store: ResponseStore, scope: Scope) -> Shelf:
    caller = Exchange.of(scope).caller
    assert caller is not None
    return store.shelf(caller.key_id)


def _found(store: ResponseStore, scope: Scope) -> StoredResponse:
    found = _shelf(store, scope).response(Exchange.of(scope).match.params["id"])
    if found is None:
        raise NotFound(
            "No response with this id is stored here: it has expired, was deleted or never was.", param="response_id"
        )
    return found
