"""A llama.cpp context: computes batches over a pool of KV cells. One context belongs to one thread."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from ocserve.engine.bindings import LlamaError, api
from ocserve.engine.llama import Model

Embeddings = np.ndarray[Any, np.dtype[np.float32]]  # one row for each token


class DecodeStatus(Enum):
    """Outcome of one `Context.decode`. After ABORTED and FATAL part of the batch may stay in memory."""

    OK = 0
    NO_SLOT = 1
    ABORTED = 2
    INVALID = -1
    FATAL = -2


@dataclass(frozen=True, slots=True)
class Row:
    """One token of a batch. `logits` asks for the distribution of the token that follows it."""

    token: int
    position: int
    sequence: int
    logits: bool


def fill(batch: Any, rows: Sequence[Row], *, capacity: int, vocabulary: int, sequences: int) -> None:
    """Write `rows` into a `llama_batch` of `capacity` tokens."""
    assert 0 < len(rows) <= capacity
    batch.n_tokens = len(rows)
    for index, row in enumerate(rows):
        assert 0 <= row.token < vocabulary
        assert 0 <= row.sequence < sequences
        batch.token[index] = row.token
        batch.pos[index] = row.position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row.sequence
        batch.logits[index] = row.logits


# enum ggml_type
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}


class Context:
    """Computes batches over a pool of KV cells that all sequences share (unified KV).

    Sequence ids are numbers below `sequences`. A cell lives as long as some sequence holds it: sharing a prefix between
    sequences is bookkeeping, not copying.
    """

    def __init__(
        self,
        model: Model,
        *,
        pool_tokens: int,
        sequences: int,
        batch_tokens: int,
        threads: int,
        outputs: int | None = None,
        kv_type: str = "f16",
        full_window: bool = False,
        flash_attention: bool = True,
    ) -> None:
        """`outputs` is how many rows of a batch may ask for a distribution: `sequences` at least, which is the default.

        `full_window` lets sliding-window layers keep all cells instead of those in the window. Without
        `flash_attention`, one row alone and the same row in a batch differ by less than 1e-5 in the logits of a small
        F32 model with an F32 cache; with it by up to 0.06 on a CPU.
        """
        outputs = max(outputs or 0, sequences)
        assert sequences <= outputs <= batch_tokens, "llama.cpp aborts"
        parameters = api.llama_context_default_params()
        parameters.n_ctx = pool_tokens
        parameters.n_batch = batch_tokens
        parameters.n_ubatch = batch_tokens
        parameters.n_seq_max = sequences
        # The default would reserve batch_tokens × vocabulary floats.
        parameters.n_outputs_max = outputs
        parameters.kv_unified = True
        parameters.swa_full = full_window
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = KV_TYPES[kv_type]
        if not flash_attention:
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        self._pointer: ctypes.c_void_p = api.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise LlamaError(f"llama.cpp could not create a context of {pool_tokens} tokens (not enough memory?)")
        self._memory = api.llama_get_memory(self._pointer)
        if not self._memory or api.llama_model_has_encoder(model.pointer):
            raise LlamaError("this model cannot generate text token by token (an embedding or encoder model)")
        self.pool_tokens: int = api.llama_n_ctx(self._pointer)
        self.outputs = outputs
        self.batch_tokens: int = min(batch_tokens, api.llama_n_batch(self._pointer))  # never more than the pool
        self.sequences = sequences
        self._batch = api.llama_batch_init(self.batch_tokens, 0, 1)
        self._width = model.embedding_length
        self._embedding_batch: Any = None
        self._vocabulary = model.vocab.size
        self._distribution: Any = ctypes.c_float * self._vocabulary
        self._threads = threads

    @property
    def pointer(self) -> ctypes.c_void_p:
        return self._pointer

    def use_threads(self, count: int) -> None:
        """Compute the next batches with `count` threads, whatever their size."""
        if count != self._threads:
            api.llama_set_n_threads(self._pointer, count, count)
            self._threads = count

    def decode(self, rows: Sequence[Row]) -> DecodeStatus:
        """Compute one batch; distributions are then read by row index."""
        fill(self._batch, rows, capacity=self.batch_tokens, vocabulary=self._vocabulary, sequences=self.sequences)
        code = api.llama_decode(self._pointer, self._batch)
        return DecodeStatus(code) if code >= -1 else DecodeStatus.FATAL

    def decode_embeddings(
        self, rows: Embeddings, position: int, sequence: int, *, logits: bool, whole: bool
    ) -> DecodeStatus:
        """Compute embeddings in the place of tokens, from `position` on; `logits` asks for the last one's distribution.

        With `whole` each attends to all the others, also to those behind it.
        """
        count, width = rows.shape
        assert 0 < count <= self.batch_tokens
        assert width == self._width
        assert 0 <= sequence < self.sequences
        if self._embedding_batch is None:
            self._embedding_batch = api.llama_batch_init(self.batch_tokens, self._width, 1)
        batch = self._embedding_batch
        batch.n_tokens = count
        ctypes.memmove(batch.embd, np.ascontiguousarray(rows, np.float32).ctypes.data, 4 * count * width)
        for index in range(count):
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits and index == count - 1
        if whole:
            api.llama_set_causal_attn(self._pointer, False)
        code = api.llama_decode(self._pointer, batch)
        if whole:
            api.llama_set_causal_attn(self._pointer, True)
        return DecodeStatus(code) if code >= -1 else DecodeStatus.FATAL

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The distribution that row `row` of the last batch asked for: a view of vocabulary-size floats."""
        pointer = api.llama_get_logits_ith(self._pointer, row)
        if not pointer:
            raise LlamaError(f"row {row} asked for no distribution")
        return np.frombuffer(self._distribution.from_address(ctypes.addressof(pointer.contents)), np.float32)

    def usable(self, row: int) -> bool:
        """Whether a token can be drawn from the distribution of this row.

        Every logit sums over all of the last hidden state, so one number of it that is not finite shows in each.
        """
        pointer = api.llama_get_logits_ith(self._pointer, row)
        return bool(pointer) and math.isfinite(pointer[0])

    def forget(self, sequence: int) -> None:
        """Free all cells of a sequence."""
        api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def forget_range(self, sequence: int, begin: int, end: int) -> None:
        """Free a sequence's cells at positions begin … end - 1."""
        api.llama_memory_seq_rm(self._memory, sequence, begin, end)

    def truncate(self, sequence: int, length: int) -> bool:
        """Keep the first `length` positions only; False where this memory cannot (recurrent states)."""
        return bool(api.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def share(self, source: int, target: int, begin: int, end: int) -> None:
        """Let `target` hold the cells of `source` at positions begin … end - 1 too; of a recurrent state all of it."""
        assert 0 <= source < self.sequences
        assert 0 <= target < self.sequences
        assert source != target
        api.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def positions(self, sequence: int) -> range:
        """The positions whose cells the sequence holds; of a sliding window those that every layer still has."""
        least = api.llama_memory_seq_pos_min(self._memory, sequence)
        return range(max(least, 0), api.llama_memory_seq_pos_max(self._memory, sequence) + 1)

    def occupied(self, sequence: int) -> bool:
        """Whether the sequence holds any cell."""
        return bool(api.llama_memory_seq_pos_max(self._memory, sequence) >= 0)

    def state_bytes(self, sequence: int) -> int:
        """How large `save` would be."""
        return int(api.llama_state_seq_get_size(self._pointer, sequence))

    def save(self, sequence: int) -> State:
        """A copy of everything the memory holds for a sequence, in llama.cpp's own format."""
        size = self.state_bytes(sequence)
        state = np.empty(size, np.uint8)
        written = api.llama_state_seq_get_data(self._pointer, _bytes_pointer(state), size, sequence)
        if written != size or not size:
            raise LlamaError("the state of a sequence could not be read")
        return state

    def restore(self, sequence: int, state: State | Buffer) -> bool:
        """Give `sequence` the content of a saved state, in cells of its own; False if there is no room for it.

        llama.cpp trusts what it is given: the state must come from `save` in a context of the same build, model and
        types.
        """
        view = np.frombuffer(state, np.uint8)
        read = api.llama_state_seq_set_data(self._pointer, _bytes_pointer(view), view.nbytes, sequence)
        if read == view.nbytes:
            return True
        self.forget(sequence)
        return False

    def close(self) -> None:
        """Free the context's memory; the object is unusable afterwards."""
        api.llama_batch_free(self._batch)
        if self._embedding_batch is not None:
            api.llama_batch_free(self._embedding_batch)
        api.llama_free(self._pointer)


Buffer = bytes | bytearray | memoryview
State = np.ndarray[Any, np.dtype[np.uint8]]


def _bytes_pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
