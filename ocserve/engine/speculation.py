"""Speculative decoding: tokens guessed cheaply, verified together in one batch, and only where that is faster.

A step computes a sequence's newest token and its draft as rows of one batch, and `verified` samples from these rows
with the sequence's own sampler until a sampled token differs from the draft. Every output token is thus drawn from the
model's distribution given the true prefix, by as many draws as there are tokens: the output distribution is that of
decoding without drafts, and for one random stream so is the text (up to the rounding that larger batches cause). It is
speculative sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) for a proposal that
puts all its mass on the drafted token x: accepting x with probability min(1, p(x)/1) and else drawing from the
residual, p without x, is the same as drawing from p and comparing.

A draft costs rows, so each sequence has a `Speculator` that weighs measured acceptance against measured cost. While it
does not pay, drafts are compared with what is generated anyway (*shadow* drafts), which costs no rows. Accounts of the
time won and lost bound the loss whatever the acceptance does: over its life a sequence loses at most `LOSS` of its time
plus one verified and one shadow draft, as priced by the cost model.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import mul
from statistics import median
from typing import Protocol

import numpy as np

MOST_DRAFTED = 8  # tokens; further ones are rarely reached, and each asks for one more distribution
MARGIN = 0.05  # a draft must promise this much more throughput: predictions are not exact
LOSS = 0.01  # the part of a sequence's time that drafting may lose


class Drafter(Protocol):
    """Guesses how one sequence goes on. The guess is deterministic and may fail: it is never an error."""

    @property
    def light(self) -> bool:
        """Whether it may be asked on another thread than the loop's, beside a decode."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append true tokens of the sequence: its prompt, then what is generated."""

    def ready(self) -> bool:
        """Whether `draft` may have something now; told at no cost worth counting."""

    def draft(self, most: int) -> list[int]:
        """Exactly `most` guessed tokens, or none."""

    def close(self) -> None:
        """Give back what it holds; after that it drafts nothing."""


def verified(draft: Sequence[int], sample: Callable[[int], int]) -> Iterator[int]:
    """Yield the output tokens of a step: one more than are accepted of `draft`.

    `sample(i)` draws from the distribution behind row i: row 0 is the newest token's, row i + 1 that of `draft[i]`. It
    is called only as tokens are taken, so a sequence that ends midway draws nothing more.
    """
    for row in range(len(draft) + 1):
        token = sample(row)
        yield token
        if row < len(draft) and token != draft[row]:
            return


class PromptLookup:
    """Continues the most recent earlier occurrence of the longest suffix of 4, 3 or 2 tokens (prompt lookup decoding).

    Copies beyond the end go on with what was copied, so a period is continued too. A lookup is a few dictionary reads;
    the index takes about 350 bytes a token, which is little beside KV cells (22 KiB a token for a model of 135M).
    `extend` of 100,000 tokens takes some tens of milliseconds and belongs on the preparing thread; it works in slices,
    so that no other thread waits longer than for one.
    """

    ORDERS = (4, 3, 2)
    SLICE = 4096
    light = True

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens = array("i")
        self._next: dict[int, dict[int, int]] = {order: {} for order in self.ORDERS}  # n-gram → position after it
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the sequence and index them."""
        for begin in range(0, len(tokens), self.SLICE):
            self._append(tokens[begin : begin + self.SLICE])

    def _append(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that now have a successor: those ending at the old last token … the new last but one."""
        first = len(self._tokens)
        self._tokens.extend(tokens)
        for order, following in self._next.items():
            successors = range(max(first, order), len(self._tokens))
            if successors:
                keys = _ngram_keys(self._tokens[successors.start - order : -1], order)
                following.update(zip(keys, successors, strict=True))

    def ready(self) -> bool:
        return self._source() is not None

    def draft(self, most: int) -> list[int]:
        """`most` tokens that followed the suffix last time, or none where it is new."""
        source = self._source()
        if source is None:
            return []
        period = self._tokens[source : source + most].tolist()
        return [period[index % len(period)] for index in range(most)]

    def _source(self) -> int | None:
        """The position behind the last occurrence of the longest suffix that occurred before."""
        tokens = self._tokens
        for order, following in self._next.items():
            if len(tokens) > order:
                [key] = _ngram_keys(tokens[-order:], order)
                source = following.get(key)
                if source is not None and tokens[source - order : source] == tokens[-order:]:
                    return source
        return None

    def close(self) -> None:
        """Forget the sequence."""
        self._tokens = array("i")
        self._next.clear()


