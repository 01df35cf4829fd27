"""What each request is charged: prices, policy and ledger together, from admission to settlement."""

from __future__ import annotations

import asyncio
import datetime
import functools
import secrets
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import TypeVar

from msgspec.structs import replace

from ocserve import config
from ocserve.accounts import balances, pricing, quota
from ocserve.accounts.balances import UNBOUNDED, Account, Credit, Standing
from ocserve.accounts.keystore import Key, KeyStore
from ocserve.accounts.ledger import Ledger, Outcome, Row
from ocserve.accounts.ledger_schema import LedgerError, now_us
from ocserve.accounts.pricing import Rates, Tariff
from ocserve.errors import LedgerUnavailable, ModelNotPriced
from ocserve.generation import Usage
from ocserve.modelcard import DatedPrices, Prices, ServedModel

NO_PRICES: Mapping[str, str] = MappingProxyType({})
# How long an answer's end waits for a disk that does not answer; what is to be written stays queued.
_PATIENCE_S = 10.0
_RETRY_S = 5.0

T = TypeVar("T")

_TIERS = (
    "Where a model has tiers, a key is charged the prices of the highest one whose tokens it has used of that model "
    "in this calendar month (UTC), counted when a request is admitted, by requests that have ended."
)
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

    def __init__(
        self, billing: Billing, settings: config.Billing, row: Row, rates: Rates | None, account: Account = UNBOUNDED
    ) -> None:
        """`settings` are those of its admission: others may hold by the time at which it ends."""
        self._billing = billing
        self._settings = settings
        self._row = row
        self._rates = rates
        self._account = account
        self._opened = False
        self._settled = False
        self._written: Future[bool] | None = None
        self.cost: int | None = None
        self.remaining: int | None = None  # of a prepaid key's balance, beside what is held

    @property
    def opened(self) -> bool:
        """Whether the request is one that the ledger has."""
        return self._opened

    async def open(self, prompt_tokens: int, completion_tokens: int = 0, *, choices: int = 0, images: int = 0) -> None:
        """Write down that the request was admitted; else it was refused, and is in no ledger.

        It may use that many tokens at most, those of its completion in so many `choices`. Of a key whose spending is
        bounded its most possible cost is held until it is settled; raises `InsufficientQuota` where that does not fit.
        """
        self._opened = True
        reserved = prompt_tokens + completion_tokens
        self._row = replace(self._row, admitted_us=now_us(), images=images, reserved_tokens=reserved)
        ledger = self._billing.ledger
        if ledger is None:
            return
        most = self._rates.most(prompt_tokens, completion_tokens, images) if self._rates is not None else 0
        if not most or not self._account:
            ledger.open(self._row)
            return
        # One that no ledger could hold is refused below: nothing that can be credited or capped is as much.
        self._row = replace(self._row, held=min(most, balances.MOST))
        hold = await self._billing.told(ledger.hold(self._row, self._account))
        if self._account.prepaid:
            self.remaining = hold.standing.available
        if not hold.granted:
            self._opened = False
            assert self._rates is not None
            answer = self._rates.completion * choices
            fixed = self._rates.most(prompt_tokens, 0, images)
            raise quota.exceeded(self._account, hold.standing, most, fixed=fixed, token=answer)

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
            self.cost = self._rates.cost(usage, self._row.images) if _charges(self._settings, outcome) else 0
        if self.remaining is not None:
            self.remaining += self._row.held - (self.cost or 0)
        if self._billing.ledger is not None:
            counts = {name: getattr(usage, name) for name in _COUNTS}
            row = replace(
                self._row,
                settled_us=now_us(),
                outcome=outcome,
                cost=self.cost or 0,
                held=0,
                reserved_tokens=0,
                **counts,
            )
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
        keys: KeyStore | None = None,
    ) -> None:
        self.ledger = ledger
        self._keys = keys
        self._settings = settings
        self._tariff = tariff or Tariff()
        self._today = today

    def check_tariff(self, tariff: Tariff) -> None:
        """Raise `ConfigError` for prices that cannot be charged here."""
        if self.ledger is None and tariff.tiered:
            raise config.ConfigError(
                "billing.prices has tiers, which need a ledger to know what a key has used.",
                hint="Set ledger.use to on.",
            )

    def changes(self, tariff: Tariff, most: int) -> pricing.Changes:
        """The listed prices that `tariff` has otherwise, of at most so many models. May be called in any thread."""
        return self._tariff.changes(tariff, self._today(), most)

    def reset(self, settings: config.Billing, tariff: Tariff) -> None:
        """Other prices and another policy, for requests that are admitted from now on."""
        self._settings, self._tariff = settings, tariff

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
        ends = (_POLICY["cancelled"][self._settings.cancelled], _POLICY["failed"][self._settings.failed])
        if not self._tariff:
            return " ".join(("Nothing is charged, except to keys with prices of their own. Of these:", *ends))
        return " ".join(
            (
                "Answers are charged by the token at the prices in the list of models, those of the moment of "
                "admission; `cost` among the counts of every answer says the sum in US dollars.",
                *((_TIERS,) if self._tariff.tiered else ()),
                *ends,
                "Refused requests (any status of 400 or above before the answer began) and requests that only count "
                "tokens are free.",
            )
        )

    def check(self) -> None:
        """Raise `LedgerUnavailable` where what a request uses could not be recorded."""
        if not self.ready:
            raise _unwritable()

    def priced(self, model: ServedModel, own: Mapping[str, str] = NO_PRICES) -> ServedModel:
        """`model` with today's prices, for a key with prices of its own."""
        if not self._tariff and not own:
            return model
        prices = pricing.with_own(self._tariff.prices(model.id, self._today()), own)
        return replace(model, prices=prices, refused=prices is None and self.refuses_unpriced)

    def schedule(self, model: str) -> tuple[DatedPrices, ...]:
        """The listed prices of a model: today's, and those that are announced."""
        return self._tariff.schedule(model, self._today())

    def unserved(self, served: Container[str]) -> list[str]:
        """Names that have a price and are not among those `served`."""
        return [name for name in self._tariff.models if name not in served]

    def unpriced(self, models: Iterable[str]) -> list[str]:
        """Which of `models` have no price today, where others have one."""
        day = self._today()
        return [name for name in models if self._tariff and self._tariff.prices(name, day) is None]

    @property
    def refuses_unpriced(self) -> bool:
        """Whether requests for a model without a price are refused where others have one."""
        return bool(self._tariff) and self._settings.unpriced == "refuse"

    def charges(self, outcome: Outcome) -> bool:
        """Whether a request that ended so is charged for what it used."""
        return _charges(self._settings, outcome)

    async def admit(
        self,
        request_id: str,
        key_id: str,
        model: str,
        route: str,
        own: Mapping[str, str] = NO_PRICES,
        account: Account = UNBOUNDED,
    ) -> Bill:
        """The account of a request, at the prices of now and the key's `own`.

        Raises as `check`, `InsufficientQuota` for a key that has nothing left of what bounds its spending, and
        `ModelNotPriced`.
        """
        self.check()
        settings = self._settings
        prices = pricing.with_own(self._tariff.prices(model, self._today()), own)
        if prices is None and self.refuses_unpriced:
            raise ModelNotPriced(
                f"The model {model} has no price here at present, and requests for it are refused until it has one.",
                param="model",
            )
        standing = None
        if prices is not None and (account or prices.tiers):
            standing = await self._standing(key_id, model)
        tier, prices = (0, None) if prices is None else prices.step(standing.month_tokens if standing else 0)
        rates = None if prices is None else _rates(prices)
        if account and rates is not None and standing is not None and rates.most(1, 1, 1):
            left = standing.left(account)
            if left is not None and left <= 0:
                raise quota.exhausted(account, standing, rates.most(1, 1, 0) or rates.most(1, 1, 1))
        row = Row(
            id=secrets.token_hex(12),
            request_id=request_id,
            key_id=key_id,
            model=model,
            route=route,
            admitted_us=now_us(),
            tier=tier,
            **({} if rates is None else {f"price_{name}": getattr(rates, name) for name in rates.__struct_fields__}),
        )
        return Bill(self, settings, row, rates, account)

    def count(self, key_id: str, model: str) -> None:
        """Have the ledger remember that a request was admitted which is no row of it."""
        if self.ledger is not None:
            self.ledger.tally(key_id, model)

    async def remaining(self, key_id: str) -> int | None:
        """What of a key's balance is not held, in picodollars; None where that cannot be known at present."""
        if self.ledger is None or not self.ready:
            return None
        return (await self._standing(key_id)).available

    def key(self, name: str) -> Key | None:
        """The key called `name`, revoked ones included."""
        listed = self._keys.listed() if self._keys is not None else ()
        return next((key for key in listed if key.name == name), None)

    async def standing(self, key_id: str) -> Standing:
        """A key's money; raises `LedgerUnavailable`."""
        self.check()
        return await self._standing(key_id)

    async def credit(self, credit: Credit) -> Credit:
        """Add to a key's balance, durably. Raises `Declined` and `LedgerUnavailable`."""
        self.check()
        return await self.told(self._kept().credit(credit))

    async def told(self, future: Future[T]) -> T:
        """What the ledger says, or `LedgerUnavailable` where it says nothing in time."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.wrap_future(future)
        except (TimeoutError, LedgerError):
            raise _unwritable() from None

    async def _standing(self, key_id: str, model: str = "") -> Standing:
        return await self.told(self._kept().standing(key_id, balances.month_of(now_us()), model))

    def _kept(self) -> Ledger:
        if self.ledger is None:
            raise LedgerUnavailable(
                "This server keeps no ledger (`ledger.use` is off), and without one there are no balances, no spend "
                "caps and no volume tiers."
            )
        return self.ledger


def _charges(settings: config.Billing, outcome: Outcome) -> bool:
    match outcome:
        case "completed":
            return True
        case "cancelled":
            return settings.cancelled == "used"
        case "failed":
            return settings.failed == "used"
        case _:
            return False


def _unwritable() -> LedgerUnavailable:
    return LedgerUnavailable(
        "The ledger cannot be written at present, and nothing is served that cannot be recorded.",
        retry_after_s=_RETRY_S,
    )


@functools.lru_cache(maxsize=256)
def _rates(prices: Prices) -> Rates:
    return Rates.of(prices)
