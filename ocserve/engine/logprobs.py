"""Log-probabilities of a distribution as the model gave it, before bias, penalties, masks or temperature change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ocserve.generation import TokenChance, TokenLogprob

Logits = np.ndarray[Any, np.dtype[np.float32]]


class RowLogprobs:
    """What one row of logits says of the next token; takes what it needs at once, all but the logits themselves.

    A mask may be laid over the logits afterwards, as long as it leaves alone those of the tokens that are asked for.
    Takes about 0.5 ms for a vocabulary of 49,000 tokens.
    """

    def __init__(self, logits: Logits, best: int, piece: Callable[[int], bytes]) -> None:
        """`best` is how many alternatives to report, `piece` gives a token's bytes."""
        self._logits = logits
        self._piece = piece
        highest = logits.max()
        # Log-softmax is the logit less this; summed in double, since a large vocabulary is a long sum.
        self._total = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
        self._top = tuple(self._chance(token) for token in _best(logits, best))

    def of(self, token: int) -> TokenLogprob:
        """The log-probability of `token` beside the best alternatives."""
        return TokenLogprob(chosen=self._chance(token), top=self._top)

    def _chance(self, token: int) -> TokenChance:
        return TokenChance(token, self._piece(token), float(self._logits[token]) - self._total)


def _best(logits: Logits, count: int) -> list[int]:
    """The ids of the `count` largest logits, largest first; of equal ones the lowest id first."""
    count = min(count, len(logits))
    if not count:
        return []
    least = np.partition(logits, -count)[-count]
    above = np.flatnonzero(logits >= least)  # ties at the border are among them, in order of their ids
    found: list[int] = above[np.argsort(-logits[above], kind="stable")][:count].tolist()
    return [token for token in found if np.isfinite(logits[token])]  # some models rule tokens out themselves
