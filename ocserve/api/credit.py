"""Balances as administrators read and change them. Amounts are US dollars, exact decimals in strings."""

from __future__ import annotations

import re

import msgspec

from ocserve.api import fields, json_body
from ocserve.api.fields import Field, Reader
from ocserve.errors import InvalidRequest

__all__ = ["PARAMETERS", "Balance", "Credit", "Month", "Wanted", "parse"]

_AMOUNT = r"^-?[0-9]{1,7}(\.[0-9]{1,12})?$"


def _amount() -> Reader[str]:
    text = fields.string(32, empty=False)

    def reader(value: object, where: str) -> str:
        found = text(value, where)
        if re.fullmatch(_AMOUNT, found, re.ASCII) is None:
            raise InvalidRequest(
                f"Invalid '{where}': expected US dollars as a string such as \"10.00\", with at most twelve decimals.",
                param=where,
            )
        return found

    return Reader(reader, {"type": "string", "pattern": _AMOUNT})


PARAMETERS: tuple[Field, ...] = (
    Field("amount", "effective", _amount(), required=True),
    Field("note", "effective", fields.string(200)),
    Field("correction", "effective", fields.boolean()),
)
_TABLE = fields.table(*PARAMETERS)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A credit that is asked for; one of less than nothing must be a `correction`, no other may be."""

    amount: str
    note: str
    correction: bool
    ignored: tuple[str, ...]


class Credit(msgspec.Struct, frozen=True, kw_only=True, tag="credit", tag_field="object"):
    """A credit that was made; `key` is the key's name, `balance` what it had right afterwards."""

    id: str
    key: str
    amount: str
    note: str
    correction: bool
    created: int
    balance: str


class Month(msgspec.Struct, frozen=True, kw_only=True):
    """What a key spent in a calendar month (UTC), and holds of it for running requests."""

    month: str
    ends: str
    charged: str
    held: str


class Balance(msgspec.Struct, frozen=True, kw_only=True, tag="balance", tag_field="object"):
    """A key's money: `balance` is what it was credited less what it was charged, `available` less what is held too.

    Both are None for a key that is not prepaid.
    """

    key: str
    prepaid: bool
    balance: str | None
    held: str
    available: str | None
    credited: str
    charged: str
    spend_cap: str | None
    month: Month


def parse(body: bytes, *, refuse_unknown: bool) -> Wanted:
    """The credit in `body`."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    return Wanted(
        amount=values.get("amount", str) or "",
        note=values.get("note", str) or "",
        correction=values.get("correction", bool) or False,
        ignored=values.ignored,
    )
