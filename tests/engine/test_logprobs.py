"""Log-probabilities: the true ones of the unmodified distribution, for every token that becomes visible."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ocserve.engine import llama, scheduler
from ocserve.engine.constraint import GrammarCompiler
from ocserve.engine.logprobs import RowLogprobs
from ocserve.engine.slots import Sequence
from ocserve.generation import Finished, JsonConstraint, PromptLogprobs, Sampling, TextDelta, TokenLogprob
from tests import tiny
from tests.engine.schedules import NO_END, Engine, FixedCosts, Oracle, load

PROMPT = [3 + (10 + 7 * index) % 250 for index in range(40)]
FREE_ROWS = FixedCosts(step_s=0.01, row_s=0.00001)
CLOSE = 1e-3  # another order of additions moves logits of these models by less


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    return load(tiny.write(tmp_path_factory.mktemp("model") / "m.gguf"))


def true_logprobs(model: llama.Model, sequence: Sequence) -> np.ndarray:
    """Log-softmax in double precision of what a context of its own says before each generated token."""
    tokens = [*sequence.prompt, *sequence.generated]
    logits = Oracle(model).logits(tokens, len(sequence.prompt) - 1, 32).astype(np.float64)[:-1]
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def check(logprobs: list[TokenLogprob], sequence: Sequence, truth: np.ndarray, best: int) -> None:
    for logprob, token, row in zip(logprobs, sequence.generated, truth, strict=False):
        assert logprob.chosen.id == token
        assert logprob.chosen.logprob == pytest.approx(row[token], abs=CLOSE)
        assert len(logprob.top) == best
        values = [chance.logprob for chance in logprob.top]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:best], atol=CLOSE)
        assert all(row[chance.id] == pytest.approx(chance.logprob, abs=CLOSE) for chance in logprob.top)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, logit_bias=NO_END),
        Sampling(temperature=0.5, seed=4, logit_bias={**NO_END, 50: 9.0}, repetition_penalty=1.3, top_k=20, min_p=0.05),
    ],
)
def test_they_are_those_of_the_unmodified_distribution(model: llama.Model, sampling: Sampling) -> None:
    engine = Engine(Path(), model=model)
    sequence = engine.submit("one", PROMPT, 60, sampling=sampling, logprobs=5)
    engine.run()
    logprobs = engine.logprobs("one")
    assert len(logprobs) == 60
    check(logprobs, sequence, true_logprobs(model, sequence), 5)
    pieces = b"".join(logprob.chosen.piece for logprob in logprobs)
    assert pieces.decode(errors="replace") == engine.text("one")


def test_tokens_that_are_held_back_travel_with_their_text(model: llama.Model) -> None:
    """Random bytes are mostly not UTF-8: a delta has as many log-probabilities as tokens."""
    engine = Engine(Path(), model=model)
    engine.submit("one", PROMPT, 200, sampling=Sampling(seed=1, logit_bias=NO_END), logprobs=0)
    engine.run()
    deltas = [event for event in engine.events["one"] if isinstance(event, TextDelta)]
    assert any(delta.tokens > 1 for delta in deltas)
    assert all(len(delta.logprobs) == delta.tokens for delta in deltas)
    assert sum(delta.tokens for delta in deltas) == 200


def test_the_end_is_not_among_them(model: llama.Model) -> None:
    engine = Engine(Path(), model=model)
    sampling = Sampling(temperature=0.0, logit_bias={tiny.END_OF_TURN: 4.0})
    sequence = engine.submit("one", PROMPT, 400, sampling=sampling, logprobs=1)
    engine.run()
    assert sequence.generated[-1] == tiny.END_OF_TURN
    assert [logprob.chosen.id for logprob in engine.logprobs("one")] == sequence.generated[:-1]


def test_a_stop_string_has_none(model: llama.Model) -> None:
    letters = Sampling(temperature=1.0, seed=2, logit_bias=dict.fromkeys(range(100, 126), 100.0))
    engine = Engine(Path(), model=model)
    engine.submit("free", PROMPT, 40, sampling=letters)
    engine.run()
    text = engine.text("free")
    assert text.isalpha()
    engine.submit("stopped", PROMPT, 40, sampling=letters, stop=(text[10:14],), logprobs=0)
    engine.run()
    visible = b"".join(logprob.chosen.piece for logprob in engine.logprobs("stopped"))
    assert visible.decode() == engine.text("stopped") == text[:10]


SCHEMA = (
    '{"type":"object","properties":{"measured_temperature_celsius":{"type":"integer","minimum":0,"maximum":99}},'
    '"required":["measured_temperature_celsius"],"additionalProperties":false}'
)


@pytest.mark.parametrize("family", ["attention", "sliding", "recurrent"])
def test_forced_tokens_have_theirs_and_are_still_computed_together(tmp_path: Path, family: tiny.Family) -> None:
    model = load(tiny.write(tmp_path / "m.gguf", family))
    compiler = GrammarCompiler(model.vocab, lambda text: model.vocab.tokenize(text, parse_special=False))
    guide = compiler.guide(JsonConstraint(schema=SCHEMA))
    sampling = Sampling(temperature=1.0, seed=3)
    texts, steps = [], []
    for logprobs in (None, 3):
        engine = Engine(Path(), model=model, costs=FREE_ROWS)
        sequence = engine.submit("one", PROMPT, 100, sampling=sampling, guide=guide, logprobs=logprobs)
        engine.run()
        texts.append(engine.text("one"))
        stats = engine.loop.stats()
        steps.append(stats.steps)
        assert stats.forced_tokens > 20
        assert stats.drafted_tokens == 0
        assert sequence.usage.accepted_draft_tokens == 0
    assert texts[0] == texts[1]
    assert steps[1] < len(sequence.generated) / 2
    assert len(engine.logprobs("one")) == len(sequence.generated)
    check(engine.logprobs("one"), sequence, true_logprobs(model, sequence), 3)
    engine.kv.drop_kept()
    assert engine.kv.cells == 0


def test_a_stop_inside_a_forced_run_leaves_a_sound_prefix(tmp_path: Path) -> None:
    """Of a recurrent state what was computed beyond the stop cannot be taken back: nobody may continue it."""
    for family in tiny.FAMILIES:
        model = load(tiny.write(tmp_path / f"{family}.gguf", family))
        compiler = GrammarCompiler(
            model.vocab, lambda text, vocab=model.vocab: vocab.tokenize(text, parse_special=False)
        )
        guide = compiler.guide(JsonConstraint(schema=SCHEMA))
        engine = Engine(Path(), model=model, costs=FREE_ROWS)
        first = engine.submit("first", PROMPT, 100, guide=guide, logprobs=0, stop=("ature",))
        engine.run()
        assert engine.text("first") == '{"measured_temper'
        again = engine.submit("again", [*PROMPT, *first.generated, 40, 41], 20)
        engine.run()
        Oracle(model).check(again)


def test_drafted_tokens_have_theirs(model: llama.Model) -> None:
    few_words = Sampling(temperature=0.0, logit_bias={**NO_END, **dict.fromkeys(range(40, 43), 100.0)})
    engine = Engine(Path(), model=model, costs=FREE_ROWS)
    sequence = engine.submit("one", PROMPT, 150, sampling=few_words, speculates=True, logprobs=2)
    engine.run()
    assert sequence.usage.accepted_draft_tokens > 20
    assert len(engine.logprobs("one")) == 150
    check(engine.logprobs("one"), sequence, true_logprobs(model, sequence), 2)


def test_every_choice_has_its_own(model: llama.Model) -> None:
    engine = Engine(Path(), model=model)
    sampling = Sampling(temperature=1.5, seed=5, logit_bias=NO_END)
    first = engine.submit("many", PROMPT, 30, choices=3, sampling=sampling, logprobs=1)
    engine.run()
    for member in first.group.members:
        check(engine.logprobs("many", member.index), member, true_logprobs(model, member), 1)


def test_nobody_else_pays(model: llama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*arguments: object) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(RowLogprobs, "__init__", computed)
    engine = Engine(Path(), model=model)
    engine.submit("one", PROMPT, 20)
    engine.run()
    assert not engine.logprobs("one")


def test_equal_alternatives_come_in_order_of_their_ids_and_impossible_ones_not_at_all() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf, 3.0], np.float32)
    row = RowLogprobs(logits, 2, lambda token: b"%d" % token)
    assert [chance.id for chance in row.of(0).top] == [1, 2]
    assert row.of(4).chosen.logprob == row.of(1).chosen.logprob
    assert [chance.id for chance in RowLogprobs(logits, 20, lambda token: b"").of(0).top] == [1, 2, 4, 0]
    total = sum(np.exp(row.of(token).chosen.logprob) for token in (0, 1, 2, 4))
    assert total == pytest.approx(1.0)


def prompt_logprobs(engine: Engine, name: str) -> PromptLogprobs:
    [found] = [event for event in engine.events[name] if isinstance(event, PromptLogprobs)]
    first_text = next((i for i, event in enumerate(engine.events[name]) if isinstance(event, TextDelta)), None)
    assert first_text is None or engine.events[name].index(found) < first_text
    return found


def check_prompt(logprobs: PromptLogprobs, model: llama.Model, prompt: list[int], best: int) -> None:
    first, *rest = logprobs.tokens
    assert (first.chosen.id, first.chosen.logprob, first.top) == (prompt[0], 0.0, ())
    logits = Oracle(model).logits(prompt, 0, 32).astype(np.float64)
    truth = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert len(rest) == len(prompt) - 1
    for position, logprob in enumerate(rest):
        row = truth[position]
        assert logprob.chosen.id == prompt[position + 1]
        assert logprob.chosen.logprob == pytest.approx(row[prompt[position + 1]], abs=CLOSE)
        np.testing.assert_allclose([chance.logprob for chance in logprob.top], np.sort(row)[::-1][:best], atol=CLOSE)


@pytest.mark.parametrize("order", ["serial", "joint"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_is_scored_beside_others(
    tmp_path: Path, family: tiny.Family, order: Literal["serial", "joint"]
) -> None:
    """Nothing of it comes from the cache, batches ask for no more distributions than there are, others go on."""
    model = load(tiny.write(tmp_path / "m.gguf", family))
    engine = Engine(Path(), model=model, order=order, parallel=3, pool_tokens=1024, costs=FREE_ROWS)
    long = [3 + (5 + 11 * index) % 250 for index in range(200)]
    engine.submit("before", long, 5)
    engine.run()
    engine.submit("beside", PROMPT, 30, speculates=family != "recurrent")
    engine.submit("scored", long, 10, prompt_logprobs=2, logprobs=1, choices=2)
    engine.submit("plain", [*long, 9, 9], 10)
    engine.run()
    check_prompt(prompt_logprobs(engine, "scored"), model, long, 2)
    end = engine.end("scored")
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 0
    assert len(engine.logprobs("scored")) == len(engine.logprobs("scored", 1)) == 10
    assert all(isinstance(engine.end(name), Finished) for name in ("beside", "plain"))


def test_a_prompt_alone_can_be_scored(model: llama.Model) -> None:
    engine = Engine(Path(), model=model)
    engine.submit("one", PROMPT, 0, prompt_logprobs=0)
    engine.submit("bare", PROMPT, 0)
    engine.run()
    check_prompt(prompt_logprobs(engine, "one"), model, PROMPT, 0)
    for name in ("one", "bare"):
        end = engine.end(name)
        assert isinstance(end, Finished)
        assert (end.reason, end.usage.prompt_tokens, end.usage.completion_tokens) == ("length", len(PROMPT), 0)
        assert not any(isinstance(event, TextDelta) for event in engine.events[name])


@pytest.mark.parametrize("park_bytes", [0, 1 << 24])
def test_a_preempted_prompt_is_scored_once(
    model: llama.Model, park_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "GROWTH_TOKENS", 2)  # admit greedily, so that sequences have to be preempted
    engine = Engine(Path(), model=model, pool_tokens=256, parallel=6, park_bytes=park_bytes)
    prompts = [[3 + (13 * name + 7 * index) % 250 for index in range(60)] for name in range(12)]
    for name, tokens in enumerate(prompts):
        engine.submit(f"r{name}", tokens, 40, prompt_logprobs=1)
    engine.run()
    assert engine.loop.stats().preemptions > 0
    for name, tokens in enumerate(prompts):
        check_prompt(prompt_logprobs(engine, f"r{name}"), model, tokens, 1)
