"""The draft model: right guesses from an equal model, none from a foreign one, and failures that stay its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ocserve.engine import llama
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.drafting import DraftModel, ModelDrafter, VocabularyMismatch, check_vocabulary
from ocserve.engine.speculation import MOST_DRAFTED, Speculator, verified
from tests import tiny

PROMPT = tuple(range(10, 60))


def load(path: Path) -> llama.Model:
    log = llama.LoadLog()
    model = llama.Model(str(path), gpu_layers=0, log=log)
    log.close()
    return model


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> llama.Model:
    return load(tiny_model)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> llama.Model:
    """The same vocabulary with other weights."""
    return load(tiny.write(tmp_path_factory.mktemp("draft") / "tiny.gguf", seed=2))


@pytest.fixture
def context(target: llama.Model) -> Iterator[Context]:
    made = Context(target, pool_tokens=512, sequences=1, batch_tokens=64, threads=1, outputs=16, **tiny.EXACT)
    yield made
    made.close()


def draft_model(
    model: llama.Model, target: llama.Model, *, pool_tokens: int = 512, sequences: int = 2, batch_tokens: int = 64
) -> DraftModel:
    return DraftModel(
        model, target.vocab, pool_tokens=pool_tokens, sequences=sequences, batch_tokens=batch_tokens, threads=1
    )


def opened(model: DraftModel, tokens: tuple[int, ...] = PROMPT) -> ModelDrafter:
    drafter = model.open()
    assert drafter is not None
    drafter.extend(tokens)
    return drafter


def patient_draft(drafter: ModelDrafter, most: int) -> list[int]:
    """The first call only reads a long prompt."""
    return drafter.draft(most) or drafter.draft(most)


def greedy(context: Context, tokens: list[int], speculator: Speculator | None, length: int) -> list[int]:
    """`length` greedy tokens after `tokens`, with free batches so that every hopeful draft is verified."""
    tokens = list(tokens)
    end = len(tokens) + length
    assert context.decode([Row(t, p, 0, False) for p, t in enumerate(tokens[:-1])]) is DecodeStatus.OK
    while len(tokens) < end:
        begin = len(tokens) - 1
        draft = speculator.propose(lambda rows: 1.0, most=end - len(tokens) - 1) if speculator else []
        rows = [Row(token, begin + row, 0, True) for row, token in enumerate([tokens[-1], *draft])]
        assert context.decode(rows) is DecodeStatus.OK
        made = list(verified(draft, lambda row: int(np.argmax(context.logits(row)))))
        tokens += made
        assert context.truncate(0, len(tokens) - 1)
        if speculator:
            speculator.accept(made)
    context.forget(0)
    return tokens[end - length :]


def test_an_equal_model_guesses_everything(target: llama.Model, context: Context) -> None:
    plain = greedy(context, list(PROMPT), None, 100)
    speculator = Speculator(opened(draft_model(target, target)))
    assert greedy(context, list(PROMPT), speculator, 100) == plain
    assert speculator.drafted > 80
    # Its F16 cache and attention kernel round differently, which may turn a near tie.
    assert speculator.accepted >= 0.95 * speculator.drafted


def test_a_stranger_is_wrong_changes_nothing_and_is_switched_off(
    target: llama.Model, stranger: llama.Model, context: Context
) -> None:
    plain = greedy(context, list(PROMPT), None, 150)
    speculator = Speculator(opened(draft_model(stranger, target)))
    assert greedy(context, list(PROMPT), speculator, 150) == plain
    assert 0 < speculator.drafted <= 100  # the steps until its acceptance is known; all 150 would draft over 1,000
    assert speculator.accepted < 0.2 * speculator.drafted


def test_a_draft_after_roll_back_is_the_draft_of_a_fresh_reader(target: llama.Model) -> None:
    """Whatever part of the last draft came true: none, some, all, and all with more tokens than were guessed."""
    model = draft_model(target, target)
    first = patient_draft(opened(draft_model(target, target)), 6)
    for right in range(7):
        for more in ([], [99], [98, 97, 96]):
            tokens = (*PROMPT, *first[:right], *more)
            drafter = opened(model)
            assert patient_draft(drafter, 6) == first
            drafter.extend(tokens[len(PROMPT) :])
            again = drafter.draft(6)
            drafter.close()
            fresh = opened(model, tokens)
            assert again == patient_draft(fresh, 6)
            fresh.close()


def test_a_long_prompt_is_read_one_batch_a_call(target: llama.Model) -> None:
    drafter = opened(draft_model(target, target, batch_tokens=32), tuple(range(3, 203)))
    calls = 0
    while not drafter.draft(4):
        calls += 1
    assert calls == 6  # 200 tokens: six batches of 32, then 8 with the draft


def test_sequences_do_not_see_each_other_and_slots_come_back(target: llama.Model) -> None:
    model = draft_model(target, target)
    alone = patient_draft(opened(draft_model(target, target)), 5)
    one, other = opened(model), opened(model, tuple(range(100, 160)))
    assert model.open() is None
    patient_draft(other, 5)
    assert patient_draft(one, 5) == alone
    other.close()
    assert patient_draft(opened(model), 5) == alone
    assert one.draft(5) == alone


def test_a_full_pool_ends_drafting_for_the_one_that_met_it(target: llama.Model) -> None:
    model = draft_model(target, target, pool_tokens=256, batch_tokens=128)
    kept, lost = opened(model, PROMPT), opened(model, tuple(range(3, 253)))
    draft = patient_draft(kept, 3)
    assert draft
    assert [lost.draft(3) for _ in range(4)] == [[]] * 4
    lost.extend([1])
    lost.close()
    assert kept.draft(3) == draft
    assert model.open() is not None


@pytest.mark.parametrize("failure", [DecodeStatus.FATAL, DecodeStatus.ABORTED])
def test_a_broken_context_drafts_for_nobody_again(
    target: llama.Model, monkeypatch: pytest.MonkeyPatch, failure: DecodeStatus
) -> None:
    model = draft_model(target, target)
    one, other = opened(model), opened(model)
    monkeypatch.setattr(Context, "decode", lambda self, rows: failure)
    assert one.draft(3) == []
    monkeypatch.undo()
    assert patient_draft(other, 3) == []
    assert model.open() is None


def test_a_draft_without_usable_numbers_ends_drafting(target: llama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = draft_model(target, target)
    drafter = opened(model, PROMPT[:5])
    nothing = np.full(target.vocab.size, np.nan, np.float32)
    monkeypatch.setattr(Context, "logits", lambda self, row: nothing)
    assert drafter.draft(3) == []
    monkeypatch.undo()
    assert drafter.draft(MOST_DRAFTED) == []


def test_a_recurrent_model_cannot_draft(target: llama.Model, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="roll back"):
        draft_model(load(tiny.write(tmp_path / "mamba.gguf", "recurrent")), target)


def test_another_vocabulary_is_refused_by_name(
    target: llama.Model, stranger: llama.Model, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_vocabulary(target.vocab, stranger.vocab)
    with pytest.raises(VocabularyMismatch, match="has 49152 tokens, the model 267"):
        check_vocabulary(target.vocab, load(smollm2).vocab)
    monkeypatch.setattr(stranger.vocab, "eos", 7)
    with pytest.raises(VocabularyMismatch, match="eos token is 7, the model's 2"):
        check_vocabulary(target.vocab, stranger.vocab)


def test_one_differing_token_is_found(target: llama.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SPECIALS", ("<|endoftext|>", "<|im_begin|>", "<|im_end|>"))
    other = load(tiny.write(tmp_path / "other.gguf"))
    with pytest.raises(VocabularyMismatch, match="token 1 has another text"):
        check_vocabulary(target.vocab, other.vocab)
