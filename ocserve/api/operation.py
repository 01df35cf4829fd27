"""What an operation of the API is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ocserve.api import fields
from ocserve.api.fields import Field

SSE = "text/event-stream"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation. `streamed` is the media type and the name of a record's shape, where a stream can be asked for;
    `last` is the data of its last event where that has another.

    `example` is a request that every server answers if a model can do what it asks for; `links` are operations that go
    on from an answer's `id`.
    """

    method: str
    path: str
    tag: str
    summary: str
    answer: str
    reads: Mapping[str, Field] | None = None
    query: tuple[Field, ...] = ()
    streamed: tuple[str, str] | None = None
    last: str | None = None
    error: str = "Error"
    media_type: str = "application/json"
    public: bool = False
    status: int = 200
    example: Mapping[str, object] | None = None
    links: tuple[str, ...] = ()

    @property
    def route(self) -> tuple[str, str]:
        """The method and path of the line in the route list."""
        return self.method, self.path


def reads(*parameters: Field) -> dict[str, Field]:
    """What an operation reads, as a table."""
    return fields.table(*parameters)


def get(
    path: str,
    tag: str,
    answer: str,
    summary: str,
    *,
    query: tuple[Field, ...] = (),
    public: bool = False,
    error: str = "Error",
    media_type: str = "application/json",
) -> Operation:
    """An operation that only reads."""
    return Operation(
        method="GET",
        path=path,
        tag=tag,
        summary=summary,
        answer=answer,
        query=query,
        public=public,
        error=error,
        media_type=media_type,
    )
