"""How much memory a model takes when it is loaded by a plan, and where: weights, cache, buffers, process.

Weights and cache are exact where llama.cpp's layout is known; the buffers are an estimate that errs upward. Nothing
here looks at the machine: devices are passed in.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import msgspec

from ocserve.catalog import gguf_format
from ocserve.catalog.gguf import GgufHeader
from ocserve.machine import Device

KvType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
KV_TYPES: tuple[KvType, ...] = get_args(KvType)

CELL_STEP = 256  # llama.cpp rounds cells up to it
OVERHEAD_BYTES = 256 * 1024 * 1024  # the two processes with tokenizer, template and llama.cpp's own tables
# llama.cpp's own `--fit` leaves 1 GiB free on a device; a small device cannot spare so much.
GPU_MARGIN_BYTES = 1024 * 1024 * 1024
_GPU_MARGIN_SHARE = 0.1
_BUFFER_MARGIN = 1.2

_BLOCKS: dict[str, tuple[int, int]] = {
    name.lower(): (weights, nbytes) for name, weights, nbytes in gguf_format.TENSOR_TYPES.values()
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is loaded.

    `pool_tokens` are the cells that all sequences share. `gpu_layers` counts as llama.cpp does: from the last layer
    backwards, the output being one more; -1 is all. `sequences` and `outputs` are the context's `n_seq_max` and
    `n_outputs_max`; 0 is `parallel`. Without `flash_attention` the scores of every row with every cell are kept for the
    time of a layer. `full_window` lets layers that slide keep every cell. `host_cache_bytes` is main
    memory that stored prefixes may take.
    """

    context: int
    parallel: int
    pool_tokens: int
    gpu_layers: int = -1
    kv_type: KvType = "f16"
    flash_attention: bool = True
    batch_tokens: int = 256
    sequences: int = 0
    outputs: int = 0
    full_window: bool = False
    host_cache_bytes: int = 0


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by purpose over all places, and by place: main memory, each GPU."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    host_cache_bytes: int
    host_bytes: int
    gpu_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return self.host_bytes + sum(self.gpu_bytes)


def kv_row_bytes(elements: int, kv_type: KvType) -> int:
    """Bytes of a cache row of `elements` numbers."""
    weights, nbytes = _BLOCKS[kv_type]
    return elements * nbytes // weights


def kv_bytes_per_token(header: GgufHeader, kv_type: KvType = "f16") -> int:
    """What each further token of context takes, in the layers that attend to all of it."""
    return sum(
        kv_row_bytes(layer.keys, kv_type) + kv_row_bytes(layer.values, kv_type)
        for layer in header.layers
        if not layer.slides
    )


