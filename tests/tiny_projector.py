"""Writes image projectors of a few kilobytes with random weights, for the models that `tests.tiny` writes.

`causal` is LLaVA's (a vision transformer and two matrices), `whole` Gemma 3's, whose images attend in both directions
and are bracketed by two texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf

from tests.tiny import EMBEDDING, Weights

Kind = Literal["causal", "whole"]
SIDE, PATCH = 32, 4  # pixels
_WIDTH, _HEADS, _LAYERS = 16, 2, 2
# What one image becomes; Gemma 3 pools squares of two by two patches here.
TOKENS: dict[Kind, int] = {"causal": (SIDE // PATCH) ** 2, "whole": (SIDE // PATCH // 2) ** 2}


def write(path: Path, kind: Kind = "causal", *, seed: int = 1, embedding: int = EMBEDDING) -> Path:
    """Write a projector for a text model of `embedding` numbers a token, and return its path."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", {"causal": "mlp", "whole": "gemma3"}[kind])
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for name, number in {
        "image_size": SIDE, "patch_size": PATCH, "embedding_length": _WIDTH, "feed_forward_length": 2 * _WIDTH,
        "block_count": _LAYERS, "projection_dim": embedding, "attention.head_count": _HEADS,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    weights = Weights(writer, seed)
    weights.normal("v.patch_embd.weight", _WIDTH, 3, PATCH, PATCH)
    weights.normal("v.position_embd.weight", (SIDE // PATCH) ** 2, _WIDTH)
    for layer in range(_LAYERS):
        _block(weights, f"v.blk.{layer}")
    weights.constant("v.post_ln.weight", 1, _WIDTH)
    weights.constant("v.post_ln.bias", 0, _WIDTH)
    if kind == "causal":
        weights.normal("mm.0.weight", embedding, _WIDTH)
        weights.constant("mm.0.bias", 0, embedding)
        weights.normal("mm.2.weight", embedding, embedding)
        weights.constant("mm.2.bias", 0, embedding)
    else:
        writer.add_uint32("clip.vision.projector.scale_factor", 2)
        weights.normal("mm.input_projection.weight", _WIDTH, embedding)
        weights.constant("mm.soft_emb_norm.weight", 1, _WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _block(weights: Weights, block: str) -> None:
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        weights.normal(f"{block}.{name}.weight", _WIDTH, _WIDTH)
        weights.constant(f"{block}.{name}.bias", 0, _WIDTH)
    for name in ("ln1", "ln2"):
        weights.constant(f"{block}.{name}.weight", 1, _WIDTH)
        weights.constant(f"{block}.{name}.bias", 0, _WIDTH)
    # The files of these families call the two matrices by each other's name.
    weights.normal(f"{block}.ffn_down.weight", 2 * _WIDTH, _WIDTH)
    weights.constant(f"{block}.ffn_down.bias", 0, 2 * _WIDTH)
    weights.normal(f"{block}.ffn_up.weight", _WIDTH, 2 * _WIDTH)
    weights.constant(f"{block}.ffn_up.bias", 0, _WIDTH)
