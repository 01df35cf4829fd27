"""Speculation: drafts never change what is generated, are taken where they pay, and cost next to nothing elsewhere."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocserve.engine import llama
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.sampler import SamplerChain
from ocserve.engine.speculation import (
    LOSS,
    MOST_DRAFTED,
    PromptLookup,
    Speculator,
    draft_length,
    verified,
)
from ocserve.generation import Sampling
from tests import tiny

# --- prompt lookup


def looked_up(tokens: list[int], most: int) -> list[int]:
    """The reference: search backwards for each order in turn, copy token by token."""
    for order in PromptLookup.ORDERS:
        suffix = tokens[-order:]
        for source in range(len(tokens) - 1, order - 1, -1):
            if len(suffix) == order and tokens[source - order : source] == suffix:
                copied = list(tokens)
                for index in range(most):
                    copied.append(copied[source + index])
                return copied[len(tokens) :]
    return []


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=12), st.integers(1, 9))
def test_a_lookup_equals_a_search_however_the_tokens_arrived(pieces: list[list[int]], most: int) -> None:
    lookup, tokens = PromptLookup(), list[int]()
    for piece in pieces:
        lookup.extend(piece)
        tokens += piece
        assert lookup.draft(most) == looked_up(tokens, most)


def test_slices_of_a_long_prompt_join_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "SLICE", 50)  # so that both ways of hashing take part
    source = random.Random(1)
    tokens = [source.randrange(4) for _ in range(200)]
    for length in range(0, len(tokens), 3):
        assert PromptLookup(tokens[:length]).draft(5) == looked_up(tokens[:length], 5)


def test_a_closed_lookup_drafts_nothing() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2])
    assert lookup.draft(2) == [3, 1]
    lookup.close()
    assert lookup.draft(2) == []


def test_a_long_prompt_costs_little_per_token() -> None:
    source = random.Random(2)
    tokens = tuple(source.randrange(49_152) for _ in range(100_000))
    begun = time.process_time()
    lookup = PromptLookup(tokens)
    assert time.process_time() - begun < 1.0  # some 0.05 s on a quiet machine; quadratic work would take minutes
    begun = time.process_time()
    for token in range(1000):
        lookup.extend([token])
        lookup.draft(MOST_DRAFTED)
    assert time.process_time() - begun < 1.0  # some 30 µs each


# --- the decision


_CPU = np.interp(range(33), [1, 2, 4, 8, 16, 32], [0.007, 0.013, 0.025, 0.045, 0.085, 0.165]).tolist()


def cpu(rows: int) -> float:
    """Two cores and a small model: a row costs almost a step of its own."""
    return float(_CPU[rows])


def gpu(rows: int) -> float:
    """Batches of up to 16 rows are free."""
    return 0.010 * max(1, rows / 16)


def geometric(probability: float) -> list[float]:
    return [probability ** (position + 1) for position in range(MOST_DRAFTED)]


def test_on_a_cpu_only_near_certain_drafts_pay_and_on_a_gpu_nearly_all() -> None:
    assert draft_length(geometric(0.5), cpu) == draft_length(geometric(0.9), cpu) == 0
    assert draft_length(geometric(0.99), cpu) == MOST_DRAFTED
    assert draft_length(geometric(0.5), gpu) == MOST_DRAFTED
    assert draft_length(geometric(0.0), gpu) == 0
    assert draft_length([], gpu) == 0


def test_the_cost_of_drafting_counts() -> None:
    assert draft_length(geometric(0.8), gpu, draft_seconds=0.001) in range(1, MOST_DRAFTED)
    assert draft_length(geometric(0.8), gpu, draft_seconds=0.010) == 0


def test_time_that_a_draft_takes_from_other_sequences_counts() -> None:
    """On this machine rows beyond 16 are dear: with 12 others a draft is short, with 16 there is none."""
    alone, some, full = (
        draft_length(geometric(0.8), lambda rows: 0.01 * max(1.0, (rows - 15) * 1.0), rows_others=n, tokens_others=n)
        for n in (0, 12, 16)
    )
    assert (alone, some, full) == (MOST_DRAFTED, 3, 0)


@given(
    st.lists(st.floats(0, 1), max_size=8).map(lambda found: sorted(found, reverse=True)),
    st.lists(st.floats(1e-4, 1), min_size=30, max_size=30).map(sorted),
    st.integers(0, 20),
)
def test_the_length_is_the_best_or_none(accept: list[float], table: list[float], others: int) -> None:
    def rate(length: int) -> float:
        return (others + 1 + sum(accept[:length])) / table[others + 1 + length]

    chosen = draft_length(accept, lambda rows: table[rows], rows_others=others, tokens_others=others, margin=0.1)
    best = max(rate(length) for length in range(len(accept) + 1))
    assert rate(chosen) == pytest.approx(best) if chosen else best <= rate(0) * (1.1 + 1e-9)


# --- never slower: simulated sequences


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Oracle:
    """Drafts the truth (token i is i) wrongly with a probability that depends on the position in the text."""

    def __init__(self, clock: Clock, accept: Callable[[int], float], *, price: float, seed: int) -> None:
        self._clock, self._accept, self._price = clock, accept, price
        self._random = random.Random(seed)
        self.length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.length += len(tokens)

    def ready(self) -> bool:
        return True

    def draft(self, most: int) -> list[int]:
        self._clock.now += self._price * most
        truth = range(self.length, self.length + most)
        return [token if self._random.random() < self._accept(token) else -1 for token in truth]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    ratio: float  # time with speculation / time without
    excess: float  # what that is in seconds
    drafted: int
    late_drafted: int  # of these, in the second half
    looked: float  # seconds of shadow drafts


def simulate(
    seconds: Callable[[int], float],
    accept: Callable[[int], float],
    *,
    price: float = 2e-6,
    tokens: int = 2000,
    others: int = 0,
    seed: int = 1,
) -> Outcome:
    clock = Clock()
    oracle = Oracle(clock, accept, price=price, seed=seed)
    speculator = Speculator(oracle, clock=clock)
    plain = early = 0.0
    while oracle.length < tokens:
        if oracle.length < tokens / 2:
            early = speculator.drafted
        draft = speculator.propose(seconds, rows_others=others, tokens_others=others, most=tokens - oracle.length)
        clock.now += seconds(others + 1 + len(draft))
        made = list(verified(draft, lambda row: oracle.length + row))
        plain += seconds(others + 1) / (others + 1) * (len(made) + others)
        speculator.accept(made)
    drafted = speculator.drafted
    return Outcome(clock.now / plain, clock.now - plain, drafted, drafted - int(early), speculator.looked)


def always(share: float) -> Callable[[int], float]:
    return lambda token: share


TRACES: dict[str, Callable[[int], float]] = {
    **{f"always {share}": always(share) for share in (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99)},
    "good, then bad": lambda token: 0.99 if token < 1000 else 0.0,
    "bad, then good": lambda token: 0.0 if token < 1000 else 0.99,
    "copied passages": lambda token: 0.995 if token % 400 < 250 else 0.1,
    "short copies": lambda token: 1.0 if token % 40 < 20 else 0.0,
}


@pytest.mark.parametrize("price", [2e-6, 1e-3], ids=["lookup", "draft model"])
@pytest.mark.parametrize("machine", [cpu, gpu])
@pytest.mark.parametrize("trace", TRACES)
def test_it_is_never_slower_than_its_bound(
    trace: str, machine: Callable[[int], float], price: float, full: bool
) -> None:
    for others in (0, 3):
        for seed in range(40 if full else 1):
            outcome = simulate(machine, TRACES[trace], price=price, others=others, seed=seed)
            one_more = machine(others + 1 + MOST_DRAFTED) - machine(others + 1) + 2 * MOST_DRAFTED * price
            bound = LOSS * 2000 * machine(others + 1) / (others + 1) + one_more
            assert outcome.excess <= bound * (1 + 1e-9)


def test_on_a_cpu_it_wins_where_text_is_copied_and_stays_off_elsewhere() -> None:
    assert simulate(cpu, always(0.99)).ratio < 0.9
    assert simulate(cpu, TRACES["copied passages"]).ratio < 1.0
    for share in (0.0, 0.3, 0.6):
        outcome = simulate(cpu, always(share))
        assert outcome.drafted == 0
        assert outcome.ratio < 1.005


def test_on_a_gpu_it_wins_wherever_drafts_are_ever_right() -> None:
    for share, most in ((0.3, 0.75), (0.6, 0.45), (0.95, 0.2)):
        assert simulate(gpu, always(share)).ratio < most
    assert simulate(gpu, always(0.0)).ratio < 1 + LOSS


def test_it_goes_on_and_off_as_acceptance_changes() -> None:
    lost, found = simulate(cpu, TRACES["good, then bad"]), simulate(cpu, TRACES["bad, then good"])
    assert lost.drafted > 500 and lost.late_drafted <= 2 * MOST_DRAFTED  # noqa: PT018
    assert found.late_drafted == found.drafted > 500


def test_a_dear_draft_model_that_is_never_right_is_asked_rarely() -> None:
    outcome = simulate(gpu, always(0.0), price=2e-3)
    assert outcome.looked <= LOSS / 2 * 2000 * gpu(1) + MOST_DRAFTED * 2e-3


def test_reading_the_prompt_is_on_no_account() -> None:
    """The calls before the first draft; otherwise a long prompt would forbid drafting for minutes."""
    clock = Clock()

    class SlowStart(Oracle):
        calls = 0

        def draft(self, most: int) -> list[int]:
            self.calls += 1
            if self.calls <= 3:
                clock.now += 5.0
                return []
            return super().draft(most)

    oracle = SlowStart(clock, always(0.99), price=1e-4, seed=1)
    speculator = Speculator(oracle, clock=clock)
    for _ in range(50):
        draft = speculator.propose(gpu, most=100)
        speculator.accept(list(verified(draft, lambda row: oracle.length + row)))
    assert speculator.accepted > 200


# --- verification: the text is the model's


def test_verification_stops_at_the_first_difference_and_draws_no_more() -> None:
    rows: list[int] = []

    def sample(row: int) -> int:
        rows.append(row)
        return [7, 8, 5, 6][row]

    assert list(verified([7, 8, 9], sample)) == [7, 8, 5]
    assert list(verified([7, 8, 5], sample)) == [7, 8, 5, 6]
    rows.clear()
    stream = verified([7, 8, 5], sample)
    assert (next(stream), rows) == (7, [0])  # an ended sequence takes no more


@pytest.fixture(scope="module", params=["attention", "sliding"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    log = llama.LoadLog()
    path = tiny.write(tmp_path_factory.mktemp("speculation") / "tiny.gguf", request.param)
    loaded = llama.Model(str(path), gpu_layers=0, log=log)
    log.close()
    return loaded


@pytest.fixture
def context(model: llama.Model) -> Iterator[Context]:
    made = Context(model, pool_tokens=512, sequences=2, batch_tokens=64, threads=1, outputs=16, **tiny.EXACT)
    yield made
    made.close()


Guess = Callable[[list[int]], list[int]]  # the tokens so far → a draft
Verify = Callable[[Sequence[int], Callable[[int], int]], Iterator[int]]
PROMPT = tuple(range(10, 40))


def generate(context: Context, chain: SamplerChain, length: int, guess: Guess, verify: Verify = verified) -> list[int]:
    """`length` tokens after PROMPT as the loop makes them: newest token and draft in one batch, rest rolled back."""
    context.truncate(0, len(PROMPT) - 1)
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + length:
        draft = guess(tokens)
        begin = len(tokens) - 1
        if not context.occupied(0):
            assert context.decode([Row(t, p, 0, False) for p, t in enumerate(PROMPT[:-1])]) is DecodeStatus.OK
        rows = [Row(token, begin + row, 0, True) for row, token in enumerate([tokens[-1], *draft])]
        assert context.decode(rows) is DecodeStatus.OK
        tokens += verify(draft, lambda row: chain.sample(context, row))
        assert context.truncate(0, len(tokens) - 1)
    return tokens[len(PROMPT) :][:length]


def no_draft(tokens: list[int]) -> list[int]:
    return []


def half_right(truth: list[int]) -> Guess:
    """Drafts from a former run's text, every third token wrong."""

    def guess(tokens: list[int]) -> list[int]:
        done = len(tokens) - len(PROMPT)
        return [(t + (done + i) % 3 // 2) % 200 for i, t in enumerate(truth[done : done + 5])]

    return guess


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0),
        Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5),
    ],
    ids=["greedy", "sampled", "penalties"],
)
def test_text_with_drafts_is_the_text_without_for_the_same_random_stream(
    model: llama.Model, context: Context, sampling: Sampling
) -> None:
    """Over more tokens than the sliding window holds, so that rolling back in it is proven too."""

    def chain() -> SamplerChain:
        return SamplerChain(model.vocab, sampling, seed=5, window=64, prompt=PROMPT)

    plain = generate(context, chain(), 150, no_draft)
    drafts = Counter[int]()

    def counted(tokens: list[int]) -> list[int]:
        draft = half_right(plain)(tokens)
        drafts[len(draft)] += 1
        return draft

    assert generate(context, chain(), 150, counted) == plain
    assert drafts[5] > 30


