"""Requires JSON: a form or text body is what a web page can send without asking first. No body needs no type."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ocserve.errors import UnsupportedMediaType
from ocserve.http.exchange import has_body, header_values


class JsonOnly:
    """Refuses bodies that are not `application/json`, and compressed ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("POST", "PUT"):
            encodings = header_values(scope, b"content-encoding")
            if any(value.strip().lower() != b"identity" for value in encodings):
                raise UnsupportedMediaType("Compressed request bodies are not accepted.", param="content-encoding")
            types = header_values(scope, b"content-type")
            if (types or has_body(scope)) and (len(types) != 1 or not _is_json(types[0])):
                raise UnsupportedMediaType("Content-Type must be application/json.", param="content-type")
        await self._app(scope, receive, send)


def _is_json(value: bytes) -> bool:
    kind, _, parameters = value.partition(b";")
    if kind.strip().lower() != b"application/json":
        return False
    name, _, charset = parameters.strip().partition(b"=")
    return name.lower() != b"charset" or charset.strip(b'" ').lower() in (b"utf-8", b"utf8")
