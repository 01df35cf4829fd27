"""Files with the shapes of public models and no weights: a header, and a hole where the tensors would be.

llama.cpp reads them like the real ones when it is told not to allocate, so that what is predicted for a model of any
size can be compared with what llama.cpp would take. Shapes are those of the models' published `config.json`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

QUANTISED, FULL = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
Kind = Literal["attention", "recurrent", "both", "latent"]
Tensor = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]


@dataclass(frozen=True)
class Shape:
    """A model: sizes, the tensors that its layers have beside the usual ones, and further keys."""

    architecture: str
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int = 32_768
    kind: Kind = "attention"
    tied: bool = False
    experts: int = 0
    used_experts: int = 0
    marks: frozenset[str] = frozenset()
    keys: dict[str, int] = field(default_factory=dict)


SHAPES = {
    "llama3-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, 8192),
    "mistral-7b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 32_768, keys={"attention.sliding_window": 4096}),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, marks=frozenset({"bias"})),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, 40_960, marks=frozenset({"qk_norm"})),
    "qwen3-30b-a3b": Shape(
        "qwen3moe", 48, 2048, 6144, 32, 4, 128, 151_936, experts=128, used_experts=8, marks=frozenset({"qk_norm"}),
        keys={"expert_feed_forward_length": 768},
    ),
    "gemma2-9b": Shape(
        "gemma2", 42, 3584, 14_336, 16, 8, 256, 256_000, 8192, tied=True, marks=frozenset({"post_norm"}),
        keys={"attention.sliding_window": 4096},
    ),
    "gemma3-4b": Shape(
        "gemma3", 34, 2560, 10_240, 8, 4, 256, 262_208, 131_072, tied=True, marks=frozenset({"post_norm", "qk_norm"}),
        keys={"attention.sliding_window": 1024},
    ),
    "deepseek-v2-lite": Shape(  # without its experts
        "deepseek2", 27, 2048, 10_944, 16, 1, 192, 102_400, 163_840, kind="latent",
        keys={
            "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128, "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
            "leading_dense_block_count": 27, "expert_feed_forward_length": 1408, "expert_shared_count": 2,
        },
    ),
    "mamba-130m": Shape(
        "mamba", 24, 768, 0, 0, 0, 0, 50_280, kind="recurrent", tied=True,
        keys={"ssm.conv_kernel": 4, "ssm.inner_size": 1536, "ssm.state_size": 16, "ssm.time_step_rank": 48},
    ),
    "falcon-h1-0.5b": Shape(
        "falcon-h1", 36, 1024, 2048, 8, 2, 64, 32_784, 16_384, kind="both",
        keys={
            "ssm.conv_kernel": 4, "ssm.inner_size": 1536, "ssm.state_size": 128, "ssm.time_step_rank": 24,
            "ssm.group_count": 1,
        },
    ),
}  # fmt: skip


def write(path: Path, name: str) -> Path:
    """Write the model called `name`; the file is sparse and takes some kilobytes."""
    shape = SHAPES[name]
    writer = gguf.GGUFWriter(path, shape.architecture)
    prefix = f"{shape.architecture}."
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.kind == "latent":
        writer.add_expert_weights_scale(1.0)
    elif shape.head:
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.used_experts)
    for key, value in shape.keys.items():
        writer.add_uint32(prefix + key, value)
    size = 0
    for tensor, dimensions, kind in tensors(shape):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(dimensions)) // block * block_bytes
        rows = tuple(reversed(dimensions))
        stored = gguf.quants.quant_shape_to_byte_shape(rows, kind) if kind is QUANTISED else rows
        writer.add_tensor_info(tensor, stored, np.dtype(np.uint8 if kind is QUANTISED else np.float32), nbytes, kind)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    os.truncate(path, start + size)
    return path


def tensors(shape: Shape) -> Iterator[Tensor]:
    """(name, dimensions in ggml's order, type) of every tensor."""
    width = shape.embedding
    yield "token_embd.weight", (width, shape.vocabulary), QUANTISED
    yield "output_norm.weight", (width,), FULL
    if not shape.tied:
        yield "output.weight", (width, shape.vocabulary), QUANTISED
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,), FULL
        for part in _PARTS[shape.kind]:
            yield from ((block + name, dimensions, kind) for name, dimensions, kind in part(shape))


