"""So many checks at a time, each in its time; and what is to happen where no verdict comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ocserve import config
from ocserve.errors import ContentFiltered, PolicyUnavailable
from ocserve.generation import TextPrompt
from ocserve.policy.judge import BOUNDS_S, Judge
from ocserve.policy.protocol import Asker, NoVerdict
from tests.policy.moderation import ALLOWED, REFUSED

QUESTION = Asker("req-1", "key-1", "tiny").of_prompt(TextPrompt(text="canary"))


class Hook:
    """Answers `answer` once `open` is set."""

    def __init__(self, answer: bytes | NoVerdict = ALLOWED, *, shut: bool = False) -> None:
        self.answer = answer
        self.open = asyncio.Event()
        if not shut:
            self.open.set()
        self.now = self.most = self.asked = self.cancelled = 0

    async def ask(self, question: bytes) -> bytes:
        self.now += 1
        self.asked += 1
        self.most = max(self.most, self.now)
        try:
            await self.open.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        if isinstance(self.answer, NoVerdict):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        pass


def outcomes(judge: Judge) -> dict[str, int]:
    return dict(judge.stats[0].outcomes)


async def test_what_is_allowed_passes_and_what_is_refused_is_named_by_its_category() -> None:
    judge = Judge(config.Policy(), Hook())
    await judge.admit(QUESTION)
    refusing = Judge(config.Policy(), Hook(REFUSED))
    with pytest.raises(ContentFiltered) as refused:
        await refusing.admit(QUESTION, "prompt[1]")
    info = refused.value.info
    assert (info.status, info.code, info.category) == (400, "content_filter", "violence")
    assert (info.message, info.param) == ("Not here, please.", "prompt[1]")
    assert outcomes(judge) == {"allowed": 1, "refused": 0, "failed": 0}
    assert outcomes(refusing) == {"allowed": 0, "refused": 1, "failed": 0}
    assert sum(judge.stats[0].took) == 1
    assert len(judge.stats[0].took) == len(BOUNDS_S) + 1


async def test_no_more_checks_run_at_once_than_the_settings_say() -> None:
    hook = Hook(shut=True)
    judge = Judge(config.Policy(most_at_once=3), hook)
    checks = [asyncio.create_task(judge.admit(QUESTION)) for _ in range(10)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert hook.now == 3
    hook.open.set()
    await asyncio.gather(*checks)
    assert hook.most == 3


@pytest.mark.parametrize("failure", ["silence", "nonsense", "no verdict"])
@pytest.mark.parametrize("on_failure", ["refuse", "allow"])
async def test_where_no_verdict_comes_the_settings_decide(failure: str, on_failure: Any) -> None:
    answer = NoVerdict("the program ended with status 3") if failure == "no verdict" else b"canary"
    hook = Hook(answer, shut=failure == "silence")
    told: list[tuple[str, dict[str, Any]]] = []
    settings = config.Policy(on_failure=on_failure, timeout_s=0.02 if failure == "silence" else 60.0)
    judge = Judge(settings, hook, lambda name, **facts: told.append((name, facts)))
    if on_failure == "allow":
        await judge.admit(QUESTION)
    else:
        with pytest.raises(PolicyUnavailable) as refused:
            await judge.admit(QUESTION)
        assert (refused.value.status, refused.value.code) == (503, "policy_unavailable")
        assert refused.value.retry_after_s
    assert outcomes(judge) == {"allowed": 0, "refused": 0, "failed": 1}
    assert hook.cancelled == (failure == "silence")
    ((name, facts),) = told
    assert name == "policy_failed"
    assert facts["state"] == "prompt"
    assert "canary" not in str(facts)


async def test_waiting_for_a_turn_is_part_of_the_time() -> None:
    hook = Hook(shut=True)
    judge = Judge(config.Policy(most_at_once=1, timeout_s=0.05), hook)
    found = await asyncio.gather(*(judge.admit(QUESTION) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(error, PolicyUnavailable) for error in found)
    assert hook.now == 0
    assert hook.asked <= 2, "whoever waited began its time anew"
    hook.open.set()
    await judge.admit(QUESTION)  # no place was lost


async def test_a_check_that_nobody_waits_for_is_ended_and_is_no_failure() -> None:
    hook = Hook(shut=True)
    judge = Judge(config.Policy(), hook)
    check = asyncio.create_task(judge.admit(QUESTION))
    for _ in range(5):
        await asyncio.sleep(0)
    check.cancel()
    with pytest.raises(asyncio.CancelledError):
        await check
    assert hook.cancelled == 1
    assert outcomes(judge) == {"allowed": 0, "refused": 0, "failed": 0}
