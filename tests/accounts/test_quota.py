"""What is said to a key that may not spend what a request can cost."""

from __future__ import annotations

import pytest

from ocserve.accounts import quota
from ocserve.accounts.balances import Account, Standing

NOW = Standing(month="2026-11", credited=100, charged=40, held=10, month_charged=40, month_held=10)


@pytest.mark.parametrize(
    ("account", "limit", "words"),
    [
        (Account(prepaid=True), "balance", "0.00000000006 US dollars, of which 0.00000000001 is held"),
        (Account(spend_cap=70), "spend_cap", "0.00000000004 is spent and 0.00000000001 is held"),
        (Account(prepaid=True, spend_cap=99), "spend_cap", "The month ends at 2026-12-01T00:00:00Z"),
        (Account(prepaid=True, spend_cap=101), "balance", "so 0.00000000005 is left"),
    ],
)
def test_the_tighter_bound_is_named_with_its_numbers_and_what_helps(account: Account, limit: str, words: str) -> None:
    for error in (quota.exhausted(account, NOW, 3), quota.exceeded(account, NOW, 90, fixed=5, token=5)):
        assert error.limit == limit
        assert words in error.message
        assert ("can credit the key" in error.message) is (limit == "balance")


@pytest.mark.parametrize(("fixed", "token", "fits"), [(10, 5, 8), (50, 5, 0), (60, 5, 0), (10, 0, 0)])
def test_how_many_tokens_would_pass_is_said_where_any_would(fixed: int, token: int, fits: int) -> None:
    error = quota.exceeded(Account(prepaid=True), NOW, 90, fixed=fixed, token=token)
    assert (f"With at most {fits} tokens in each answer" in error.message) is (fits > 0)
    assert ("it would pass" in error.message) is (fits > 0)
    assert error.param == ("max_tokens" if fits else None)