def _attention(shape: Shape) -> Iterator[Tensor]:
    width, queries, pairs = shape.embedding, shape.heads * shape.head, shape.kv_heads * shape.head
    for name, rows in (("q", queries), ("k", pairs), ("v", pairs)):
        yield f"attn_{name}.weight", (width, rows), QUANTISED
        if "bias" in shape.marks:
            yield f"attn_{name}.bias", (rows,), FULL
    yield "attn_output.weight", (queries, width), QUANTISED
    if "qk_norm" in shape.marks:
        yield "attn_q_norm.weight", (shape.head,), FULL
        yield "attn_k_norm.weight", (shape.head,), FULL


def _latent_attention(shape: Shape) -> Iterator[Tensor]:
    width, rank, rope, value = shape.embedding, 512, 64, 128
    yield "attn_q.weight", (width, shape.heads * shape.head), QUANTISED
    yield "attn_kv_a_mqa.weight", (width, rank + rope), QUANTISED
    yield "attn_kv_a_norm.weight", (rank,), FULL
    yield "attn_k_b.weight", (shape.head - rope, rank, shape.heads), QUANTISED
    yield "attn_v_b.weight", (rank, value, shape.heads), QUANTISED
    yield "attn_output.weight", (shape.heads * value, width), QUANTISED


def _feed_forward(shape: Shape) -> Iterator[Tensor]:
    width, inner = shape.embedding, shape.feed_forward
    yield "ffn_norm" if shape.kind == "both" else "ffn_norm.weight", (width,), FULL  # as llama.cpp's converter has it
    if "post_norm" in shape.marks:
        yield "post_attention_norm.weight", (width,), FULL
        yield "post_ffw_norm.weight", (width,), FULL
    if shape.experts:
        each = shape.keys["expert_feed_forward_length"]
        yield "ffn_gate_inp.weight", (width, shape.experts), FULL
        yield "ffn_gate_exps.weight", (width, each, shape.experts), QUANTISED
        yield "ffn_up_exps.weight", (width, each, shape.experts), QUANTISED
        yield "ffn_down_exps.weight", (each, width, shape.experts), QUANTISED
        return
    yield "ffn_gate.weight", (width, inner), QUANTISED
    yield "ffn_up.weight", (width, inner), QUANTISED
    yield "ffn_down.weight", (inner, width), QUANTISED


def _number(shape: Shape, key: str) -> int:
    return shape.keys[f"ssm.{key}"]


def _mamba(shape: Shape) -> Iterator[Tensor]:
    width, inner, state = shape.embedding, _number(shape, "inner_size"), _number(shape, "state_size")
    rank, kernel = _number(shape, "time_step_rank"), _number(shape, "conv_kernel")
    yield "ssm_in.weight", (width, 2 * inner), QUANTISED
    yield "ssm_conv1d.weight", (kernel, inner), FULL
    yield "ssm_conv1d.bias", (inner,), FULL
    yield "ssm_x.weight", (inner, rank + 2 * state), FULL
    yield "ssm_dt.weight", (rank, inner), FULL
    yield "ssm_dt.bias", (inner,), FULL
    yield "ssm_a", (state, inner), FULL
    yield "ssm_d", (inner,), FULL
    yield "ssm_out.weight", (inner, width), QUANTISED


def _mamba2(shape: Shape) -> Iterator[Tensor]:
    width, inner, state = shape.embedding, _number(shape, "inner_size"), _number(shape, "state_size")
    heads, groups, kernel = (_number(shape, key) for key in ("time_step_rank", "group_count", "conv_kernel"))
    mixed = inner + 2 * groups * state
    yield "ssm_in.weight", (width, inner + mixed + heads), QUANTISED
    yield "ssm_conv1d.weight", (kernel, mixed), FULL
    yield "ssm_conv1d.bias", (mixed,), FULL
    yield "ssm_dt.bias", (heads,), FULL
    yield "ssm_a", (1, heads), FULL
    yield "ssm_d", (1, heads), FULL
    yield "ssm_norm.weight", (inner // groups, groups), FULL
    yield "ssm_out.weight", (inner, width), QUANTISED


_PARTS: dict[Kind, tuple[Callable[[Shape], Iterator[Tensor]], ...]] = {
    "attention": (_attention, _feed_forward),
    "recurrent": (_mamba,),
    "both": (_attention, _feed_forward, _mamba2),
    "latent": (_latent_attention, _feed_forward),
}
