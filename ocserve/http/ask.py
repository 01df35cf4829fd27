"""The one endpoint behind every dialect of questions: parse, ask, answer whole.

As with generations a refusal is a real status, and the client's going away ends the work.
"""

from __future__ import annotations

from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from ocserve.accounts.line import Attempt
from ocserve.api.questions import Asked, QuestionDialect
from ocserve.generation import Embedded, Scored
from ocserve.http import answers
from ocserve.http.edge.current import Edge
from ocserve.http.exchange import Exchange, attempt, caller_of
from ocserve.http.presence import disconnected, unless_gone
from ocserve.http.words import in_clients_words
from ocserve.service import Service


class Ask:
    """Serves one dialect."""

    def __init__(self, service: Service, dialect: QuestionDialect, edge: Edge) -> None:
        self._service = service
        self._dialect = dialect
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        models = self._service.open_to(caller_of(scope)).model
        asked = self._dialect.parse(exchange.body, models, refuse_unknown=self._edge.refuse_unknown)
        exchange.trace.model = asked.model.id
        exchange.name_ignored(asked.ignored)
        await unless_gone(disconnected(receive), self._answer(exchange, asked, send, attempt(scope)))

    async def _answer(self, exchange: Exchange, asked: Asked, send: Send, tries: Attempt) -> None:
        assert exchange.caller is not None
        try:
            with in_clients_words(asked.paths):
                answer = await self._service.ask(asked.question, exchange.caller, exchange.trace, attempt=tries)
        finally:
            exchange.tell_limits(self._service.limiter)
        if isinstance(answer, Embedded | Scored):
            answer = replace(answer, cost=exchange.trace.usage.cost)
        await answers.json(send, 200, asked.reply(answer))
