"""Writes GGUF models of well under a megabyte with random weights: real files, real kernels, no meaning.

One per architecture family that handles memory differently: `attention` (llama), `sliding` (gemma3, sliding window) and
`recurrent` (mamba). Weights are F32 so that scheduling cannot move logits by rounding. The vocabulary is byte-level BPE
with a few merges and ChatML's special tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

Family = Literal["attention", "sliding", "recurrent"]
FAMILIES: tuple[Family, ...] = ("attention", "sliding", "recurrent")

CONTEXT = 512
# How a context computes the same logits whatever else is in a batch, up to the order of additions.
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
END_OF_TURN = 2
EMBEDDING, _HEADS, _KV_HEADS, _LAYERS, _FEED_FORWARD = 32, 4, 2, 2, 64


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(b for b in range(256) if b not in letters)}
    return [letters[byte] for byte in range(256)]


def byte_token(byte: int) -> int:
    """The token that is this byte alone."""
    return len(SPECIALS) + byte


def _vocabulary(writer: gguf.GGUFWriter, fill: bool) -> int:
    alphabet = _byte_alphabet()
    space = alphabet[32]
    merges = [f"{space} t", "h e", "i n", f"{space}t he", "e r", "o n", "l l", f"{space} a"]
    merged = [merge.replace(" ", "", 1) if not merge.startswith(" ") else merge for merge in merges]
    tokens = [*SPECIALS, *alphabet, *merged]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIALS))
    if fill:
        tokens += FILL
        kinds += [gguf.TokenType.CONTROL] * len(FILL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(END_OF_TURN)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    return len(tokens)


class Weights:
    """Adds named tensors of small random numbers, the same for the same seed."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._random = np.random.default_rng(seed)

    def normal(self, name: str, *shape: int, scale: float = 0.3) -> None:
        self._writer.add_tensor(name, (self._random.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, name: str, value: float, *shape: int) -> None:
        self._writer.add_tensor(name, np.full(shape, value, dtype=np.float32))


def _attention_blocks(weights: Weights, *, gemma: bool) -> None:
    head = EMBEDDING // _HEADS
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        weights.constant(f"{block}.attn_norm.weight", 1, EMBEDDING)
        weights.normal(f"{block}.attn_q.weight", EMBEDDING, EMBEDDING)
        weights.normal(f"{block}.attn_k.weight", head * _KV_HEADS, EMBEDDING)
        weights.normal(f"{block}.attn_v.weight", head * _KV_HEADS, EMBEDDING)
        weights.normal(f"{block}.attn_output.weight", EMBEDDING, EMBEDDING)
        weights.constant(f"{block}.ffn_norm.weight", 1, EMBEDDING)
        weights.normal(f"{block}.ffn_gate.weight", _FEED_FORWARD, EMBEDDING)
        weights.normal(f"{block}.ffn_up.weight", _FEED_FORWARD, EMBEDDING)
        weights.normal(f"{block}.ffn_down.weight", EMBEDDING, _FEED_FORWARD)
        if gemma:
            weights.constant(f"{block}.attn_q_norm.weight", 1, head)
            weights.constant(f"{block}.attn_k_norm.weight", 1, head)
            weights.constant(f"{block}.post_attention_norm.weight", 1, EMBEDDING)
            # ggml looks GELU up in a table of half floats: a rounding of the input may move its output by 1e-3.
            weights.constant(f"{block}.post_ffw_norm.weight", 0.2, EMBEDDING)


def _mamba_blocks(weights: Weights, *, inner: int, state: int, rank: int, kernel: int) -> None:
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        weights.constant(f"{block}.attn_norm.weight", 1, EMBEDDING)
        weights.normal(f"{block}.ssm_in.weight", 2 * inner, EMBEDDING)
        weights.normal(f"{block}.ssm_conv1d.weight", inner, kernel)
        weights.normal(f"{block}.ssm_conv1d.bias", inner)
        weights.normal(f"{block}.ssm_x.weight", rank + 2 * state, inner)
        weights.normal(f"{block}.ssm_dt.weight", inner, rank)
        weights.normal(f"{block}.ssm_dt.bias", inner)
        weights.constant(f"{block}.ssm_a", -1, inner, state)
        weights.constant(f"{block}.ssm_d", 1, inner)
        weights.normal(f"{block}.ssm_out.weight", EMBEDDING, inner)


def write(
    path: Path, family: Family = "attention", *, seed: int = 1, context: int = CONTEXT, fill: bool = False
) -> Path:
    """Write a model of `family` to `path` and return it; `fill`: with the tokens for filling in the middle."""
    architecture = {"attention": "llama", "sliding": "gemma3", "recurrent": "mamba"}[family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny-{family}")
    writer.add_context_length(context)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(_LAYERS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = _vocabulary(writer, fill)
    weights = Weights(writer, seed)
    weights.normal("token_embd.weight", vocabulary, EMBEDDING)
    weights.constant("output_norm.weight", 1, EMBEDDING)
    if family == "recurrent":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * EMBEDDING)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)
        writer.add_layer_norm_rms_eps(1e-5)
        _mamba_blocks(weights, inner=2 * EMBEDDING, state=8, rank=4, kernel=4)
    else:
        writer.add_feed_forward_length(_FEED_FORWARD)
        writer.add_head_count(_HEADS)
        writer.add_head_count_kv(_KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(EMBEDDING // _HEADS)
        if family == "sliding":
            writer.add_key_length(EMBEDDING // _HEADS)
            writer.add_value_length(EMBEDDING // _HEADS)
            writer.add_sliding_window(64)
        else:
            writer.add_vocab_size(vocabulary)
            weights.normal("output.weight", vocabulary, EMBEDDING)
        _attention_blocks(weights, gemma=family == "sliding")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
