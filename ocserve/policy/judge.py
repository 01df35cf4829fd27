"""Asks for verdicts: so many at a time, each in its time, and says what is to happen where none comes."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ocserve import config
from ocserve.errors import ApiError, ContentFiltered, PolicyUnavailable
from ocserve.policy.hooks import Hook
from ocserve.policy.protocol import NoVerdict, Question, Refusal, Stage, verdict

# Bounds of how long a check took, in seconds.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_RETRY_S = 5.0

Outcome = Literal["allowed", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of one stage so far: how they ended, how many took at most each of `BOUNDS_S` or longer, and how long
    all took together, in seconds. Where no verdict came is `failed`, whatever then happened."""

    stage: Stage
    outcomes: tuple[tuple[Outcome, int], ...]
    took: tuple[int, ...]
    took_s: float

    @property
    def bounds_s(self) -> tuple[float, ...]:
        """The bounds of `took`."""
        return BOUNDS_S


class Judge:
    """Puts content before `hook`, as the settings say. `on_event` is told of what the operator should know."""

    def __init__(
        self, settings: config.Policy, hook: Hook, on_event: Callable[..., None] = lambda name, **facts: None
    ) -> None:
        self._settings = settings
        self._hook = hook
        self._on_event = on_event
        self._places = asyncio.Semaphore(settings.most_at_once)
        self._waits: dict[asyncio.Timeout, ApiError | None] = {}  # for verdicts, and what some are to end with
        self._outcomes: dict[Stage, Counter[Outcome]] = {stage: Counter() for stage in settings.checks}
        self._took: dict[Stage, list[int]] = {stage: [0] * (len(BOUNDS_S) + 1) for stage in settings.checks}
        self._took_s: dict[Stage, float] = dict.fromkeys(settings.checks, 0.0)

    @property
    def stats(self) -> tuple[Checks, ...]:
        """The checks so far, of each stage that is judged."""
        outcomes: tuple[Outcome, ...] = ("allowed", "refused", "failed")
        return tuple(
            Checks(
                stage,
                tuple((outcome, self._outcomes[stage][outcome]) for outcome in outcomes),
                tuple(self._took[stage]),
                self._took_s[stage],
            )
            for stage in self._outcomes
        )

    @property
    def holds_streams(self) -> bool:
        """Whether a streamed answer waits for its verdict."""
        return self._settings.streams == "hold"

    def judges(self, stage: Stage) -> bool:
        """Whether content of this stage is judged at all."""
        return stage in self._settings.checks

    async def admit(self, question: Question, param: str | None = None) -> None:
        """Raise `ContentFiltered` for a prompt that is refused, and `PolicyUnavailable` where it cannot be judged.

        `param` is what a refusal names.
        """
        refusal = await self.verdict(question)
        if refusal is not None:
            error = ContentFiltered(refusal.message, param=param)
            error.category = refusal.category
            raise error

    async def verdict(self, question: Question) -> Refusal | None:
        """What is held against the content; raises `PolicyUnavailable`, and what `refuse_waiting` is given."""
        stage = question.stage
        begun = time.monotonic()
        refusal, failure, refused_with = None, "", None
        wait = asyncio.timeout(self._settings.timeout_s)
        self._waits[wait] = None
        try:
            async with wait, self._places:
                refusal = verdict(await self._hook.ask(question.encoded()))
        except TimeoutError:
            failure = f"no verdict within {self._settings.timeout_s:g} s"
            refused_with = self._waits[wait]
        except NoVerdict as error:
            failure = str(error)
        finally:
            del self._waits[wait]
        took_s = time.monotonic() - begun
        self._outcomes[stage]["failed" if failure else "refused" if refusal else "allowed"] += 1
        self._took[stage][bisect_left(BOUNDS_S, took_s)] += 1
        self._took_s[stage] += took_s
        if refused_with is not None:
            raise refused_with
        if not failure:
            return refusal
        self._on_event("policy_failed", level="warning", request_id=question.request_id, state=stage, reason=failure)
        if self._settings.on_failure == "allow":
            return None
        raise PolicyUnavailable(
            "The content of this request cannot be judged at present, and nothing passes here without.",
            retry_after_s=_RETRY_S,
        )

    def refuse_waiting(self, error: ApiError) -> None:
        """End every wait for a verdict with `error`, whatever is to happen where none comes."""
        for wait in self._waits:
            if not wait.expired():
                self._waits[wait] = error
                wait.reschedule(0.0)

    async def close(self) -> None:
        """Let go of what the hook keeps."""
        await self._hook.close()
