"""The events of an admitted request, in the order in which its client may be told of them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

from ocserve.engine.flights import numbered, unfinished
from ocserve.generation import Failed, GenerateEvent, GenerateRequest
from ocserve.policy.review import Placed, Review
from ocserve.trace import Trace


class Generation:
    """An admitted request that holds its slot: iterate for its events, up to the last `Finished` or to a `Failed`.

    The answers to several prompts are generated together and told one after the other, their choices numbered on.
    """

    def __init__(
        self,
        trace: Trace,
        requests: Sequence[GenerateRequest],
        streams: Sequence[AsyncIterator[GenerateEvent]],
        ignored: tuple[str, ...],
        review: Review | None = None,
    ) -> None:
        self.ignored = ignored  # fields of the request that this model has no use for
        self._unfinished = [request.choices for request in requests]
        self._first = [0, *accumulate(self._unfinished)]  # the number of each prompt's first choice
        self._untold = sum(self._unfinished)  # choices whose end has not been told
        self._trace = trace
        self._streams = streams
        self._review = review
        self._ready: deque[Placed] = deque()
        self._wanted = True

    @property
    def ended(self) -> bool:
        """Whether every choice has ended, well or not."""
        return not self._untold

    async def __aiter__(self) -> AsyncIterator[GenerateEvent]:
        while not self.ended:
            if not self._ready:
                self._ready += await self._more()
                continue
            prompt, event = self._ready.popleft()
            self._trace.observe(event, prompt, self._first[prompt])
            self._untold = unfinished(self._untold, event)
            if self.ended and self._wanted:
                await self._trace.settle()
            yield event

    async def _more(self) -> list[Placed]:
        """What may be told next; nothing while it waits to be judged."""
        prompt = next((prompt for prompt, left in enumerate(self._unfinished) if left), None)
        if prompt is None:
            assert self._review is not None
            rest = await self._review.judged() if self._wanted else self._review.given_up()
            self._trace.keepable = not self._review.told_in_vain
            return rest
        event = await anext(self._streams[prompt])
        self._unfinished[prompt] = unfinished(self._unfinished[prompt], event)
        if isinstance(event, Failed):
            self._unfinished = [0 for _ in self._unfinished]
        told = numbered(event, self._first[prompt])
        return [(prompt, told)] if self._review is None else self._review.take(prompt, told)

    async def cancelled(self) -> None:
        """Read on to the end of a cancelled generation, so that its usage is exact; nobody is told of it."""
        self._wanted = False
        async for _ in self:
            pass
