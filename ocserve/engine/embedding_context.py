"""A llama.cpp context that makes one vector of each input: the pooled output of an embedding or reranking model.

How outputs are pooled is the model's own (`<architecture>.pooling_type` of its file). Encoders see an input from both
sides, so that all of it lies in one batch; where a model reads from left to right and only the last token counts, an
input may be spread over several. One context belongs to one thread.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from ocserve.engine.bindings import LlamaError, api
from ocserve.engine.context import DecodeStatus, Row, fill
from ocserve.engine.llama import Model

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Pooling(Enum):
    """enum llama_pooling_type. `RANK` is a classifier's output: how relevant, instead of a vector."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


def pooling_of(model: Model) -> Pooling:
    """What the model's file states; NONE for one that generates."""
    stated = model.metadata(f"{model.metadata('general.architecture')}.pooling_type")
    try:
        return Pooling(int(stated or 0))
    except ValueError:
        return Pooling.NONE


class PoolingContext:
    """Computes batches of inputs. Sequence ids are numbers below `sequences`."""

    def __init__(
        self, model: Model, *, context: int, batch_tokens: int, sequences: int, threads: int, kv_type: int
    ) -> None:
        """`context` is the longest input. Raises `LlamaError` for a model whose outputs cannot be used so."""
        self.pooling = pooling_of(model)
        if self.pooling is Pooling.NONE:
            raise LlamaError("the file does not say how its outputs are pooled, so it cannot embed")
        if model.has_encoder and model.has_decoder:
            raise LlamaError("models with both an encoder and a decoder are not supported")
        architecture = model.metadata("general.architecture")
        causal = model.metadata(f"{architecture}.attention.causal") != "false"
        last = self.pooling in (Pooling.LAST, Pooling.RANK)
        parameters = api.llama_context_default_params()
        parameters.embeddings = True
        parameters.n_seq_max = sequences
        parameters.kv_unified = True
        parameters.type_k = parameters.type_v = kv_type
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        self.splits = causal and last and not model.has_encoder
        self.batch_tokens = batch_tokens if self.splits else max(batch_tokens, context)
        parameters.n_batch = parameters.n_ubatch = self.batch_tokens
        # Cells: one input that goes on from batch to batch, and what is computed beside it.
        parameters.n_ctx = context + self.batch_tokens
        self._pointer: ctypes.c_void_p = api.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise LlamaError(f"llama.cpp could not create a context of {context} tokens (not enough memory?)")
        self._memory = api.llama_get_memory(self._pointer)
        if self.splits and not self._memory:
            raise LlamaError("the file does not say that its attention sees an input from both sides")
        self._compute = api.llama_encode if model.has_encoder else api.llama_decode
        self._batch = api.llama_batch_init(self.batch_tokens, 0, 1)
        self.sequences = sequences
        self.dimensions: int = api.llama_model_n_embd_out(model.pointer)
        self._outputs: int = self.dimensions
        if self.pooling is Pooling.RANK:
            self._outputs = api.llama_model_n_cls_out(model.pointer)
            # Of Qwen3's rerankers llama.cpp gives the softmax over "yes" and "no"; of others the one class's logit.
            self._gives_shares = architecture in ("qwen3", "qwen3vl")
            if self._outputs != (2 if self._gives_shares else 1):
                raise LlamaError(f"a classifier of {self._outputs} classes does not say how relevant a document is")
        self._vocabulary = model.vocab.size

    def compute(self, rows: Sequence[Row]) -> DecodeStatus:
        """Compute one batch; the vectors of inputs that end in it are then read by sequence."""
        fill(self._batch, rows, capacity=self.batch_tokens, vocabulary=self._vocabulary, sequences=self.sequences)
        code = self._compute(self._pointer, self._batch)
        return DecodeStatus(code) if code >= -1 else DecodeStatus.FATAL

    def vector(self, sequence: int) -> Vector:
        """A copy of what the last batch gave for a sequence, not normalised."""
        pointer = api.llama_get_embeddings_seq(self._pointer, sequence)
        if not pointer:
            raise LlamaError(f"sequence {sequence} has no output")
        return np.ctypeslib.as_array(pointer, shape=(self._outputs,)).copy()

    def relevance(self, output: Vector) -> float:
        """What a reranking model's output says of a document, in [0, 1]."""
        value = float(output[0])
        return value if self._gives_shares else logistic(value)

    def forget(self, sequence: int) -> None:
        """Free what the memory of a model that has one holds for a sequence."""
        if self._memory:
            api.llama_memory_seq_rm(self._memory, sequence, -1, -1)


def logistic(value: float) -> float:
    """1 / (1 + e^-value), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
