"""Which requests are refused after crashes, and for how long."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ocserve.engine import quarantine
from ocserve.engine.quarantine import Quarantine
from ocserve.errors import RequestQuarantined
from ocserve.generation import GenerateRequest, Sampling, TextPrompt

REQUEST = GenerateRequest(
    request_id="one", model="m", prompt=TextPrompt(text="poison"), sampling=Sampling(logit_bias={7: 1.0}), max_tokens=5
)


def test_a_retry_is_recognised_whatever_its_id_and_other_work_is_not() -> None:
    known = Quarantine()
    assert known.digest(REQUEST) == known.digest(replace(REQUEST, request_id="two", salt=b"other"))
    assert known.digest(REQUEST) != known.digest(replace(REQUEST, prompt=TextPrompt(text="benign")))
    assert known.digest(REQUEST) != Quarantine().digest(REQUEST)


def test_two_crashes_refuse_and_time_forgives() -> None:
    now = [0.0]
    known = Quarantine(clock=lambda: now[0])
    digest = known.digest(REQUEST)
    known.crashed([digest])
    known.check(digest)
    known.crashed([digest])
    with pytest.raises(RequestQuarantined) as refusal:
        known.check(digest)
    assert "poison" not in refusal.value.message
    now[0] += quarantine.FORGET_AFTER_S + 1
    known.check(digest)


def test_completing_clears() -> None:
    known = Quarantine()
    digest = known.digest(REQUEST)
    known.crashed([digest])
    known.completed(digest)
    known.crashed([digest])
    known.check(digest)


def test_memory_is_bounded() -> None:
    known = Quarantine()
    known.crashed(index.to_bytes(32, "big") for index in range(quarantine.CAPACITY + 100))
    assert len(known._suspects) == quarantine.CAPACITY
