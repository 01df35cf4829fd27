"""Balances are credits less costs, whatever happens to rows; what is held keeps them from being overspent."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ocserve.accounts import balances, usage
from ocserve.accounts import ledger as module
from ocserve.accounts.balances import Account, Credit, Declined, Standing, month_end, month_of
from ocserve.accounts.ledger import Ledger, Row
from ocserve.accounts.ledger_schema import DAY_US, HOUR_US, RECENT_HOURS, LedgerError, now_us
from tests.accounts.books import opened, settled
from tests.accounts.disks import disk
from tests.accounts.test_ledger import Failing

PREPAID = Account(prepaid=True)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def ledger(file: Path, *, days: int = 30, vfs: str | None = None) -> Iterator[Ledger]:
    made = Ledger(file, retention_days=days, vfs=vfs)
    try:
        yield made
    finally:
        made.close()


def credited(amount: int, key_id: str = "key", **fields: object) -> Credit:
    return Credit(key_id=key_id, amount=amount, made_by="admin", **fields)  # type: ignore[arg-type]


def wanting(number: int, most: int, *, key_id: str = "key", admitted_us: int | None = None) -> Row:
    row = replace(opened(number, key_id=key_id), held=most, reserved_tokens=10)
    return row if admitted_us is None else replace(row, admitted_us=admitted_us)


def costing(row: Row, cost: int) -> Row:
    return replace(settled(row), cost=cost, held=0, reserved_tokens=0)


def standing(books: Ledger, key_id: str = "key", month: str | None = None, model: str = "tiny") -> Standing:
    return books.standing(key_id, month or month_of(now_us()), model).result(5)


def test_a_request_is_taken_on_only_if_its_most_possible_cost_fits(tmp_path: Path) -> None:
    with ledger(tmp_path / "ledger.db") as books:
        assert not books.hold(wanting(0, 1), PREPAID).result(5).granted
        assert books.credit(credited(100)).result(5).balance == 100
        first, second = wanting(1, 60), wanting(2, 40)
        assert books.hold(first, PREPAID).result(5).standing.available == 40
        assert books.hold(second, PREPAID).result(5).granted
        refused = books.hold(wanting(3, 1), PREPAID).result(5)
        assert (refused.granted, refused.standing.balance, refused.standing.held) == (False, 100, 100)
        assert books.settle(costing(first, 7)).result(5)
        assert books.hold(wanting(4, 53), PREPAID).result(5).granted
        now = standing(books)
        assert (now.credited, now.charged, now.held, now.available) == (100, 7, 93, 0)


def test_a_cap_is_of_the_month_in_which_a_request_was_admitted(tmp_path: Path) -> None:
    capped = Account(spend_cap=100)
    now = now_us()
    before = now - 40 * DAY_US
    with ledger(tmp_path / "ledger.db", days=400) as books:
        old = wanting(1, 90, admitted_us=before)
        told = books.hold(old, capped).result(5)
        assert (told.granted, told.standing.month_held, told.standing.left(capped)) == (True, 90, 10)
        assert not books.hold(wanting(2, 11, admitted_us=before), capped).result(5).granted
        new = wanting(3, 100, admitted_us=now)
        assert books.hold(new, capped).result(5).granted
        assert books.settle(costing(old, 90)).result(5)
        assert books.settle(costing(new, 30)).result(5)
        assert (standing(books, month=month_of(before)).month_charged, standing(books).month_charged) == (90, 30)
        assert standing(books).balance == -120  # nobody said that the key is prepaid
    assert f"{month_end('2026-12'):%Y-%m-%d}" == "2027-01-01"
    assert f"{month_end('2026-02'):%Y-%m-%d}" == "2026-03-01"


def test_sums_outlast_rows_restarts_and_what_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.db"
    with ledger(file) as books:
        assert books.credit(credited(1000)).result(5)
        old = wanting(1, 50, admitted_us=now_us() - 20 * DAY_US)
        assert books.hold(old, PREPAID).result(5).granted
        for cost in (50, 50, 40):  # settled again, with what turned out to be right
            assert books.settle(costing(old, cost)).result(5)
    monkeypatch.setattr(module, "_this_process", lambda: "999999999@1.00")
    with ledger(file) as dead:  # the process ends with a request in flight
        assert dead.hold(wanting(2, 300), PREPAID).result(5).granted
    monkeypatch.undo()
    with ledger(file, days=3) as books:
        connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
        assert connection.execute("SELECT id, outcome FROM requests").fetchall() == [("id-2", "lost")]
        connection.close()
        now = standing(books)
        assert (now.balance, now.held) == (960, 0)
        assert books.settle(costing(wanting(2, 300), 200)).result(5)  # it lived after all
        assert standing(books).balance == 760


def test_an_old_month_is_forgotten_once_nothing_of_it_is_held(tmp_path: Path) -> None:
    file, long_ago = tmp_path / "ledger.db", now_us() - 200 * DAY_US
    month = month_of(long_ago)
    with ledger(file, days=400) as books:
        running = wanting(1, 50, admitted_us=long_ago)
        assert books.hold(running, Account(spend_cap=100)).result(5).granted
        connection = apsw.Connection(str(file))
        balances.forget(connection, before_hour=0, before_month=month_of(now_us()))
        assert standing(books, month=month).month_held == 50
        assert books.settle(costing(running, 30)).result(5)
        assert standing(books, month=month).month_charged == 30
        balances.forget(connection, before_hour=0, before_month=month_of(now_us()))
        assert standing(books, month=month).month_charged == 0
        connection.close()


def test_hours_count_until_a_days_limits_have_forgotten_them(tmp_path: Path) -> None:
    hour = now_us() // HOUR_US
    with ledger(tmp_path / "ledger.db") as books:
        for number, ago in enumerate((1, RECENT_HOURS - 1, RECENT_HOURS + 1)):
            books.open(replace(opened(number), admitted_us=(hour - ago) * HOUR_US))
        assert [each.hour - hour for each in books.recent()] == [1 - RECENT_HOURS, -1]


def test_a_credit_is_made_once_and_declined_where_it_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with ledger(file) as books:
        made = books.credit(credited(50, note="invoice 7", idempotency_key="a")).result(5)
    with ledger(file) as books:
        again = books.credit(credited(50, note="invoice 7", idempotency_key="a")).result(5)
        assert again == made
        other = books.credit(replace(credited(50, idempotency_key="a"), made_by="somebody else")).result(5)
        assert other.balance == 100
        with pytest.raises(Declined) as declined:
            books.credit(credited(51, note="invoice 7", idempotency_key="a")).result(5)
        assert declined.value.reused
        assert books.hold(wanting(1, 30), PREPAID).result(5).granted
        for impossible, reason in (
            (credited(0), "nothing"),
            (credited(-10), "correction"),
            (credited(-71, correction=True), "at most 0.00000000007 can be taken back"),
            (credited(balances.MOST), "that much"),
        ):
            with pytest.raises(Declined, match=reason):
                books.credit(impossible).result(5)
        assert books.healthy
        assert books.credit(credited(-70, correction=True)).result(5).balance == 30
        assert standing(books).available == 0


def test_a_hold_that_cannot_be_written_is_known_and_settled_leaves_nothing_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    failing = Failing(1, apsw.FullError, lasting=True)
    failing.mended = True
    file = tmp_path / "ledger.db"
    with disk(failing) as vfs, ledger(file, vfs=vfs) as books:
        assert books.credit(credited(100)).result(5)
        failing.mended = False
        wanted = wanting(1, 60)
        with pytest.raises(LedgerError):
            books.hold(wanted, PREPAID).result(5)
        assert not books.settle(replace(costing(wanted, 0), outcome="failed")).result(5)
        with pytest.raises(LedgerError):
            books.credit(credited(5)).result(5)
        failing.mended = True
        while not books.healthy:
            threading.Event().wait(0.001)
        now = standing(books)
        assert (now.balance, now.held) == (100, 0)


def test_daemons_that_share_a_ledger_share_the_balance(tmp_path: Path) -> None:
    """Two of them, each asked by four threads at once: together they take on no more than was credited."""
    file = tmp_path / "ledger.db"
    granted: list[int] = []
    with ledger(file) as one, ledger(file) as other:
        balances.add_credit(file, credited(100))

        def ask(books: Ledger, first: int) -> None:
            for number in range(first, first + 12):
                row = wanting(number, 7)
                if books.hold(row, PREPAID).result(10).granted:
                    granted.append(number)
                    assert books.settle(costing(row, 5)).result(10)
                assert standing(books).available >= 0

        threads = [
            threading.Thread(target=ask, args=(books, 100 * place))
            for place, books in enumerate((one, other) * 4, start=1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        now = standing(one)
    assert (now.charged, now.held) == (5 * len(granted), 0)
    assert 0 <= now.balance < 7


def test_what_settled_requests_of_a_month_used_is_counted_by_model(tmp_path: Path) -> None:
    with ledger(tmp_path / "ledger.db") as books:
        row = replace(opened(1), reserved_tokens=500)
        books.open(row)
        assert standing(books).month_tokens == 0  # not until it is settled
        assert books.settle(replace(settled(row), reserved_tokens=0)).result(5)
        assert books.settle(replace(settled(opened(2)), model="other")).result(5)
        assert standing(books).month_tokens == settled(row).prompt_tokens + settled(row).completion_tokens
        (tiny,) = [each for each in books.recent() if each.model == "tiny"]
        assert (tiny.requests, tiny.tokens) == (1, standing(books).month_tokens)
        books.tally("key", "tiny")
        running = replace(opened(3), reserved_tokens=500)
        books.open(running)
        (tiny,) = [each for each in books.recent() if each.model == "tiny"]
        assert (tiny.requests, tiny.tokens) == (3, standing(books).month_tokens + 500)


@pytest.mark.parametrize("credit_between", [0, 600])
def test_what_runs_while_its_key_is_purged_stays_held_and_is_charged(tmp_path: Path, credit_between: int) -> None:
    file = tmp_path / "ledger.db"
    account = Account(prepaid=True, spend_cap=500)
    with ledger(file) as books:
        books.credit(credited(1000)).result(5)
        books.credit(credited(70, key_id="other")).result(5)
        beside, running, over = wanting(1, 30, key_id="other"), wanting(2, 400), wanting(3, 10)
        assert all(books.hold(row, account).result(5).granted for row in (beside, running, over))
        assert books.settle(costing(over, 10)).result(5)
        assert usage.purge(file, usage.Span(key="key")) == 1
        if credit_between:
            assert books.credit(credited(credit_between)).result(5).balance == credit_between
            assert not books.hold(wanting(4, 101), account).result(5).granted  # more than the cap leaves
        now = standing(books)
        assert (now.balance, now.held, now.month_charged, now.month_held) == (credit_between, 400, 0, 400)
        assert [(each.requests, each.tokens) for each in books.recent() if each.key_id == "key"] == [(1, 10)]
        assert books.settle(costing(running, 300)).result(5)
        now = standing(books)
        assert (now.balance, now.held, now.month_charged, now.month_held) == (credit_between - 300, 0, 300, 0)
        used = settled(running).prompt_tokens + settled(running).completion_tokens
        assert now.month_tokens == used
        assert [(each.requests, each.tokens) for each in books.recent() if each.key_id == "key"] == [(1, used)]
        assert standing(books, "other").available == 40
    assert usage.purge(file, usage.Span(key="key")) == 1
    assert list(balances.standings(file)) == ["other"]


Deed = tuple[str, int, int]
DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("credit"), st.integers(1, 200), st.just(0)),
        st.tuples(st.just("hold"), st.integers(1, 120), st.just(0)),
        st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 120)),
        st.tuples(st.just("take back"), st.integers(1, 200), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(DEEDS, st.integers(50, 400))
def test_no_order_of_deeds_overspends_a_balance_or_a_cap(deeds: list[Deed], cap: int) -> None:
    """Against a model that keeps every credit, hold and cost apart."""
    account = Account(prepaid=True, spend_cap=cap)
    paid, holds, costs = 0, dict[int, Row](), dict[int, int]()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, ledger(Path(folder) / "ledger.db") as books:
        for number, (deed, one, other) in enumerate(deeds):
            available = paid - sum(costs.values()) - sum(row.held for row in holds.values())
            match deed:
                case "credit":
                    assert books.credit(credited(one)).result(5).balance == paid + one - sum(costs.values())
                    paid += one
                case "take back":
                    outcome = books.credit(credited(-one, correction=True))
                    if one <= available:
                        outcome.result(5)
                        paid -= one
                    else:
                        assert isinstance(outcome.exception(5), Declined)
                case "hold":
                    row = wanting(number, one)
                    spent = sum(costs.values()) + sum(held.held for held in holds.values())
                    fits = one <= min(available, cap - spent)
                    assert books.hold(row, account).result(5).granted == fits
                    if fits:
                        holds[number] = row
                case _ if holds or costs:
                    known = sorted({*holds, *costs})
                    which = known[one % len(known)]
                    row = holds.pop(which, None) or wanting(which, costs[which])
                    costs[which] = min(other, row.held)  # a settled one again: never more than it was
                    assert books.settle(costing(row, costs[which])).result(5)
            now = standing(books)
            assert (now.credited, now.charged) == (paid, sum(costs.values()))
            assert now.held == sum(row.held for row in holds.values()) == now.month_held
            assert now.available >= 0
            assert now.month_charged + now.month_held <= cap
