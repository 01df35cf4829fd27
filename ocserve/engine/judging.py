"""Whether the objects of an answer that has ended are what its request asked for, before it is called complete.

Small ones are checked in place, within the time of a sampled token or two. For others a thread takes over where that
ended, in slices, so that the loop never waits long for the interpreter; the loop is told in its inbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ocserve.engine.slots import Sequence
from ocserve.engine.validation import Check, Unchecked

_NOT_VALID = "The finished object does not satisfy the schema."
_UNKNOWN = "The finished object could not be checked against the schema."  # too large, too deep
_AT_ONCE, _AT_ONCE_CHARS = 300, 16_384  # steps and characters: about 2 ms
_SLICE, _PAUSE_S = 100, 0.0005  # steps: about half a millisecond
_MOST = 1_000_000  # steps for one answer: some seconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """Inbox message: what was found of an answer that has ended. `fault` None: nothing; it never holds its text."""

    sequence: Sequence
    fault: str | None


class Judge:
    """Asked by the loop's thread only; `tell` is called by another."""

    def __init__(self, tell: Callable[[Verdict], None]) -> None:
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._pending: set[Sequence] = set()

    def ask(self, sequence: Sequence) -> Verdict | None:
        """The verdict on an answer; None where it takes long, to be told once it is known."""
        try:
            objects = sequence.answer.objects()
        except LookupError:  # a call of what was not offered
            return Verdict(sequence, _NOT_VALID)
        checks = [Check(validator, text) for validator, text in objects]
        if sum(len(text) for _, text in objects) <= _AT_ONCE_CHARS:
            verdict = _verdict(sequence, checks, _AT_ONCE // max(1, len(checks)))
            if verdict is not None:
                return verdict
        self._pending.add(sequence)
        self._thread.submit(self._work, sequence, checks)
        return None

    def settles(self, verdict: Verdict) -> bool:
        """Whether the verdict is still waited for; it is not from now on."""
        waited = verdict.sequence in self._pending
        self._pending.discard(verdict.sequence)
        return waited

    def dismiss(self, request_id: str) -> list[Sequence]:
        """The answers to a request that wait for a verdict; they do not from now on."""
        dismissed = [sequence for sequence in self._pending if sequence.id == request_id]
        self._pending.difference_update(dismissed)
        return dismissed

    def _work(self, sequence: Sequence, checks: list[Check]) -> None:
        for _ in range(_MOST // _SLICE):
            verdict = _verdict(sequence, checks, _SLICE)
            if verdict is not None:
                self._tell(verdict)
                return
            if sequence not in self._pending:
                return  # nobody waits for it any more, and others do for theirs
            if time.monotonic() > sequence.deadline:
                break
            time.sleep(_PAUSE_S)  # the loop takes the interpreter, as soon as it is woken
        self._tell(Verdict(sequence, _UNKNOWN))


def _verdict(sequence: Sequence, checks: list[Check], steps: int) -> Verdict | None:
    """What is known after so many more steps for each check; those that are done are taken off."""
    try:
        while checks:
            valid = checks[-1].run(steps)
            if valid is None:
                return Verdict(sequence, _UNKNOWN) if checks[-1].spent > _MOST else None
            if not valid:
                return Verdict(sequence, _NOT_VALID)
            checks.pop()
    except Unchecked:
        return Verdict(sequence, _UNKNOWN)
    except Exception:  # noqa: BLE001  # of a schema that only the compiler makes sense of
        return Verdict(sequence, _UNKNOWN)
    return Verdict(sequence, None)
