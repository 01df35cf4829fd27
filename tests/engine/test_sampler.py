"""The sampler chain: what each parameter does to a distribution that the test writes, and what neutral ones do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ocserve.engine import llama
from ocserve.engine.context import Context, Row
from ocserve.engine.sampler import BestToken, DrySamplers, SamplerChain, sampler_of
from ocserve.errors import InvalidRequest
from ocserve.generation import Sampling
from tests import tiny
from tests.engine.schedules import load

Draw = Callable[..., set[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    return load(tiny.write(tmp_path_factory.mktemp("model") / "m.gguf"))


@pytest.fixture(scope="module")
def context(model: llama.Model) -> Context:
    made = Context(model, pool_tokens=64, sequences=1, batch_tokens=8, threads=1)
    made.decode([Row(40, 0, 0, True)])
    return made


def chain(model: llama.Model, sampling: Sampling, *, seed: int = 1, prompt: tuple[int, ...] = ()) -> SamplerChain:
    dry = DrySamplers(model.vocab, 512).get(sampling)
    return SamplerChain(model.vocab, sampling, seed=seed, window=512, prompt=prompt, dry=dry)


@pytest.fixture
def draw(model: llama.Model, context: Context) -> Draw:
    """What is drawn, with many seeds, where these tokens have these probabilities and all others none."""

    def drawn(probabilities: dict[int, float], draws: int = 300, prompt: tuple[int, ...] = (), **rest: Any) -> set[int]:
        logits = context.logits(0)
        found = set()
        for seed in range(draws):
            logits.fill(-np.inf)
            for token, probability in probabilities.items():
                logits[token] = np.log(probability)
            sampler = chain(model, Sampling(**rest), seed=seed, prompt=prompt)
            found.add(sampler.sample(context, 0))
            sampler.close()
        return found

    return drawn


def test_the_best_token_is_what_llama_cpp_finds(model: llama.Model, context: Context) -> None:
    """Ties, tokens that a mask rules out and biases among them; the distribution is left as it was."""
    noise = np.random.default_rng(7)
    for _ in range(200):
        logits = context.logits(0)
        logits[:] = noise.integers(-40, 40, model.vocab.size) / 4
        logits[noise.integers(1, model.vocab.size, 20)] = -np.inf
        logits[noise.integers(1, model.vocab.size, 2)] = np.nan
        before = logits.copy()
        tokens = noise.choice(model.vocab.size, noise.integers(0, 6), replace=False)
        sampling = Sampling(temperature=0.0, logit_bias={int(token): float(noise.integers(-9, 9)) for token in tokens})
        best = sampler_of(model.vocab, sampling, seed=1, window=64, prompt=(40, 41))
        assert isinstance(best, BestToken)
        reference = chain(model, sampling)
        assert best.sample(context, 0) == reference.sample(context, 0)
        reference.close()
        assert np.array_equal(context.logits(0), before, equal_nan=True)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.5},
        {"dynamic_range": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"xtc_probability": 0.5},
        {"typical_p": 0.9},
        {"dry_multiplier": 1.0},
    ],
    ids=str,
)
def test_who_asks_for_more_than_the_best_token_gets_the_chain(model: llama.Model, asked: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 0.0, **asked})  # type: ignore[arg-type]
    dry = DrySamplers(model.vocab, 512).get(sampling)
    made = sampler_of(model.vocab, sampling, seed=1, window=64, prompt=(40,), dry=dry)
    assert isinstance(made, SamplerChain)
    made.close()


FIVE = {10: 0.4, 11: 0.3, 12: 0.15, 13: 0.1, 14: 0.05}


def test_neutral_values_add_nothing(model: llama.Model) -> None:
    assert chain(model, Sampling()).names == ["dist"]
    assert chain(model, Sampling(temperature=0.0, top_k=40, top_p=0.9, min_p=0.1, top_a=0.2)).names == ["greedy"]
    usual = Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, presence_penalty=0.5)
    assert chain(model, usual).names == ["penalties", "penalties", "top-k", "top-p", "min-p", "temp", "dist"]


def test_the_order_is_that_of_llama_cpps_server(model: llama.Model) -> None:
    everything = Sampling(
        temperature=0.8,
        logit_bias={5: 1.0},
        repetition_penalty=1.1,
        dry_multiplier=0.8,
        top_n_sigma=2.0,
        top_k=50,
        typical_p=0.9,
        top_p=0.9,
        min_p=0.01,
        top_a=0.1,
        xtc_probability=0.5,
        dynamic_range=0.5,
    )
    named = "logit-bias penalties dry top-n-sigma top-k min-p typical top-p min-p top-a xtc temp-ext dist"
    assert " ".join(chain(model, everything).names) == named
    assert chain(model, Sampling(temperature=0.8, mirostat=2, top_k=5, dry_multiplier=0.8)).names == [
        "dry",
        "min-p",
        "temp",
        "mirostat-v2",
    ]


def test_top_a_keeps_what_is_near_the_best_probability_squared(draw: Draw) -> None:
    assert draw(FIVE) == set(FIVE)
    assert draw(FIVE, top_a=0.7) == {10, 11, 12}  # 0.7 * 0.4² = 0.112
    assert draw(FIVE, top_a=1.0) == {10, 11}  # 0.16
    assert draw(FIVE, top_a=3.0) == {10}
    assert draw(FIVE, top_a=1.4) == {10, 11}  # 0.224
    assert draw(FIVE, top_a=1.4, top_k=2) == {10}  # 1.4 * (4/7)² = 0.457, of what top-k left


def test_top_n_sigma_keeps_what_is_near_the_best_logit(draw: Draw) -> None:
    logits = np.log(list(FIVE.values()))
    for n in (0.5, 1.0, 2.0):
        kept = {token for token, logit in zip(FIVE, logits, strict=True) if logit >= logits.max() - n * logits.std()}
        assert draw(FIVE, top_n_sigma=n) == kept


def test_typical_sampling_can_drop_the_best(draw: Draw) -> None:
    """Of a peak and a plateau the plateau is typical."""
    peak = {9: 0.4, **dict.fromkeys(range(20, 32), 0.05)}
    assert 9 in draw(peak)
    assert 9 not in draw(peak, typical_p=0.3)
    assert 9 not in draw(peak, typical_p=0.3, temperature=0.0)


def test_xtc_drops_the_best_but_one(draw: Draw) -> None:
    assert draw(FIVE, xtc_probability=1.0, xtc_threshold=0.14) == {12, 13, 14}
    assert draw(FIVE, xtc_probability=1.0, xtc_threshold=0.14, temperature=0.0) == {12}
    assert draw(FIVE, xtc_probability=0.0, xtc_threshold=0.14) == set(FIVE)


def test_dynamic_temperature_follows_the_entropy(draw: Draw) -> None:
    assert draw(FIVE, temperature=1.0, dynamic_range=1.0, dynamic_exponent=1000.0) == {10}
    assert draw(FIVE, temperature=1.0, dynamic_range=1.0, dynamic_exponent=0.01) == set(FIVE)
    assert draw(FIVE, temperature=0.0, dynamic_range=2.0) > {10}


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_aims_at_a_surprise(draw: Draw, version: int) -> None:
    assert draw(FIVE, mirostat=version, mirostat_tau=0.2) == {10}
    assert draw(FIVE, mirostat=version, mirostat_tau=9.0) == set(FIVE)
    assert draw(FIVE, mirostat=version, mirostat_tau=9.0, temperature=0.0) == {10}


def test_mirostat_learns_from_what_it_drew(model: llama.Model, context: Context) -> None:
    """A draw more surprising than its aim lowers what it allows next: the surprising one is then ruled out."""
    certain = {10: 0.97, 11: 0.03}  # surprises of 0.04 and 5.06 bits; 2 * tau is allowed at first
    for eta, again in ((0.0, True), (1.0, False)):
        pairs = set()
        for seed in range(2000):
            sampler = chain(model, Sampling(mirostat=2, mirostat_tau=2.7, mirostat_eta=eta), seed=seed)
            drawn = []
            for _ in range(2):
                logits = context.logits(0)
                logits.fill(-np.inf)
                for token, probability in certain.items():
                    logits[token] = np.log(probability)
                drawn.append(sampler.sample(context, 0))
            sampler.close()
            pairs.add(tuple(drawn))
        assert (11, 10) in pairs
        assert ((11, 11) in pairs) is again


ABCDABC = (50, 51, 52, 53, 50, 51, 52)


def test_dry_breaks_a_repetition_in_the_prompt(draw: Draw) -> None:
    likely = {53: 0.9, 60: 0.1}
    greedy: dict[str, Any] = {"temperature": 0.0, "draws": 1, "prompt": ABCDABC}
    assert draw(likely, **greedy) == {53}
    assert draw(likely, **greedy, dry_multiplier=5.0) == {60}
    assert draw(likely, **greedy, dry_multiplier=5.0, dry_allowed_length=4) == {53}
    assert draw(likely, **greedy, dry_multiplier=5.0, dry_window=3) == {53}
    assert draw(likely, **greedy, dry_multiplier=5.0, dry_breakers=(chr(52 - 3),)) == {53}
    assert draw(likely, **greedy, dry_multiplier=0.001, dry_base=1.0) == {53}


def test_penalties_look_back_as_far_as_they_are_told(draw: Draw) -> None:
    likely = {50: 0.5, 60: 0.4}
    greedy: dict[str, Any] = {"temperature": 0.0, "draws": 1, "prompt": (50, 70, 71, 72)}
    assert draw(likely, **greedy, repetition_penalty=2.0) == {60}
    assert draw(likely, **greedy, repetition_penalty=2.0, penalty_window=4) == {60}
    assert draw(likely, **greedy, repetition_penalty=2.0, penalty_window=3) == {50}
    assert draw(likely, **greedy, repetition_penalty=2.0, penalty_window=0) == {50}


def test_a_tiny_temperature_is_not_zero(draw: Draw) -> None:
    near = {10: 0.50002, 11: 0.49998}  # logits that are 8e-5 apart
    assert draw(near, temperature=1e-4) == {10, 11}
    assert draw(near, temperature=0.0) == {10}
    assert draw(near, temperature=1e-39) == {10}
    assert draw({10: 0.5, 11: 0.5}, temperature=5e-324) == {10, 11}


@pytest.mark.parametrize(
    ("breakers", "param"),
    [
        (("a",) * 17, "dry_sequence_breakers"),
        (("x" * 40,) * 4, "dry_sequence_breakers"),
        (("ok", ""), "dry_sequence_breakers[1]"),
        (("a\0b",), "dry_sequence_breakers[0]"),
        (("x" * 41,), "dry_sequence_breakers[0]"),
    ],
)
def test_breakers_that_llama_cpp_would_cut_or_skip_are_refused(
    model: llama.Model, breakers: tuple[str, ...], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        DrySamplers(model.vocab, 512).get(Sampling(dry_multiplier=1.0, dry_breakers=breakers))
    assert refusal.value.param == param


def test_dry_is_made_once_for_the_same_parameters(model: llama.Model) -> None:
    samplers = DrySamplers(model.vocab, 512)
    first = samplers.get(Sampling(dry_multiplier=1.0))
    assert samplers.get(Sampling(dry_multiplier=1.0, temperature=0.3)) is first
    assert samplers.get(Sampling(dry_multiplier=2.0)) is not first
    assert samplers.get(Sampling()) is None
    for number in range(20):
        samplers.get(Sampling(dry_multiplier=3.0 + number))
    assert samplers.get(Sampling(dry_multiplier=1.0)) is not first


def test_the_seed_decides(model: llama.Model, context: Context) -> None:
    for sampling in (
        Sampling(),
        Sampling(xtc_probability=0.5),
        Sampling(mirostat=1, mirostat_tau=9.0),
        Sampling(mirostat=2),
    ):
        twice = []
        for _ in range(2):
            context.logits(0)[:] = -np.log(np.arange(1, model.vocab.size + 1))
            samplers = [chain(model, sampling, seed=seed) for seed in range(20)]
            twice.append([sampler.sample(context, 0) for sampler in samplers])
            for sampler in samplers:
                sampler.close()
        assert twice[0] == twice[1]
        assert len(set(twice[0])) > 5


def test_no_combination_draws_what_a_mask_rules_out(model: llama.Model, context: Context) -> None:
    """Where few tokens are possible, or one, some samplers divide by what is 0."""
    choose = random.Random(5)
    for _ in range(400):
        sampling = Sampling(
            temperature=choose.choice([0.0, 1e-6, 0.7, 1.0, 2.0]),
            top_k=choose.choice([0, 0, 1, 5]),
            top_p=choose.choice([1.0, 0.0, 0.5]),
            min_p=choose.choice([0.0, 0.1, 1.0]),
            typical_p=choose.choice([1.0, 0.0, 0.5]),
            top_n_sigma=choose.choice([0.0, 0.1, 1.0]),
            top_a=choose.choice([0.0, 0.3, 1.0]),
            xtc_probability=choose.choice([0.0, 1.0]),
            xtc_threshold=choose.choice([0.0, 0.1, 0.5]),
            mirostat=choose.choice([0, 0, 1, 2]),
            mirostat_tau=choose.choice([0.0, 5.0]),
            dynamic_range=choose.choice([0.0, 0.0, 1.0]),
            repetition_penalty=choose.choice([1.0, 2.0]),
            dry_multiplier=choose.choice([0.0, 1.0]),
        )
        possible = choose.sample(range(model.vocab.size), choose.choice([1, 2, 50]))
        sampler = chain(model, sampling, seed=choose.randrange(1 << 32), prompt=ABCDABC)
        for _ in range(3):
            logits = context.logits(0)
            logits.fill(-np.inf)
            logits[possible] = [choose.choice([0.0, 3.0, -200.0]) for _ in possible]
            assert sampler.sample(context, 0) in possible, sampling
        sampler.close()
