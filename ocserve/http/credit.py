"""Balances over HTTP, for keys with the scope `admin`: what a key has, and adding to it."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from ocserve.accounts import balances
from ocserve.accounts.balances import Declined
from ocserve.accounts.keystore import Key
from ocserve.accounts.pricing import amount, dollars
from ocserve.api import credit
from ocserve.api.openai_wire import dumps
from ocserve.errors import IdempotencyKeyReused, InvalidRequest, NotFound
from ocserve.http import answers
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange, caller_of, header_values
from ocserve.http.route_table import Route
from ocserve.service import Service


class AddCredit:
    """`POST /admin/keys/{name}/credit`: on disk when it is answered, and once for each `Idempotency-Key`, for ever."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self._service = service
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        wanted = credit.parse(exchange.body, refuse_unknown=self._edge.refuse_unknown)
        exchange.name_ignored(wanted.ignored)
        key = _key(self._service, scope)
        given = header_values(scope, b"idempotency-key")
        asked = balances.Credit(
            key_id=key.id,
            amount=amount(wanted.amount),
            note=wanted.note,
            correction=wanted.correction,
            made_by=caller_of(scope).key_id,
            idempotency_key=given[0].decode("latin-1") if given else None,
        )
        try:
            made = await self._service.billing.credit(asked)
        except Declined as declined:
            if declined.reused:
                raise IdempotencyKeyReused(str(declined), param="idempotency-key") from None
            raise InvalidRequest(str(declined), param="amount") from None
        answer = credit.Credit(
            id=made.id,
            key=key.name,
            amount=dollars(made.amount),
            note=made.note,
            correction=made.correction,
            created=made.credited_us // 1_000_000,
            balance=dollars(made.balance),
        )
        await answers.json(send, 200, dumps(answer))


class KeyBalance:
    """`GET /admin/keys/{name}/balance`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key(self._service, scope)
        now = await self._service.billing.standing(key.id)
        answer = credit.Balance(
            key=key.name,
            prepaid=key.prepaid,
            balance=dollars(now.balance) if key.prepaid else None,
            held=dollars(now.held),
            available=dollars(now.available) if key.prepaid else None,
            credited=dollars(now.credited),
            charged=dollars(now.charged),
            spend_cap=key.spend_cap,
            month=credit.Month(
                month=now.month,
                ends=f"{balances.month_end(now.month):%Y-%m-%dT%H:%M:%SZ}",
                charged=dollars(now.month_charged),
                held=dollars(now.month_held),
            ),
        )
        await answers.json(send, 200, dumps(answer))


def routes(service: Service, edge: Edge) -> tuple[Route, ...]:
    """These two."""
    return (
        Route("POST", "/admin/keys/{name}/credit", AddCredit(service, edge), admin=True, looks=False),
        Route("GET", "/admin/keys/{name}/balance", KeyBalance(service), admin=True, looks=False),
    )


def _key(service: Service, scope: Scope) -> Key:
    service.keys.check()  # who has the key of the settings is let in without them
    found = service.billing.key(Exchange.of(scope).match.params["name"])
    if found is None:
        raise NotFound("There is no key of this name.", param="name", code="key_not_found")
    return found
