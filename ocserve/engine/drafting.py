"""A draft model: a small second model with the same vocabulary that guesses what the served model will say.

It has its own context, one sequence id per drafted sequence, and runs on the loop's thread, never beside a decode of
the served model. What goes wrong in it ends drafting, for one sequence or for all, and never a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.llama import Model, Vocab

# Families pad their vocabularies differently; the same bound as llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE.
_SIZE_TOLERANCE = 128
# With more unseen tokens than this a call only catches up, so that the time of a draft is the time of drafting.
_FEW = 16


class VocabularyMismatch(LlamaError):
    """The draft model speaks another vocabulary; the message names the first difference."""


class _NoDraft(LlamaError):
    """The draft model failed this sequence."""


def check_vocabulary(target: Vocab, draft: Vocab) -> None:
    """Raise `VocabularyMismatch` unless every id that both have means the same in both.

    Reads every token's text once: tenths of a second for the largest vocabularies, at load.
    """
    if abs(target.size - draft.size) > _SIZE_TOLERANCE:
        raise VocabularyMismatch(f"the draft model has {draft.size} tokens, the model {target.size}")
    for name in ("bos", "eos"):
        ours, theirs = getattr(target, name), getattr(draft, name)
        if ours != theirs:
            raise VocabularyMismatch(f"the draft model's {name} token is {theirs}, the model's {ours}")
    for token in range(min(target.size, draft.size)):
        if target.text(token) != draft.text(token):
            raise VocabularyMismatch(f"token {token} has another text in the draft model")
        if target.is_end(token) != draft.is_end(token):
            raise VocabularyMismatch(f"token {token} ends a generation in only one of the two models")


class DraftModel:
    """A loaded draft model and its KV cells, shared by the sequences that it drafts for."""

    def __init__(
        self,
        model: Model,
        target: Vocab,
        *,
        pool_tokens: int,
        sequences: int,
        batch_tokens: int,
        threads: int,
        flash_attention: bool = True,
    ) -> None:
        """Raise `VocabularyMismatch`, or `LlamaError` for a memory that cannot take back rejected drafts."""
        check_vocabulary(target, model.vocab)
        if model.recurrent or model.hybrid:
            raise LlamaError("a recurrent or hybrid model cannot draft: its memory does not roll back")
        self.context = Context(
            model,
            pool_tokens=pool_tokens,
            sequences=sequences,
            batch_tokens=batch_tokens,
            threads=threads,
            flash_attention=flash_attention,
        )
        self.batch_tokens = batch_tokens
        self._vocabulary = min(target.size, model.vocab.size)  # ids that both know
        self._free = list(range(sequences - 1, -1, -1))
        self._broken = False

    def open(self) -> ModelDrafter | None:
        """A drafter for one sequence, or None while all are in use or the context is broken."""
        return ModelDrafter(self, self._free.pop()) if self._free and not self._broken else None

    def decode(self, slot: int, begin: int, tokens: Sequence[int]) -> None:
        """Compute `tokens` at positions from `begin`; the last asks for a distribution. Raise `_NoDraft` on failure."""
        if self._broken:
            raise _NoDraft
        last = len(tokens) - 1
        status = self.context.decode(
            [Row(token, begin + index, slot, index == last) for index, token in enumerate(tokens)]
        )
        # After these a context cannot be trusted to compute again.
        self._broken = status in (DecodeStatus.ABORTED, DecodeStatus.FATAL)
        if status is not DecodeStatus.OK:
            raise _NoDraft

    def likeliest(self, row: int) -> int:
        """The token of highest probability behind row `row`, of those that the served model knows too."""
        logits = self.context.logits(row)[: self._vocabulary]
        token = int(np.argmax(logits))
        if not np.isfinite(logits[token]):
            raise _NoDraft
        return token

    def release(self, slot: int, *, begun: bool) -> None:
        """Free a closed drafter's cells, if it has begun to have any, and its sequence id."""
        if begun and not self._broken:
            self.context.forget(slot)
        self._free.append(slot)


class ModelDrafter:
    """Greedy drafts for one sequence.

    Its cells hold a prefix of the true tokens and then perhaps the last draft; what of that came true is kept, the rest
    is rolled back at the next call.
    """

    light = False

    def __init__(self, model: DraftModel, slot: int) -> None:
        self._model = model
        self._slot: int | None = slot
        self._tokens: list[int] = []
        self._computed = 0  # leading true tokens whose cells exist
        self._guessed: list[int] = []  # the tokens of the cells behind them
        self._begun = False  # whether there were ever any cells

    def extend(self, tokens: Sequence[int]) -> None:
        """Append true tokens; they are computed by the next `draft`."""
        if self._slot is not None:
            self._tokens.extend(tokens)

    def ready(self) -> bool:
        return self._slot is not None

    def draft(self, most: int) -> list[int]:
        """The `most` likeliest next tokens, one after the other.

        None after a failure, and none while it catches up: a call computes one batch of what is unseen, so that nobody
        waits for a long prompt at once, and drafts when little is left.
        """
        if self._slot is None or not self._tokens:
            return []
        self._begun = True
        try:
            return self._draft(self._slot, most)
        except LlamaError:
            self.close()
            return []

    def close(self) -> None:
        """Give the cells back and draft no more; one that never drafted may be closed on any thread."""
        if self._slot is not None:
            self._model.release(self._slot, begun=self._begun)
            self._slot = None
            self._tokens, self._guessed = [], []

    def _draft(self, slot: int, most: int) -> list[int]:
        self._roll_back(slot)
        unseen = self._tokens[self._computed : self._computed + self._model.batch_tokens]
        self._model.decode(slot, self._computed, unseen)
        self._computed += len(unseen)
        if len(unseen) > _FEW:
            return []
        token = self._model.likeliest(len(unseen) - 1)
        draft = [token]
        while len(draft) < most:
            self._model.decode(slot, self._computed + len(self._guessed), [token])
            self._guessed.append(token)
            token = self._model.likeliest(0)
            draft.append(token)
        return draft

    def _roll_back(self, slot: int) -> None:
        """Keep the cells of true tokens, but not the newest's: it is computed (again) for its distribution."""
        cells = self._computed + len(self._guessed)
        for guess, token in zip(self._guessed, self._tokens[self._computed :], strict=False):
            if guess != token:
                break
            self._computed += 1
        self._computed = min(self._computed, len(self._tokens) - 1)
        self._guessed = []
        if self._computed < cells and not self._model.context.truncate(slot, self._computed):
            raise _NoDraft
