"""From a loaded embedding or reranking model to its engine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from ocserve.engine import llama, wire
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import KV_TYPES, DecodeStatus, Row
from ocserve.engine.embedding import Embedder
from ocserve.engine.embedding_context import Pooling, PoolingContext
from ocserve.engine.embedding_inputs import InputEncoder
from ocserve.engine.facts import model_facts
from ocserve.errors import ApiError
from ocserve.generation import Answer
from ocserve.machine import usable_cores


def embedder(
    spec: wire.EngineSpec,
    model: llama.Model,
    send: Callable[[wire.EngineMessage], None],
    *,
    begun: float,
    log: llama.LoadLog,
) -> Embedder:
    """An engine for `model`; raises `LlamaError`. `begun` is when its load was, in monotonic seconds."""
    context_tokens = min(spec.context, model.trained_context)
    threads = spec.threads_prefill or usable_cores()
    context = PoolingContext(
        model,
        context=context_tokens,
        batch_tokens=spec.batch_tokens,
        sequences=spec.sequences or spec.parallel,
        threads=threads,
        kv_type=KV_TYPES[spec.kv_type],
    )
    _warm_up(context)
    log.close()
    known = model_facts(
        spec,
        model,
        pool_tokens=context_tokens,
        threads_decode=threads,
        threads_prefill=threads,
        load_s=time.monotonic() - begun,
    )

    def reply(request_id: str, answer: Answer | ApiError) -> None:
        if isinstance(answer, ApiError):
            send(wire.Refused(request_id=request_id, error=answer.info))
        else:
            send(wire.Told(request_id=request_id, answer=answer))

    return Embedder(
        context,
        InputEncoder(model.vocab, context=context_tokens, template=model.metadata("tokenizer.chat_template.rerank")),
        facts=replace(known, dimensions=0 if context.pooling is Pooling.RANK else context.dimensions),
        reply=reply,
    )


def _warm_up(context: PoolingContext) -> None:
    """One real batch, so that a broken model is known before it is offered."""
    status = context.compute([Row(0, 0, 0, True)])
    if status is not DecodeStatus.OK:
        raise LlamaError(f"the warm-up batch failed: {status.name}")
    if not np.isfinite(context.vector(0)).all():
        raise LlamaError("the warm-up batch gave no numbers")
    context.forget(0)