def unverified(draft: Sequence[int], sample: Callable[[int], int]) -> Iterator[int]:
    """What must not be done: a draft is taken as it is."""
    yield from draft
    yield sample(len(draft))


def test_the_distribution_of_sampled_text_is_the_same_with_drafts(
    context: Context, model: llama.Model, full: bool
) -> None:
    """Two samples of three-token texts, compared by chi-square; drafts taken unverified are seen by the same test."""
    runs = 6000 if full else 800

    def sampled(first_seed: int, guess: Guess, verify: Verify = verified) -> Counter[tuple[int, ...]]:
        found = Counter[tuple[int, ...]]()
        for seed in range(first_seed, first_seed + runs):
            chain = SamplerChain(model.vocab, Sampling(temperature=4.0, top_k=3), seed=seed, window=64, prompt=PROMPT)
            found[tuple(generate(context, chain, 3, guess, verify))] += 1
            chain.close()
        return found

    plain = sampled(0, no_draft)
    [(likely, count)] = plain.most_common(1)
    assert count < runs / 2

    def guess(tokens: list[int]) -> list[int]:
        """The likeliest text's token at this place, whatever came before it."""
        return list(likely[len(tokens) - len(PROMPT) :][:1])

    assert _differ(plain, sampled(runs, guess)) < 5
    assert _differ(plain, sampled(runs, guess, unverified)) > 5


def _differ(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
    """The two-sample chi-square in standard deviations from what equal distributions give (Wilson-Hilferty)."""
    total_first, total_second = first.total(), second.total()
    statistic, classes = 0.0, 0
    for text in first.keys() | second.keys():
        a, b = first[text], second[text]
        statistic += (a * (total_second / total_first) ** 0.5 - b * (total_first / total_second) ** 0.5) ** 2 / (a + b)
        classes += 1
    freedom = classes - 1
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)
