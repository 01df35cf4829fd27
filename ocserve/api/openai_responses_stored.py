"""Coming back to stored responses: what may be asked in a query, and the listing of a response's input."""

from __future__ import annotations

import msgspec

from ocserve.api import fields, openai_wire, queries
from ocserve.api.fields import Field, Values
from ocserve.api.openai_responses import StoredResponse
from ocserve.errors import InvalidRequest

_MAX_PAGE = 100
_PAGE = 20


_INCLUDE = (Field("include", "advisory", fields.string(256)), Field("include[]", "advisory", fields.string(256)))
# A response that is stored has ended, and its events are not kept.
RETRIEVE: tuple[Field, ...] = (
    *queries.OPENAI,
    *_INCLUDE,
    Field("include_obfuscation", "advisory", fields.word("true", "false")),
    Field("stream", "unsupported", fields.word("true", "false"), neutral=("false",)),
    Field("starting_after", "unsupported", fields.string(32)),
)
INPUT_ITEMS: tuple[Field, ...] = (
    *queries.OPENAI,
    *_INCLUDE,
    Field("limit", "effective", queries.digits(1, _MAX_PAGE)),
    Field("order", "effective", fields.word("asc", "desc")),
    Field("after", "effective", fields.string(256, empty=False)),
)


def input_items(stored: StoredResponse, asked: Values) -> bytes:
    """`GET /v1/responses/{id}/input_items`: what the model was given, the earlier conversation included."""
    items = list(stored.before + stored.input)
    if asked.get("order", str) != "asc":
        items.reverse()
    after = asked.get("after", str)
    if after is not None:
        places = [place for place, item in enumerate(items, 1) if item.id == after]
        if not places:
            raise InvalidRequest("Invalid 'after': the response has no input item with this id.", param="after")
        items = items[places[0] :]
    page = items[: asked.get("limit", int) or _PAGE]
    return openai_wire.dumps(
        {
            "object": "list",
            "data": [msgspec.Raw(item.wire) for item in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(items) > len(page),
        }
    )


def deleted(stored: StoredResponse) -> bytes:
    """`DELETE /v1/responses/{id}`."""
    return openai_wire.dumps({"id": stored.id, "object": "response", "deleted": True})