_FACTOR, _BELOW = 0x9E3779B97F4A7C15, 2**60  # ints below 2**60 take 32 bytes
_FEW = 16


def _ngram_keys(tokens: array[int], order: int) -> list[int]:
    """A hash of every run of `order` tokens: a polynomial in `_FACTOR` modulo `_BELOW`."""
    count = len(tokens) - order + 1
    if count > _FEW:
        values = np.frombuffer(tokens, np.intc).astype(np.uint64)
        keys = np.zeros(count, np.uint64)
        for offset in range(order):
            keys = keys * np.uint64(_FACTOR) + values[offset : offset + count]
        found: list[int] = (keys & np.uint64(_BELOW - 1)).tolist()
        return found
    # Of one or a few new tokens, where numpy's calls would take most of the time.
    found = []
    for begin in range(count):
        key = 0
        for token in tokens[begin : begin + order]:
            key = (key * _FACTOR + token) % _BELOW
        found.append(key)
    return found


def draft_length(
    accept: Sequence[float],
    seconds: Callable[[int], float],
    *,
    rows_others: int = 0,
    tokens_others: float = 0.0,
    draft_seconds: float = 0.0,
    margin: float = MARGIN,
) -> int:
    """How many tokens to draft: the length with most tokens per second of the step, 0 unless it beats none by `margin`.

    `accept[i]` is the probability that drafts 0 … i are all accepted; `seconds(rows)` is what a step of that many rows
    takes; the batch has `rows_others` rows of other sequences, which yield `tokens_others` tokens; one drafted token
    takes `draft_seconds`. The objective is the engine's: own tokens and others' count alike, so the time that a draft
    adds is paid once for every sequence that waits for the step. Of equal lengths the shortest is taken.
    """

    def rate(length: int) -> float:
        tokens = tokens_others + 1 + sum(accept[:length])
        return tokens / (seconds(rows_others + 1 + length) + length * draft_seconds)

    best = max(range(1, len(accept) + 1), key=rate, default=0)
    return best if best and rate(best) > (1 + margin) * rate(0) else 0


class Acceptance:
    """The probability of each draft position to be accepted if those before it were, as an average of recent trials."""

    _PRIOR, _PRIOR_TRIALS = 0.5, 1.0
    _KEEP = 0.95  # weight of the past at each trial: 20 trials are remembered

    def __init__(self, positions: int) -> None:
        self._hits = [0.0] * positions
        self._trials = [0.0] * positions

    def observe(self, position: int, accepted: bool) -> None:
        """Count one trial; positions behind a rejected one had none."""
        self._hits[position] = self._hits[position] * self._KEEP + accepted
        self._trials[position] = self._trials[position] * self._KEEP + 1

    def cumulative(self, positions: int) -> list[float]:
        """For the first positions, the probability that they and all before them are accepted.

        What is expected of a position without trials is what was measured of the one before it.
        """
        conditional = []
        expected = self._PRIOR
        for hits, trials in zip(self._hits[:positions], self._trials[:positions], strict=True):
            expected = (hits + self._PRIOR_TRIALS * expected) / (trials + self._PRIOR_TRIALS)
            conditional.append(expected)
        return list(accumulate(conditional, mul))


