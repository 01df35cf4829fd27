"""`ocserve keys`: make keys, see them, credit them, replace them, take them back. A running server knows at once."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ocserve.accounts.keystore import Key, KeyStore

F = TypeVar("F", bound=Callable[..., Any])

_COMMAND_LINE = "ocserve keys credit"  # who makes a credit, in the ledger
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_PRICE_HELP = (
    "A price of its own in US dollars: KIND is prompt, completion, cached_prompt or cache_write (for a token), "
    "image or request; repeat it."
)
_LIMITS = {
    "rpm": ("requests_per_minute", "requests per minute"),
    "tpm": ("tokens_per_minute", "tokens per minute"),
    "rpd": ("requests_per_day", "requests per day"),
    "tpd": ("tokens_per_day", "tokens per day"),
    "concurrent": ("concurrent_requests", "requests at the same time"),
}


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Seconds, written as `90s`, `15m`, `24h` or `90d`."""
    lasts_s = None if value is None else _seconds(value)
    if value is not None and lasts_s is None:
        raise click.BadParameter("expected a duration such as 90s, 15m, 24h or 90d", ctx, param)
    return lasts_s


def _seconds(duration: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", duration)
    return None if found is None else int(found[1]) * _UNITS[found[2]]


def _expiry(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Seconds since 1970: so long from now, or at the end of a day in UTC."""
    if value is None:
        return None
    now = int(time.time())
    if (lasts_s := _seconds(value)) is not None:
        return _to_come(now + lasts_s, now, ctx, param)
    try:
        day = datetime.datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        expected = "expected a day such as 2027-01-31, or a duration such as 90s, 15m, 24h or 90d"
        raise click.BadParameter(expected, ctx, param) from None
    return _to_come(int((day + datetime.timedelta(days=1)).timestamp()), now, ctx, param)


def _to_come(expiry: int, now: int, ctx: click.Context, param: click.Parameter) -> int:
    if expiry <= now:
        raise click.BadParameter("expected a time to come: the key would have expired already", ctx, param)
    return expiry


def _limit(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A whole number, 0 for unlimited, or `default`: -1, what the settings say."""
    if value is None or value == "default":
        return None if value is None else -1
    if not re.fullmatch(r"[0-9]{1,12}", value):
        raise click.BadParameter("expected a whole number, 0 for unlimited, or `default`", ctx, param)
    return int(value)


def _limit_options(function: F) -> F:
    for name, (_, words) in reversed(_LIMITS.items()):
        help_text = f"Most {words}; 0 is unlimited, `default` what the settings say."
        function = click.option(f"--{name}", callback=_limit, metavar="N", help=help_text)(function)
    return function


def _limits(given: dict[str, int | None]) -> dict[str, int | None]:
    """What was given, by the names that the store has."""
    return {_LIMITS[name][0]: None if value == -1 else value for name, value in given.items() if value is not None}


def _money(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """US dollars."""
    from ocserve.accounts import pricing

    try:
        if value is not None and value != "none" and pricing.amount(value) < 0:
            raise ValueError("expected 0 or more US dollars")
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


def _store() -> KeyStore:
    from ocserve import config
    from ocserve.accounts.keystore import KeyStore

    return KeyStore(config.keys_file(config.load().config.auth))


@click.group("keys")
def command() -> None:
    """Make, list, limit, credit, rotate and revoke the keys of those who call."""


@command.command("create")
@click.option("--name", required=True, help="What the key is called in lists, in usage and on invoices.")
@click.option("--expires", callback=_expiry, metavar="WHEN", help="A day (2027-01-31) or a duration (90d); else never.")
@click.option("--model", "models", multiple=True, metavar="MODEL", help="May use this model; repeat it. Else all.")
@_limit_options
@click.option("--price", "prices", multiple=True, metavar="KIND=AMOUNT", help=_PRICE_HELP)
@click.option("--prepaid", is_flag=True, help="May spend only what it was credited, see `ocserve keys credit`.")
@click.option("--spend-cap", callback=_money, metavar="DOLLARS", help="Most US dollars in a calendar month, UTC.")
@click.option("--admin", is_flag=True, help="May also administer the server.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create(
    name: str,
    expires: int | None,
    models: tuple[str, ...],
    prices: tuple[str, ...],
    prepaid: bool,
    spend_cap: str | None,
    admin: bool,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Make a key and show it, this once: only its digest is kept."""
    store = _store()
    made, text = store.create(
        name,
        expires=expires,
        models=models,
        limits=_limits(limits),
        price=dict(_priced(each) for each in prices),
        prepaid=prepaid,
        spend_cap=None if spend_cap == "none" else spend_cap,
        scope="admin" if admin else "use",
    )
    _show_once(made, text, as_json)
    for line in _remarks(made, store):
        click.echo(line, err=True)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(as_json: bool) -> None:
    """List the keys, revoked ones too. What a key is cannot be shown again."""
    from ocserve.cli.model_output import print_json, print_table

    keys = _store().listed()
    if as_json:
        print_json({"keys": [_described(key) for key in keys]})
    elif not keys:
        click.echo("there are no keys; `ocserve keys create --name NAME` makes one")
    else:
        now = time.time()
        rows = [
            (
                key.name,
                key.id,
                _state(key, now),
                key.scope,
                _day(key.created),
                _day(key.expires),
                _model_mark(key),
                _marks(key),
            )
            for key in keys
        ]
        print_table(("NAME", "ID", "STATE", "SCOPE", "CREATED", "EXPIRES", "MODELS", "TERMS"), rows)


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show what is known of the key called NAME."""
    from ocserve.cli.model_output import print_json

    key = _store().named(name)
    described = {**_described(key), "balance": _balance(key)}
    if as_json:
        print_json(described)
        return
    for field, value in described.items():
        items = [f"{each}={value[each]}" for each in value] if isinstance(value, dict) else value
        text = ", ".join(items) if isinstance(items, list) else items
        click.echo(f"{field:28}  {text or '-'}")


@command.command("limits")
@click.argument("name")
@_limit_options
@click.option("--spend-cap", callback=_money, metavar="DOLLARS", help="Most US dollars in a calendar month, or `none`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def limits(name: str, spend_cap: str | None, as_json: bool, **limits: int | None) -> None:
    """Change limits of the key called NAME; those not named stay. What it has used stays used."""
    from ocserve.cli.model_output import print_json

    changed, store = _limits(limits), _store()
    if not changed and spend_cap is None:
        raise click.UsageError("name at least one limit, such as --rpm 600")
    if spend_cap is not None:
        store.cap(name, None if spend_cap == "none" else spend_cap)
    key = store.limit(name, **changed)
    if as_json:
        print_json(_described(key))
    else:
        click.echo(f"{name}: {_limit_text(key)}")


@command.command("rotate")
@click.argument("name")
@click.option("--overlap", callback=_duration, default="24h", metavar="DURATION", show_default=True,
              help="How long the key before is still accepted; 0s ends it now.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rotate(name: str, overlap: int, as_json: bool) -> None:
    """Replace the key called NAME: limits, usage and stored prefixes stay with the name."""
    made, text = _store().rotate(name, overlap)
    _show_once(made, text, as_json)


@command.command("revoke")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def revoke(name: str, as_json: bool) -> None:
    """Accept the key called NAME no longer: no request that arrives after this command is answered."""
    from ocserve.cli.model_output import print_json

    key = _store().revoke(name)
    if as_json:
        print_json(_described(key))
    else:
        click.echo(f"{name} is revoked")


@command.command("credit", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("amount")
@click.option("--note", default="", help="What it is for, such as an invoice's number.")
@click.option("--correct", is_flag=True, help="The amount takes back of credits before: it is less than nothing.")
@click.option(
    "--idempotency-key", metavar="TEXT", help="A name of this credit: it is made once, however often asked for."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def credit(name: str, amount: str, note: str, correct: bool, idempotency_key: str | None, as_json: bool) -> None:
    """Add AMOUNT, US dollars, to the balance of the key called NAME.

    It is on disk when this command ends, and running servers know of it at once.
    """
    from ocserve import config
    from ocserve.accounts import balances, pricing
    from ocserve.accounts.ledger_schema import LedgerError
    from ocserve.cli import Failure
    from ocserve.cli.model_output import print_json

    try:
        asked = pricing.amount(amount)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="AMOUNT") from None
    if correct and asked >= 0:
        raise click.BadParameter(
            "a correction takes back: AMOUNT is less than nothing, such as -20", param_hint="--correct"
        )
    settings = config.load().config
    if settings.ledger.use == "off":
        raise Failure("there is no ledger to keep a balance in", "set ledger.use to on")
    key = _store().named(name)
    wanted = balances.Credit(
        key_id=key.id,
        amount=asked,
        note=note,
        correction=correct,
        made_by=_COMMAND_LINE,
        idempotency_key=idempotency_key,
    )
    try:
        made = balances.add_credit(config.ledger_file(settings.ledger), wanted)
    except (balances.Declined, LedgerError) as error:
        raise Failure(str(error)) from None
    if (state := key.state(time.time())) != "active":
        click.echo(f"warning: {name} is {state}: nobody can use its balance", err=True)
    if not key.prepaid:
        click.echo(f"warning: {name} is not prepaid: what it may spend does not depend on its balance", err=True)
    if as_json:
        shown = {"id": made.id, "key": name, "amount": pricing.dollars(made.amount), "note": made.note}
        print_json(
            {**shown, "created": _moment(made.credited_us // 1_000_000), "balance": pricing.dollars(made.balance)}
        )
    else:
        click.echo(f"{name}: {pricing.dollars(made.amount)} US dollars, the balance is {pricing.dollars(made.balance)}")


def _show_once(key: Key, text: str, as_json: bool) -> None:
    from ocserve.cli.model_output import print_json

    if as_json:
        print_json({"key": text, **_described(key)})
        return
    click.echo(text)
    click.echo(f"{key.name} ({key.id}). The key is not kept and cannot be shown again.", err=True)


def _remarks(made: Key, store: KeyStore) -> Iterator[str]:
    """What its maker may not have meant: nobody can administer any more, or a model that is not here."""
    from ocserve import config
    from ocserve.catalog.store import Store

    settings, now = config.load().config, time.time()
    own = settings.auth.api_key is not None or settings.auth.key_file is not None
    if not own and not any(key.scope == "admin" and key.state(now) == "active" for key in store.listed()):
        yield (
            "warning: there are keys and none may administer, so a running server refuses `ocserve ps`, `reload`, "
            "`stop` and the like; `ocserve keys create --name admin --admin` makes one that may"
        )
    installed = Store(settings.store)
    aliases = (*settings.model.aliases, "default")
    for model in made.models:
        if model not in aliases and installed.find(model) is None:
            yield f"warning: no model called {model} is installed here; the key may use it once it is"


def _priced(text: str) -> tuple[str, str]:
    kind, separator, amount = text.partition("=")
    if not separator or not re.fullmatch(r"[a-z_]+", kind):
        raise click.UsageError("a price is written KIND=AMOUNT, such as prompt=0.0000002")
    return kind, amount


def _described(key: Key) -> dict[str, Any]:
    """A key as it may be shown: nothing of its secrets but how many are accepted."""
    import msgspec

    now = time.time()
    return {
        "name": key.name,
        "id": key.id,
        "state": key.state(now),
        "scope": key.scope,
        "created": _moment(key.created),
        "expires": _moment(key.expires),
        "revoked": _moment(key.revoked),
        "models": list(key.models),
        "limits": msgspec.to_builtins(key.limits),
        "price": dict(key.price),
        "prepaid": key.prepaid,
        "spend_cap": key.spend_cap,
        "replaced_secrets_valid_until": [
            _moment(secret.until) for secret in key.secrets if secret.until is not None and secret.until > now
        ],
    }


def _balance(key: Key) -> dict[str, str] | None:
    """A key's money in US dollars; None where no ledger can be read."""
    from ocserve import config
    from ocserve.accounts import balances
    from ocserve.accounts.ledger_schema import LedgerError
    from ocserve.accounts.pricing import dollars

    try:
        now = balances.standings(config.ledger_file(config.load().config.ledger), [key.id]).get(key.id)
    except LedgerError:
        now = None
    if now is None:
        return None
    return {
        "balance": dollars(now.balance),
        "held": dollars(now.held),
        "credited": dollars(now.credited),
        "charged": dollars(now.charged),
        "month": now.month,
        "charged_in_month": dollars(now.month_charged),
    }


def _state(key: Key, now: float) -> str:
    """Whether it is accepted, and until when a secret is that was replaced."""
    state = key.state(now)
    former = [secret.until for secret in key.secrets if secret.until is not None and secret.until > now]
    return f"{state}, old until {_minute(max(former))}" if former and state == "active" else state


def _model_mark(key: Key) -> str:
    """The model that it may use, or how many; `ocserve keys show` names them."""
    if not key.models:
        return "all"
    return key.models[0] if len(key.models) == 1 else f"{len(key.models)} models"


def _marks(key: Key) -> str:
    """What holds for it in place of the settings and the price list, limits by the options that set them."""
    shown = ((name, getattr(key.limits, field)) for name, (field, _) in _LIMITS.items())
    marks = [f"{name} {value or 'unlimited'}" for name, value in shown if value is not None]
    marks += [] if key.spend_cap is None else [f"cap {key.spend_cap}"]
    marks += ["prepaid"] if key.prepaid else []
    return ", ".join([*marks, *(["own prices"] if key.price else [])]) or "the settings'"


def _limit_text(key: Key) -> str:
    shown = ((words, getattr(key.limits, field)) for field, words in _LIMITS.values())
    texts = [f"{value or 'unlimited'} {words}" for words, value in shown if value is not None]
    texts += [] if key.spend_cap is None else [f"{key.spend_cap} US dollars per month"]
    return ", ".join([*texts, *(["prepaid"] if key.prepaid else [])]) or "the settings'"


def _moment(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def _minute(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%m-%d %H:%MZ}"


def _day(seconds: int | None) -> str:
    return (_moment(seconds) or "never")[:10]
