"""What is said to whoever may not spend what a request can cost: the numbers, and what would help."""

from __future__ import annotations

from ocserve.accounts.balances import Account, Standing, month_end
from ocserve.accounts.pricing import dollars
from ocserve.errors import InsufficientQuota


def exhausted(account: Account, standing: Standing, least: int) -> InsufficientQuota:
    """Nothing is left of what bounds a key's spending; `least` picodollars is what the smallest request may cost."""
    bounds, setting = _bounds(account, standing)
    return _refused(
        f"{bounds} Even a request of one token in and one out may cost {dollars(least)} US dollars.",
        setting,
    )


def exceeded(account: Account, standing: Standing, most: int, *, fixed: int, token: int) -> InsufficientQuota:
    """Less is left than a request can cost. Of its `most` picodollars `fixed` are sure, `token` is what a token more of
    each of its answers costs; 0 where it asks for none.
    """
    bounds, setting = _bounds(account, standing)
    left = standing.left(account)
    assert left is not None
    fits = (left - fixed) // token if token else 0
    advice = f" With at most {fits} tokens in each answer (`max_tokens`) it would pass." if fits > 0 else ""
    error = _refused(f"{bounds} This request may cost up to {dollars(most)} US dollars.{advice}", setting)
    error.param = "max_tokens" if fits > 0 else None
    return error


def _refused(words: str, setting: str) -> InsufficientQuota:
    ask = " Whoever runs this server can credit the key." if setting == "balance" else ""
    error = InsufficientQuota(words + ask)
    error.limit = setting
    return error


def _bounds(account: Account, standing: Standing) -> tuple[str, str]:
    """What bounds a key most, in words and by its name."""
    under_cap = None if account.spend_cap is None else account.spend_cap - standing.month_charged - standing.month_held
    if under_cap is None or (account.prepaid and standing.available <= under_cap):
        return (
            f"This key is prepaid: its balance is {dollars(standing.balance)} US dollars, of which "
            f"{dollars(standing.held)} is held for requests that are running, so {dollars(max(0, standing.available))} "
            "is left."
        ), "balance"
    assert account.spend_cap is not None
    return (
        f"This key may spend {dollars(account.spend_cap)} US dollars in a calendar month, of which "
        f"{dollars(standing.month_charged)} is spent and {dollars(standing.month_held)} is held for requests that are "
        f"running. The month ends at {month_end(standing.month):%Y-%m-%dT%H:%M:%SZ}."
    ), "spend_cap"