class Speculator:
    """Decides for one sequence when to draft and how much. Each step: `propose`, then `accept` what was generated.

    It keeps two accounts in seconds of the engine, against `needed`, what the sequence's tokens would have taken
    without drafts. `earned` is what accepted drafts saved less what drafting and verifying them took: while it is below
    -`LOSS` / 2 × `needed` nothing is verified. `looked` is what shadow drafts took: at most `LOSS` / 2 × `needed` and
    one more. A draft model's first reading of the prompt is on neither: whoever configures one asks for it.
    """

    def __init__(self, drafter: Drafter, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`drafter` has been given the prompt. `clock` is in seconds."""
        self._drafter = drafter
        self._clock = clock
        self._acceptance = Acceptance(MOST_DRAFTED)
        self._draft_seconds: deque[float] = deque(maxlen=9)  # per token, of the last drafts
        self._draft: list[int] = []  # being verified in this step
        self._shadow: list[int] = []  # what is left of a shadow draft to compare with
        self._token_seconds = 0.0  # engine time per token in this step without the draft
        self._verify_seconds = 0.0  # what the draft's rows add to this step
        self.expected = 0.0  # tokens of this step's draft that will probably be accepted
        self.earned = self.looked = self.needed = 0.0
        self.drafted = 0  # tokens verified
        self.accepted = 0  # of these, accepted

    def propose(
        self, seconds: Callable[[int], float], *, rows_others: int = 0, tokens_others: float = 0.0, most: int
    ) -> list[int]:
        """The draft to verify in this step, at most `most` tokens; empty where none pays.

        The other arguments are those of `draft_length`.
        """
        plain = seconds(rows_others + 1)
        self._token_seconds = plain / (tokens_others + 1)
        self._draft = []
        length = 0
        self._verify_seconds = 0.0
        if not self._drafter.ready():
            return []
        accept = self._acceptance.cumulative(min(most, MOST_DRAFTED))
        if self.earned >= -LOSS / 2 * self.needed:
            length = draft_length(
                accept,
                seconds,
                rows_others=rows_others,
                tokens_others=tokens_others,
                draft_seconds=median(self._draft_seconds) if self._draft_seconds else 0.0,
            )
        if length:
            self._shadow = []
            self._draft, taken = self._ask(length)
            self.earned -= taken
        elif not self._shadow and self.looked <= LOSS / 2 * self.needed:
            self._shadow, taken = self._ask(MOST_DRAFTED)
            self.looked += taken
        if self._draft:
            self._verify_seconds = seconds(rows_others + 1 + len(self._draft)) - plain
            self.expected = sum(accept[: len(self._draft)])
        return self._draft

    def withdraw(self) -> None:
        """The draft that was proposed is not verified."""
        self._draft, self._verify_seconds = [], 0.0

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the tokens that the step added to the sequence, also those of steps without a draft."""
        accepted = self._compare(self._draft, tokens)
        hits = self._compare(self._shadow, tokens, skipped=MOST_DRAFTED - len(self._shadow))
        self._shadow = self._shadow[hits:] if hits == len(tokens) else []
        self.drafted += len(self._draft)
        self.accepted += accepted
        self.earned += accepted * self._token_seconds - self._verify_seconds
        self.needed += len(tokens) * self._token_seconds
        self.withdraw()
        self._drafter.extend(tokens)

    @property
    def light(self) -> bool:
        """Whether it may be asked beside a decode."""
        return self._drafter.light

    def close(self) -> None:
        """Close the drafter."""
        self._drafter.close()

    def _ask(self, length: int) -> tuple[list[int], float]:
        """A draft, and the seconds to charge for it."""
        begun = self._clock()
        draft = self._drafter.draft(length)
        taken = self._clock() - begun
        if draft:
            self._draft_seconds.append(taken / length)
        return draft, taken if self._draft_seconds else 0.0

    def _compare(self, draft: Sequence[int], tokens: Sequence[int], *, skipped: int = 0) -> int:
        """How many of `tokens` the draft foretold. `draft` is a whole one without its first `skipped` tokens."""
        for position, (guess, token) in enumerate(zip(draft, tokens, strict=False)):
            self._acceptance.observe(skipped + position, guess == token)
            if guess != token:
                return position
        return min(len(draft), len(tokens))
