"""An image projector: the part of a model that turns pictures into embeddings in the place of tokens (libmtmd)."""

from __future__ import annotations

import ctypes
import hashlib
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ocserve.engine.bindings import LlamaError, load_mtmd
from ocserve.engine.context import Embeddings
from ocserve.engine.images import Picture
from ocserve.engine.llama import SILENT, LoadLog, Model, supports_gpu_offload

# Of the pictures that wait with all that is computed from them, in all prompts together: 400 MB at most.
HELD_TOKENS = 8192


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Tile:
    """A picture, or a part of one, ready to be encoded: it takes the place of `tokens` tokens.

    `key` names its content, and so do its `ids`, which stand for it where prompts are compared; all are below 0. The
    tokens of a `whole` one attend to each other in both directions.
    """

    key: bytes
    ids: tuple[int, ...]
    whole: bool
    pixels: Pixels
    index: int  # among the chunks of its picture

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Pixels:
    """What a projector computes the tiles of one picture from: 3 to 49 kB for each token.

    Given up once all of them are encoded, or at once where too much is held: then the picture is divided again when it
    is its turn. Used by one thread at a time.
    """

    def __init__(
        self, held: dict[int, int], tokens: int, shown: set[int], chunks: _Chunks, again: Callable[[], _Chunks]
    ) -> None:
        """`held` are the tokens of those that are held, by their `id`s; `shown` are the chunks that are tiles."""
        self._held = held
        self._tokens = tokens
        self._again = again
        self._unseen = shown
        self._chunks: _Chunks | None = None
        weakref.finalize(self, held.pop, id(self), None)
        if sum(list(held.values())) + tokens <= HELD_TOKENS:
            self._hold(chunks)

    def chunks(self) -> _Chunks:
        """All chunks of the picture; they live as long as this answer does."""
        return self._hold(self._again()) if self._chunks is None else self._chunks

    def encoded(self, index: int) -> None:
        """One of the chunks is not needed any more."""
        self._unseen.discard(index)
        if not self._unseen:
            self._chunks = None
            self._held.pop(id(self), None)

    def _hold(self, chunks: _Chunks) -> _Chunks:
        self._chunks = chunks
        self._held[id(self)] = self._tokens
        return chunks


class Projector:
    """A loaded projector. It is never freed: the process ends instead.

    `divide` may be called beside `encode`, which belongs to one thread and may divide too.
    """

    def __init__(self, path: str, model: Model, *, threads: int, use_gpu: bool, log: LoadLog) -> None:
        """Raises `LlamaError` for a file that is no projector of images for this model."""
        self._api = api = load_mtmd()
        api.mtmd_helper_log_set(log.callback, None)
        parameters = api.mtmd_context_params_default()
        parameters.use_gpu = use_gpu and supports_gpu_offload()
        parameters.n_threads = threads
        parameters.print_timings = False
        self._context = api.mtmd_init_from_file(path.encode(), model.pointer, parameters)
        api.mtmd_helper_log_set(SILENT, None)  # from now on it could only speak about requests
        if not self._context:
            raise LlamaError("llama.cpp could not load the image projector: " + " | ".join(log.lines[-6:]))
        if not api.mtmd_support_vision(self._context):
            raise LlamaError("the projector is not one for images")
        if api.mtmd_decode_use_mrope(self._context):
            raise LlamaError(
                "images of this model take positions in two dimensions (M-RoPE), which this version does not offer; "
                "without its projector the model can be served for text"
            )
        self._mark = api.mtmd_default_marker()
        self._width = model.embedding_length
        self._whole = bool(api.mtmd_decode_use_non_causal(self._context, None))
        self._held: dict[int, int] = {}

    def divide(self, picture: Picture, again: Callable[[], Picture]) -> list[tuple[int, ...] | Tile]:
        """What stands for the picture in a prompt: tiles, and the tokens that the model wants around them.

        `again` gives the same picture, should it be wanted later. Raises `LlamaError` where the projector cannot take
        it.
        """
        api = self._api
        chunks = self._cut(picture)
        parts: list[tuple[int, ...] | Tile] = []
        digest, shown = picture.digest, []
        for index in range(len(chunks)):
            chunk = chunks.at(index)
            kind = api.mtmd_input_chunk_get_type(chunk)
            tokens = api.mtmd_input_chunk_get_n_tokens(chunk)
            if kind == api.MTMD_INPUT_CHUNK_TYPE_TEXT:
                parts.append(tuple(api.mtmd_input_chunk_get_tokens_text(chunk, ctypes.c_size_t())[:tokens]))
            elif kind != api.MTMD_INPUT_CHUNK_TYPE_IMAGE or api.mtmd_input_chunk_get_n_pos(chunk) != tokens:
                raise LlamaError("the projector answered with what is no image")
            else:
                parts.append(())
                shown.append((len(parts) - 1, index, tokens))
        pixels = Pixels(
            self._held,
            sum(tokens for _, _, tokens in shown),
            {index for _, index, _ in shown},
            chunks,
            lambda: self._cut(again()),
        )
        for place, index, tokens in shown:
            key = digest + index.to_bytes(4)
            parts[place] = Tile(key, image_ids(key, tokens), self._whole, pixels, index)
        return parts

    def _cut(self, picture: Picture) -> _Chunks:
        api = self._api
        data = np.frombuffer(picture.rgb, np.uint8)
        bitmap = api.mtmd_bitmap_init(picture.width, picture.height, data.ctypes.data_as(_BYTES))
        chunks = _Chunks(api)
        text = api.mtmd_input_text(self._mark, len(self._mark), False, True)
        code = api.mtmd_tokenize(self._context, chunks.pointer, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1)
        api.mtmd_bitmap_free(bitmap)
        if code != 0:
            raise LlamaError("the projector could not take the picture")
        return chunks

    def encode(self, tile: Tile) -> Embeddings:
        """The embeddings of a tile; on a processor that may take seconds. Raises `LlamaError`."""
        chunks = tile.pixels.chunks()
        if self._api.mtmd_encode_chunk(self._context, chunks.at(tile.index)) != 0:
            raise LlamaError("the projector could not compute the image")
        pointer = self._api.mtmd_get_output_embd(self._context)
        if not pointer:
            raise LlamaError("the projector gave no embeddings")
        tile.pixels.encoded(tile.index)
        return np.ctypeslib.as_array(pointer, shape=(tile.tokens, self._width)).copy()


def image_ids(key: bytes, count: int) -> tuple[int, ...]:
    """Numbers below 0 that stand for the tokens of an image: 31 bits each of what SHAKE-128 makes of its key.

    Too few to tell two images apart for certain are drawn at random: such an image is never found in memory again.
    """
    if count < _CERTAIN:
        key = secrets.token_bytes(16)
    bits = np.frombuffer(hashlib.shake_128(key).digest(4 * count), "<u4") >> 1
    return tuple((-1 - bits.astype(np.int64)).tolist())


class _Chunks:
    """Owns what libmtmd made of one picture."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.pointer = api.mtmd_input_chunks_init()
        weakref.finalize(self, api.mtmd_input_chunks_free, self.pointer)

    def __len__(self) -> int:
        return int(self._api.mtmd_input_chunks_size(self.pointer))

    def at(self, index: int) -> ctypes.c_void_p:
        """One of them; it lives as long as this object."""
        chunk: ctypes.c_void_p = self._api.mtmd_input_chunks_get(self.pointer, index)
        return chunk


_CERTAIN = 4  # ids that are 124 bits together
_BYTES = ctypes.POINTER(ctypes.c_uint8)
