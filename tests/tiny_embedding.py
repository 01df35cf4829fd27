"""Embedding and reranking models of well under a megabyte with random F32 weights: real kernels, no meaning.

`encoder` (bert, mean of all tokens), `reranker` (bert with a classifier of one class), `decoder` (qwen3, which reads
from left to right, so that the last token counts) and `judge` (qwen3 with a classifier of two, and a layout of its own
for query and document), as the known models of these kinds are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf

from tests import tiny

Kind = Literal["encoder", "reranker", "decoder", "judge"]

CONTEXT = 64
DIMENSIONS, HEADS, LAYERS, FEED_FORWARD = 32, 4, 2, 64
JUDGE_LAYOUT = "<|im_start|>query: {query} document: {document}<|im_end|>"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = 2, 3


def write(path: Path, kind: Kind, *, seed: int = 1, context: int = CONTEXT, vocabulary: int = 0) -> Path:
    """Write a model to `path` and return it; `vocabulary` adds so many words that no text has."""
    is_bert = kind in ("encoder", "reranker")
    writer = gguf.GGUFWriter(path, "bert" if is_bert else "qwen3")
    writer.add_name(f"tiny-{kind}")
    writer.add_context_length(context)
    writer.add_embedding_length(DIMENSIONS)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    weights = tiny.Weights(writer, seed)
    if is_bert:
        _bert(writer, weights, kind, context, vocabulary)
    else:
        _qwen3(writer, weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _bert(writer: gguf.GGUFWriter, weights: tiny.Weights, kind: Kind, context: int, unused: int) -> None:
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if kind == "reranker" else gguf.PoolingType.MEAN)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    # A letter begins a word ("▁a") or goes on with one ("a").
    words = [*WORDS, *(f"\u2581{letter}" for letter in letters), *letters, *(f"\u2581[u{n}]" for n in range(unused))]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(words) - 5))
    writer.add_token_type_count(1)
    writer.add_bos_token_id(CLS)
    writer.add_eos_token_id(SEP)
    writer.add_sep_token_id(SEP)
    weights.normal("token_embd.weight", len(words), DIMENSIONS)
    weights.normal("token_types.weight", 1, DIMENSIONS)
    weights.normal("position_embd.weight", context, DIMENSIONS)
    _norm(weights, "token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            _dense(weights, f"{block}.{name}", DIMENSIONS, DIMENSIONS)
        _norm(weights, f"{block}.attn_output_norm")
        _dense(weights, f"{block}.ffn_up", FEED_FORWARD, DIMENSIONS)
        _dense(weights, f"{block}.ffn_down", DIMENSIONS, FEED_FORWARD)
        _norm(weights, f"{block}.layer_output_norm")
    if kind == "reranker":
        _dense(weights, "cls", DIMENSIONS, DIMENSIONS)
        _dense(weights, "cls.output", 1, DIMENSIONS)


def _qwen3(writer: gguf.GGUFWriter, weights: tiny.Weights, kind: Kind) -> None:
    head = DIMENSIONS // HEADS
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_pooling_type(gguf.PoolingType.RANK if kind == "judge" else gguf.PoolingType.LAST)
    weights.normal("token_embd.weight", tiny._vocabulary(writer, False), DIMENSIONS)
    writer.add_add_eos_token(kind == "decoder")
    weights.constant("output_norm.weight", 1, DIMENSIONS)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        weights.constant(f"{block}.attn_norm.weight", 1, DIMENSIONS)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights.normal(f"{block}.{name}.weight", DIMENSIONS, DIMENSIONS)
        weights.constant(f"{block}.attn_q_norm.weight", 1, head)
        weights.constant(f"{block}.attn_k_norm.weight", 1, head)
        weights.constant(f"{block}.ffn_norm.weight", 1, DIMENSIONS)
        weights.normal(f"{block}.ffn_gate.weight", FEED_FORWARD, DIMENSIONS)
        weights.normal(f"{block}.ffn_up.weight", FEED_FORWARD, DIMENSIONS)
        weights.normal(f"{block}.ffn_down.weight", DIMENSIONS, FEED_FORWARD)
    if kind == "judge":
        writer.add_classifier_output_labels(["yes", "no"])
        weights.normal("cls.output.weight", 2, DIMENSIONS)
        writer.add_string("tokenizer.chat_template.rerank", JUDGE_LAYOUT)


def _dense(weights: tiny.Weights, name: str, outputs: int, inputs: int) -> None:
    weights.normal(f"{name}.weight", outputs, inputs)
    weights.normal(f"{name}.bias", outputs)


def _norm(weights: tiny.Weights, name: str) -> None:
    weights.constant(f"{name}.weight", 1, DIMENSIONS)
    weights.constant(f"{name}.bias", 0, DIMENSIONS)
