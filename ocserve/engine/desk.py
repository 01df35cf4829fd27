"""One model's place in the service: how it is answered for, what it owes, and how much may wait for it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ocserve.engine.handle import Engine
from ocserve.engine.shares import Shares
from ocserve.engine.wire import EngineFacts
from ocserve.errors import InvalidRequest, Overloaded
from ocserve.modelcard import ServedModel

_FIRST_GUESS_S = 1.0  # of a generation's duration while none has ended
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
        self.queue_limit = queue_limit
        self._facts = engine.facts
        self._model = describe(engine.facts)
        self.owed = 0  # a request of several choices counts as that many: it takes as many slots
        self._bytes = 0  # of the prompts owed
        self._encoding: list[int] = []  # the bytes of each prompt that is to be tokenised only
        self._typical_s: float | None = None  # moving average of a generation's time in its slot
        self.shares = Shares()

    @property
    def model(self) -> ServedModel:
        """The model as its engine's latest facts have it."""
        if self.engine.facts is not self._facts:
            self._facts = self.engine.facts
            self._model = self._describe(self._facts)
        return self._model

    def describe(self, describe: Describe) -> None:
        """Answer for the model in another way."""
        if describe is not self._describe:
            self._describe, self._model = describe, describe(self._facts)

    @property
    def most_owed(self) -> int:
        """Answers that are generated, and those that may wait."""
        return self.model.parallel + self.queue_limit

    @property
    def returning(self) -> int:
        """Places at the end of the queue for those who come back as they were told."""
        return min(self.queue_limit, math.isqrt(self.model.parallel))

    def most_slots(self, spare: int) -> int:
        """How many slots one key may fill where `spare` of them are left to others; all, where that would be none."""
        slots = self.model.parallel
        return slots - spare if 0 < spare < slots else sys.maxsize

    def check_size(self, choices: int, param: str) -> None:
        """Refuse for good a request of more `choices` than ever fit; `param` is what has them be so many."""
        if choices > self.most_owed:
            raise InvalidRequest(
                f"This request asks for {choices} answers; at most {self.most_owed} of this model are generated or "
                "waited for.",
                param=param,
            )

    @contextmanager
    def place(self, choices: int = 1, size: int = 0) -> Iterator[None]:
        """Owe that many answers, to prompts of `size` bytes together; raises `Overloaded`."""
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