def cells(pool_tokens: int) -> int:
    """KV cells that llama.cpp allocates for a pool of `pool_tokens`."""
    return -(-pool_tokens // CELL_STEP) * CELL_STEP


def sliding_cells(header: GgufHeader, plan: Plan) -> int:
    """Cells of a layer that slides: a window for each sequence and one batch, as `llama_kv_cache_iswa` has it."""
    if plan.full_window:
        return cells(plan.pool_tokens)
    window = header.sliding_window * (plan.sequences or plan.parallel) + plan.batch_tokens
    return cells(min(cells(plan.pool_tokens), window))


def need(header: GgufHeader, plan: Plan, gpus: Sequence[Device] = ()) -> Need:
    """The memory that `plan` takes with its layers placed on `gpus`.

    Weights on the processor are mapped from the file. Where llama.cpp also keeps a rearranged copy of some of them
    ("repack"), the mapped pages of those are not touched again and the system may drop them, so they count once.
    """
    plan = _as_computed(header, plan)
    places = placement(len(header.layers), plan.gpu_layers, gpus)
    weights = [layer.weight_bytes for layer in header.layers]
    cache = _cache_bytes(header, plan)
    buffers = compute_bytes(header, plan)
    # The embeddings stay in main memory. The output is a matrix of its own, or on a GPU a second copy of them.
    output, on_gpu = header.output_bytes, places[-1] is not None
    if on_gpu and not header.has_output:
        output += header.embedding_bytes
    embeddings = header.tensor_bytes - sum(weights) - header.output_bytes

    def held(place: int | None) -> int:
        layers = sum(weights[index] + cache[index] for index, each in enumerate(places[:-1]) if each == place)
        return layers + (output if places[-1] == place else 0)

    loads = [held(index) for index in range(len(gpus))]
    margins = [gpu_margin(gpu) if load else 0 for gpu, load in zip(gpus, loads, strict=True)]
    gpu_buffers = [buffers if load else 0 for load in loads]
    host = held(None) + embeddings + buffers + OVERHEAD_BYTES + plan.host_cache_bytes
    return Need(
        weights_bytes=embeddings + sum(weights) + output,
        kv_bytes=sum(cache),
        compute_bytes=buffers + sum(gpu_buffers),
        overhead_bytes=OVERHEAD_BYTES + sum(margins),
        host_cache_bytes=plan.host_cache_bytes,
        host_bytes=host,
        gpu_bytes=tuple(map(sum, zip(loads, gpu_buffers, margins, strict=True))),
    )


def _as_computed(header: GgufHeader, plan: Plan) -> Plan:
    """The plan with the sizes that follow for a model that makes one result of an input.

    Every row of its batches is an output, and llama.cpp keeps room for the distribution of each. Cells hold one input
    that goes on from batch to batch and what is computed beside it.
    """
    if header.pooling == "none":
        return plan
    rows = max(plan.batch_tokens, plan.context if header.takes_whole_inputs else 0)
    return replace(plan, batch_tokens=rows, outputs=rows, pool_tokens=plan.context + rows)


def gpu_margin(gpu: Device) -> int:
    """Bytes of a device that stay free for the driver, its libraries' workspaces and the screen."""
    return min(GPU_MARGIN_BYTES, int(gpu.memory_total * _GPU_MARGIN_SHARE))


def placement(layers: int, gpu_layers: int, gpus: Sequence[Device]) -> list[int | None]:
    """The GPU of each layer and, last, of the output; None is the processor.

    llama.cpp's rule: the last `gpu_layers` go to the GPUs, in runs that are as long as each device's share of the free
    memory.
    """
    if not gpus:
        return [None] * (layers + 1)
    placed = layers + 1 if gpu_layers < 0 else min(gpu_layers, layers + 1)
    first = layers + 1 - placed
    shares = list(itertools.accumulate(max(gpu.memory_free, 1) for gpu in gpus))
    run = [share / shares[-1] for share in shares]
    return [
        None if layer < first else min(bisect.bisect_right(run, (layer - first) / placed), len(gpus) - 1)
        for layer in range(layers + 1)
    ]


def _cache_bytes(header: GgufHeader, plan: Plan) -> list[int]:
    """Of each layer: keys and values of its cells, and the state of each sequence in F32."""
    full, sliding = cells(plan.pool_tokens), sliding_cells(header, plan)
    sequences = plan.sequences or plan.parallel
    return [
        (kv_row_bytes(layer.keys, plan.kv_type) + kv_row_bytes(layer.values, plan.kv_type))
        * (sliding if layer.slides else full)
        + layer.state * 4 * sequences
        for layer in header.layers
    ]


def score_bytes(header: GgufHeader, plan: Plan) -> int:
    """The scores of a batch's rows with all cells, of one layer, in F32, and its masks in the same format."""
    rows = max(plan.batch_tokens, plan.parallel)
    return rows * cells(plan.pool_tokens) * (header.head_count + 2) * 4


def compute_bytes(header: GgufHeader, plan: Plan) -> int:
    """llama.cpp's graph and output buffers on one device, estimated upward.

    A graph holds F32 rows of a batch: four of the hidden size live beside the three of the widest feed-forward block
    and each expert's own result, or beside the attention's or the recurrent mixer's; the logits are computed when
    these are gone. To them come the masks, in F16, and the logits once more where they are read. An encoder computes no
    logits, and its one mask is of every row against every other.
    """
    rows = max(plan.batch_tokens, plan.parallel)
    attention = header.head_count * (header.key_length + header.value_length) * 2
    feed_forward = 3 * header.feed_forward_length + 2 * header.experts_used * header.embedding_length
    widest = max(feed_forward, attention, 8 * header.state_width)
    hidden = rows * 4 * (4 * header.embedding_length + widest)
    attending = {layer.slides for layer in header.layers if layer.keys}
    masks = rows * 2 * sum(sliding_cells(header, plan) if slides else cells(plan.pool_tokens) for slides in attending)
    hidden += 0 if plan.flash_attention else score_bytes(header, plan)
    outputs = plan.outputs or plan.sequences or plan.parallel
    logits = outputs * header.vocabulary_size * 4
    remembers = any(layer.keys or layer.state for layer in header.layers)
    masks += 0 if remembers else rows * rows * 4
    return int((max(hidden, logits if remembers else 0) + masks + logits) * _BUFFER_MARGIN)
