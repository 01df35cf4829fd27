"""One model's place in the service: how it is answered for, what it owes, and how much may wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ocserve.engine.handle import Engine
from ocserve.engine.wire import EngineFacts
from ocserve.errors import InvalidRequest, Overloaded
from ocserve.modelcard import ServedModel

_FIRST_GUESS_S = 1.0  # of a generation's duration while none has ended
_LONGEST_RETRY_S = 119.0  # the usual SDKs give up when told to wait more than 120 s
# Of prompts that are only tokenised: one thread takes them in order, and what generates waits behind them.
_MOST_ENCODING = 64
_MOST_ENCODING_BYTES = 32 * 1024 * 1024
_ENCODING_RETRY_S = 1.0
# Of all prompts that are answered or wait, the files of their images included: what this process and the engine keep.
_MOST_BYTES = 512 * 1024 * 1024

# How a model is answered for, given what its engine said of itself when it was last loaded (None: never yet).
Describe = Callable[[EngineFacts | None], ServedModel]


class Desk:
    """The answers that one model has been asked for and owes."""

    def __init__(self, engine: Engine, describe: Describe, queue_limit: int) -> None:
        self.engine = engine
        self._describe = describe
        self._queue_limit = queue_limit
        self._facts = engine.facts
        self._model = describe(engine.facts)
        self.owed = 0  # a request of several choices counts as that many: it takes as many slots
        self._bytes = 0  # of the prompts owed
        self._encoding: list[int] = []  # the bytes of each prompt that is to be tokenised only
        self._typical_s: float | None = None  # moving average of a generation's time in its slot
        self._promised = 0.0  # the last moment that an overloaded client was told, so that the next one is told a later

    @property
    def model(self) -> ServedModel:
        """The model as its engine's latest facts have it."""
        if self.engine.facts is not self._facts:
            self._facts = self.engine.facts
            self._model = self._describe(self._facts)
        return self._model

    def check_queue(self, choices: int = 1, param: str = "n") -> None:
        """Refuse early instead of queueing without bound, each client with a moment of its own to come back.

        A request of more `choices` than ever fit is refused for good; `param` is what has them be so many.
        """
        slots = self.model.parallel
        room = slots + self._queue_limit
        if choices > room:
            raise InvalidRequest(
                f"This request asks for {choices} answers; at most {room} of this model are generated or waited for.",
                param=param,
            )
        if self.owed + choices <= room:
            return
        turn_s = (self._typical_s or _FIRST_GUESS_S) / slots
        now = time.monotonic()
        self._promised = max(now + (self.owed - slots + choices) * turn_s, self._promised + choices * turn_s)
        raise Overloaded(
            f"{self.owed} answers are generated or waited for; this request would make them more than {room}.",
            retry_after_s=min(self._promised - now, _LONGEST_RETRY_S),
        )

    @contextmanager
    def place(self, choices: int = 1, size: int = 0) -> Iterator[None]:
        """Owe that many answers, to prompts of `size` bytes together; raises as `check_queue`."""
        self.check_queue(choices)
        if self._bytes and self._bytes + size > _MOST_BYTES:
            raise Overloaded(
                f"The prompts that are answered or waited for have {self._bytes} bytes; this request would make them "
                f"more than {_MOST_BYTES}.",
                retry_after_s=self._typical_s or _FIRST_GUESS_S,
            )
        self.owed += choices
        self._bytes += size
        try:
            yield
        finally:
            self.owed -= choices
            self._bytes -= size

    @contextmanager
    def encoding(self, size: int) -> Iterator[None]:
        """Hold a place for a prompt of `size` bytes that is to be tokenised only; raises `Overloaded`."""
        full = len(self._encoding) >= _MOST_ENCODING
        if full or (self._encoding and sum(self._encoding) + size > _MOST_ENCODING_BYTES):
            raise Overloaded(
                f"{len(self._encoding)} prompts already wait to be tokenised.", retry_after_s=_ENCODING_RETRY_S
            )
        self._encoding.append(size)
        try:
            yield
        finally:
            self._encoding.remove(size)

    def learn(self, seconds: float) -> None:
        """A generation held its slot for `seconds`."""
        self._typical_s = seconds if self._typical_s is None else self._typical_s + 0.1 * (seconds - self._typical_s)
