"""Drafts from a text that the client expects much of the answer to repeat, such as a file that is being edited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ocserve.engine.speculation import Drafter

_ORDER = 3  # tokens by which a place in the prediction is recognised


class Prediction:
    """Follows the prediction from its beginning; where the answer leaves it, another drafter guesses meanwhile.

    The answer is back where its last three tokens stand in the prediction: behind the place where it left, if there.
    """

    def __init__(self, predicted: Sequence[int], other: Drafter) -> None:
        """`other` has been given the prompt."""
        self._predicted = tuple(predicted)
        self._other = other
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)  # behind each run of `_ORDER`, ascending
        for end in range(_ORDER, len(self._predicted)):
            self._places[self._predicted[end - _ORDER : end]].append(end)
        self._next = 0  # the place that the answer has reached, or where it left
        self._following = bool(predicted)
        self._tail: tuple[int, ...] = ()

    @property
    def light(self) -> bool:
        return self._other.light

    def extend(self, tokens: Sequence[int]) -> None:
        self._other.extend(tokens)
        for token in tokens:
            self._tail = (*self._tail, token)[-_ORDER:]
            if self._following and self._predicted[self._next] == token:
                self._next += 1
            else:
                self._return()
            self._following = self._following and self._next < len(self._predicted)

    def _return(self) -> None:
        places = self._places.get(self._tail, ())
        self._following = bool(places)
        if places:
            self._next = next((place for place in places if place > self._next), places[0])

    def ready(self) -> bool:
        return self._following or self._other.ready()

    def draft(self, most: int) -> list[int]:
        if not self._following:
            return self._other.draft(most)
        foretold = list(self._predicted[self._next : self._next + most])
        return foretold + foretold[-1:] * (most - len(foretold))  # a draft has its length, however little is foretold

    def close(self) -> None:
        self._other.close()
        self._following = False
