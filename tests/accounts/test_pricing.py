"""Prices are exact integers from a day on, or the price list is refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.accounts import pricing
from ocserve.accounts.pricing import PICODOLLARS, Rates, dollars, picodollars
from ocserve.config import ConfigError
from ocserve.generation import Usage
from ocserve.modelcard import Prices
from tests.accounts.books import priced

TWO = """
[[price]]
model = "tiny"
prompt = "0.00000002"
completion = "0.00000006"

[[price]]
model = "tiny"
from = 2026-12-01
prompt = "0.00000001"
completion = "0.00000003"
cache_write = "0.000000012"
image = "0.001"
request = "0.000002"
"""
TIERED = """
[[price]]
model = "tiny"
prompt = "0.00000002"
completion = "0.00000006"

[[price.tier]]
above = 1000
completion = "0.00000004"

[[price.tier]]
"""


def test_a_price_holds_from_its_day_on() -> None:
    tariff = priced(text=TWO)
    before, after = datetime.date(2026, 11, 30), datetime.date(2026, 12, 1)
    old, new = tariff.rates("tiny", before), tariff.rates("tiny", after)
    assert old is not None
    assert new is not None
    assert (old.prompt, old.cached_prompt, old.cache_write, old.completion) == (20_000, 20_000, 20_000, 60_000)
    assert (new.prompt, new.cached_prompt, new.cache_write, new.image) == (10_000, 10_000, 12_000, 1_000_000_000)
    found = tariff.prices("tiny", after)
    assert found is not None
    assert (found.prompt, found.request) == ("0.00000001", "0.000002")
    assert tariff.rates("other", after) is None


def test_each_kind_is_charged_at_its_own_price_and_nothing_that_never_began() -> None:
    prices = Prices(
        prompt="0.000003",
        completion="0.000015",
        cached_prompt="0.0000003",
        cache_write="0.00000375",
        image="0.001",
        request="0.0002",
    )
    rates = Rates.of(prices)
    usage = Usage(prompt_tokens=1000, cached_tokens=600, completion_tokens=50, reasoning_tokens=20)
    expected = Decimal("0.0002") + 2 * Decimal("0.001") + 600 * Decimal("0.0000003")
    expected += 400 * Decimal("0.00000375") + 50 * Decimal("0.000015")
    assert rates.cost(usage, images=2) == expected * PICODOLLARS
    assert rates.cost(Usage(), images=2) == 0


@given(st.integers(0, PICODOLLARS), st.integers(0, 12))
def test_dollars_and_picodollars_are_the_same_number(amount: int, zeros: int) -> None:
    text = dollars(amount)
    assert Decimal(text) * PICODOLLARS == amount
    assert picodollars(text) == amount
    assert picodollars(text + "0" * zeros) == amount


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[[price]]\nmodel = "m"\nprompt = "0.0000000000001"\ncompletion = "0"', "finer"),
        ('[[price]]\nmodel = "m"\nprompt = "2"\ncompletion = "0"', "more than a dollar"),
        ('[[price]]\nmodel = "m"\nprompt = 0.1\ncompletion = "0"', "Expected `str`"),
        ('[[price]]\nmodel = "m"\nprompt = "1e-8"\ncompletion = "0"', "regex"),
        ('[[price]]\nmodel = "m"\nprompt = "-1"\ncompletion = "0"', "regex"),
        ('[[price]]\nmodel = "m"\nprompt = "0"', "completion"),
        ('[[price]]\nmodel = "m"\nprompt = "0"\ncompletion = "0"\ncashed = "0"', "cashed"),
        ('[[price]]\nmodel = "m"\nprompt = "0"\ncompletion = "0"\nfrom = "soon"', "date"),
        ('[[price]]\nmodel = "m"\nprompt = "0"\ncompletion = "0"\n' * 2, "two prices"),
        ("[[price]", "Expected"),
        (TIERED + 'above = 1000\nprompt = "0"', "ever more tokens"),
        (TIERED + 'above = 5000\nprompt = "2"', "more than a dollar"),
        (TIERED + "above = 0", "`int` >= 1"),
        (TIERED + 'prompt = "0"', "above"),
    ],
)
def test_a_price_list_that_is_wrong_is_refused_whole(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        pricing.load(file)
    assert reason in refused.value.message
    assert str(file) in refused.value.message


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('prompt = 0.1\ncompletion = "0"', "Expected `str`, got `float` - at `prompt`"),
        ('prompt = "0"', "Object missing required field `completion`"),
        ('prompt = "2"\ncompletion = "0"', "2 is more than a dollar for one"),
        ('prompt = "0"\ncompletion = "0"\n[[price.tier]]\nabove = 7\nprompt = "2"', "2 is more than a dollar for one"),
        ('prompt = "0"\ncompletion = "0"\n[[price.tier]]\nabove = "x"', "- at `tier[0].above`"),
    ],
)
def test_a_mistake_names_the_model_and_the_day(tmp_path: Path, entry: str, words: str) -> None:
    file = tmp_path / "prices.toml"
    sound = '[[price]]\nmodel = "sound"\nprompt = "0"\ncompletion = "0"\n'
    for day, since in (("from = 2026-12-01\n", " from 2026-12-01"), ("", "")):
        file.write_text(f'{sound}[[price]]\nmodel = "tiny"\n{day}{entry}\n')
        with pytest.raises(ConfigError) as refused:
            pricing.load(file)
        assert f": the price of tiny{since}" in refused.value.message
        assert words in refused.value.message
        assert "price[" not in refused.value.message
    file.write_text(sound * 2)
    with pytest.raises(ConfigError, match="the price of sound: a model has two prices"):
        pricing.load(file)


def test_a_tier_changes_what_it_names_and_a_keys_own_prices_hold_in_every_tier() -> None:
    text = TIERED + 'above = 5000\nprompt = "0.00000001"\nrequest = "0.000001"\n'
    listed = priced(text=text).prices("tiny", datetime.date(2026, 11, 30))
    assert listed is not None
    shown = [(above, step.prompt, step.completion, step.request) for above, step in listed.steps]
    assert shown == [
        (0, "0.00000002", "0.00000006", None),
        (1000, "0.00000002", "0.00000004", None),
        (5000, "0.00000001", "0.00000004", "0.000001"),
    ]
    assert [listed.step(tokens)[0] for tokens in (0, 999, 1000, 4999, 5000, 10**12)] == [0, 0, 1000, 1000, 5000, 5000]
    own = pricing.with_own(listed, {"completion": "0.5"})
    assert own is not None
    assert {step.completion for _, step in own.steps} == {"0.5"}
    assert [step.prompt for _, step in own.steps] == [prompt for _, prompt, _, _ in shown]
    with pytest.raises(ValueError, match="no price of tiers"):
        pricing.check_own({"tiers": "1"})


@given(
    st.builds(Rates, **dict.fromkeys(Rates.__struct_fields__, st.integers(0, PICODOLLARS))),
    st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 9),
)  # fmt: skip
def test_no_request_costs_more_than_was_said_to_be_the_most(
    charged: Rates, prompt: int, cached: int, completion: int, images: int
) -> None:
    used = Usage(prompt_tokens=prompt, cached_tokens=min(cached, prompt), completion_tokens=completion)
    assert charged.cost(used, images) <= charged.most(prompt, completion, images)


@pytest.mark.parametrize(("text", "sum_of_money"), [("25.00", 25 * 10**12), ("-0.000000000001", -1), ("7", 7 * 10**12)])
def test_sums_of_money_are_exact(text: str, sum_of_money: int) -> None:
    assert pricing.amount(text) == sum_of_money
    for wrong in ("", "1e3", "1,5", "12345678", "0.0000000000001", "\u0661", "--1", " 1"):
        with pytest.raises(ValueError, match="expected US dollars"):
            pricing.amount(wrong)


def test_a_price_list_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        pricing.load(Path("/nowhere/prices.toml"))
    assert not pricing.load(None)
