"""Models of every kind that a listing must describe."""

from __future__ import annotations

from msgspec.structs import replace

from ocserve.modelcard import Prices, ServedModel
from tests.http.harness import MODEL

PRICED = replace(MODEL, prices=Prices(prompt="0.00000002", completion="0.00000006", cached_prompt="0.00000001"))
PRICED_BY_THE_PIECE = replace(
    MODEL,
    id="priced",
    input_modalities=("text", "image"),
    prices=Prices(prompt="0.1", completion="0.2", cache_write="0.3", image="0.4", request="0.5"),
)
TOOLS = replace(
    MODEL,
    id="org/tools",
    aliases=(),
    quantisation="Q5_K_M",
    capabilities=("chat", "completion", "tools", "reasoning"),
    architecture="qwen3",
    size_bytes=5_000_000_000,
    digest="ab" * 32,
    card=replace(
        MODEL.card,
        hugging_face_id="org/Tools-8B",
        summary="Calls functions.",
        publisher="Org",
        parameters=8_190_735_360,
        family="qwen3",
    ),
)
VISION = replace(MODEL, id="vision", quantisation="BF16", input_modalities=("text", "image"))
BASE = replace(MODEL, id="base", quantisation="F32", capabilities=("completion", "fim"))
EMBEDDING = replace(
    MODEL, id="embedding", quantisation="Q8_0", capabilities=("embedding",), output_modalities=("embedding",)
)
RERANKER = replace(
    EMBEDDING, id="reranker", capabilities=("rerank",), output_modalities=("rerank",), max_output_tokens=0
)
ALL: tuple[ServedModel, ...] = (MODEL, PRICED, PRICED_BY_THE_PIECE, TOOLS, VISION, BASE, EMBEDDING, RERANKER)
