"""What each request is charged: prices, policy and ledger together, from admission to settlement."""

from __future__ import annotations

import asyncio
import datetime
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import MappingProxyType

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts import pricing
from ocserve.accounts.ledger import Ledger, Outcome, Row, now_us
from ocserve.accounts.pricing import Rates, Tariff
from ocserve.errors import LedgerUnavailable
from ocserve.generation import Usage
from ocserve.modelcard import DatedPrices, ServedModel

NO_PRICES: Mapping[str, str] = MappingProxyType({})
# How long an answer's end waits for a disk that does not answer; what is to be written stays queued.
_PATIENCE_S = 10.0
_RETRY_S = 5.0

_POLICY = {
    "cancelled": {
        "used": "A request whose client goes away is charged for what it used up to then: its prompt once that was "
        "begun, and the tokens that were generated.",
        "free": "A request whose client goes away before its end is not charged.",
    },
    "failed": {
        "used": "A request that fails by our fault after it began is charged for what it used.",
        "free": "A request that fails by our fault is not charged, whatever it had used.",
    },
}


class Bill:
    """One request's account: written down when it is admitted, settled once, whoever asks for it how often."""

    def __init__(self, billing: Billing, row: Row, rates: Rates | None) -> None:
        self._billing = billing
        self._row = row
        self._rates = rates
        self._opened = False
        self._settled = False
        self._written: Future[bool] | None = None
        self.cost: int | None = None

    def open(self, images: int = 0) -> None:
        """Write down that the request was admitted, with so many images; else it was refused, and is in no ledger."""
        self._opened = True
        self._row = replace(self._row, admitted_us=now_us(), images=images)
        if self._billing.ledger is not None:
            self._billing.ledger.open(self._row)

    async def settle(self, usage: Usage, *, whole: bool, failed: bool) -> None:
        """Charge what was used and wait until the ledger has it, or is known to be unable to.

        `whole`: the answer came to its end; `failed`: by our fault it did not, else its client went away. Only the
        first call counts; later ones wait with it.
        """
        if not self._opened:
            return
        if not self._settled:
            self._settled = True
            self._charge(usage, "failed" if failed else "completed" if whole else "cancelled")
        if self._written is not None and not self._written.done():
            await asyncio.wait({asyncio.wrap_future(self._written)}, timeout=_PATIENCE_S)

    def _charge(self, usage: Usage, outcome: Outcome) -> None:
        if self._rates is not None:
            self.cost = self._rates.cost(usage, self._row.images) if self._billing.charges(outcome) else 0
        if self._billing.ledger is not None:
            counts = {name: getattr(usage, name) for name in _COUNTS}
            row = replace(self._row, settled_us=now_us(), outcome=outcome, cost=self.cost or 0, **counts)
            self._written = self._billing.ledger.settle(row)


_COUNTS = ("prompt_tokens", "cached_tokens", "image_tokens", "completion_tokens", "reasoning_tokens")


class Billing:
    """Prices by day, the policy, and the ledger if there is one."""

    def __init__(
        self,
        settings: config.Billing = config.Billing(),  # noqa: B008 - frozen
        tariff: Tariff | None = None,
        ledger: Ledger | None = None,
        today: Callable[[], datetime.date] = lambda: datetime.datetime.now(datetime.UTC).date(),
    ) -> None:
        self.ledger = ledger
        self._settings = settings
        self._tariff = tariff or Tariff()
        self._today = today

    @property
    def state(self) -> str:
        """`off`, `ok`, or `failing`: then nothing is taken on."""
        return "off" if self.ledger is None else "ok" if self.ready else "failing"

    @property
    def ready(self) -> bool:
        """Whether what a request uses could be recorded."""
        return self.ledger is None or self.ledger.healthy

    @property
    def policy(self) -> str:
        """What is charged, in sentences to publish."""
        if not self._tariff:
            return "Nothing is charged, except to keys with prices of their own."
        ends = (_POLICY["cancelled"][self._settings.cancelled], _POLICY["failed"][self._settings.failed])
        return " ".join(
            (
                "Answers are charged by the token at the prices in the list of models, those of the moment of "
                "admission; `usage.cost` in answers of chat, completions and embeddings says the sum in US dollars.",
                *ends,
                "Refused requests (any status of 400 or above before the answer began) and requests that only count "
                "tokens are free.",
            )
        )

    def check(self) -> None:
        """Raise `LedgerUnavailable` where what a request uses could not be recorded."""
        if not self.ready:
            raise LedgerUnavailable(
                "The ledger cannot be written at present, and nothing is served that cannot be recorded.",
                retry_after_s=_RETRY_S,
            )

    def priced(self, model: ServedModel, own: Mapping[str, str] = NO_PRICES) -> ServedModel:
        """`model` with today's prices, for a key with prices of its own."""
        if not self._tariff and not own:
            return model
        return replace(model, prices=pricing.with_own(self._tariff.prices(model.id, self._today()), own))

    def schedule(self, model: str) -> tuple[DatedPrices, ...]:
        """The listed prices of a model: today's, and those that are announced."""
        return self._tariff.schedule(model, self._today())

    def _rates(self, model: str, own: Mapping[str, str]) -> Rates | None:
        if not own:
            return self._tariff.rates(model, self._today())
        prices = pricing.with_own(self._tariff.prices(model, self._today()), own)
        return None if prices is None else Rates.of(prices)

    def charges(self, outcome: Outcome) -> bool:
        """Whether a request that ended so is charged for what it used."""
        match outcome:
            case "completed":
                return True
            case "cancelled":
                return self._settings.cancelled == "used"
            case "failed":
                return self._settings.failed == "used"
            case _:
                return False

    def admit(self, request_id: str, key_id: str, model: str, route: str, own: Mapping[str, str] = NO_PRICES) -> Bill:
        """The account of a request, at the prices of now and the key's `own`; raises as `check`."""
        self.check()
        rates = self._rates(model, own)
        row = Row(
            id=secrets.token_hex(12),
            request_id=request_id,
            key_id=key_id,
            model=model,
            route=route,
            admitted_us=now_us(),
            **({} if rates is None else {f"price_{name}": getattr(rates, name) for name in rates.__struct_fields__}),
        )
        return Bill(self, row, rates)
