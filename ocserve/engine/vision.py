"""An image projector: the part of a model that turns pictures into embeddings in the place of tokens (libmtmd)."""

from __future__ import annotations

import ctypes
import hashlib
import secrets
import weakref
from dataclasses import dataclass

import numpy as np

from ocserve.engine.bindings import LlamaError, load_mtmd
from ocserve.engine.context import Embeddings
from ocserve.engine.images import Picture
from ocserve.engine.llama import SILENT, LoadLog, Model, supports_gpu_offload


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Tile:
    """A picture, or a part of one, ready to be encoded: it takes the place of `tokens` tokens.

    `key` names its content, and so do its `ids`, which stand for it where prompts are compared; all are below 0. The
    tokens of a `whole` one attend to each other in both directions.
    """

    key: bytes
    ids: tuple[int, ...]
    whole: bool
    chunk: ctypes.c_void_p
    chunks: object  # owns `chunk`

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Projector:
    """A loaded projector. It is never freed: the process ends instead.

    `divide` may be called beside `encode`, which belongs to one thread.
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

    def divide(self, picture: Picture) -> list[tuple[int, ...] | Tile]:
        """What stands for the picture in a prompt: tiles, and the tokens that the model wants around them.

        Raises `LlamaError` where the projector cannot take it.
        """
        api = self._api
        pixels = np.frombuffer(picture.rgb, np.uint8)
        bitmap = api.mtmd_bitmap_init(picture.width, picture.height, pixels.ctypes.data_as(_BYTES))
        chunks = api.mtmd_input_chunks_init()
        owner = _Owner()
        weakref.finalize(owner, api.mtmd_input_chunks_free, chunks)
        text = api.mtmd_input_text(self._mark, len(self._mark), False, True)
        code = api.mtmd_tokenize(self._context, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1)
        api.mtmd_bitmap_free(bitmap)
        if code != 0:
            raise LlamaError("the projector could not take the picture")
        parts: list[tuple[int, ...] | Tile] = []
        digest = picture.digest
        for index in range(api.mtmd_input_chunks_size(chunks)):
            chunk = api.mtmd_input_chunks_get(chunks, index)
            kind = api.mtmd_input_chunk_get_type(chunk)
            tokens = api.mtmd_input_chunk_get_n_tokens(chunk)
            if kind == api.MTMD_INPUT_CHUNK_TYPE_TEXT:
                parts.append(tuple(api.mtmd_input_chunk_get_tokens_text(chunk, ctypes.c_size_t())[:tokens]))
            elif kind != api.MTMD_INPUT_CHUNK_TYPE_IMAGE or api.mtmd_input_chunk_get_n_pos(chunk) != tokens:
                raise LlamaError("the projector answered with what is no image")
            else:
                key = digest + index.to_bytes(4)
                parts.append(Tile(key, image_ids(key, tokens), self._whole, chunk, owner))
        return parts

    def encode(self, tile: Tile) -> Embeddings:
        """The embeddings of a tile; on a processor that may take seconds. Raises `LlamaError`."""
        if self._api.mtmd_encode_chunk(self._context, tile.chunk) != 0:
            raise LlamaError("the projector could not compute the image")
        pointer = self._api.mtmd_get_output_embd(self._context)
        if not pointer:
            raise LlamaError("the projector gave no embeddings")
        return np.ctypeslib.as_array(pointer, shape=(tile.tokens, self._width)).copy()


def image_ids(key: bytes, count: int) -> tuple[int, ...]:
    """Numbers below 0 that stand for the tokens of an image: 31 bits each of what SHAKE-128 makes of its key.

    Too few to tell two images apart for certain are drawn at random: such an image is never found in memory again.
    """
    if count < _CERTAIN:
        key = secrets.token_bytes(16)
    bits = np.frombuffer(hashlib.shake_128(key).digest(4 * count), "<u4") >> 1
    return tuple((-1 - bits.astype(np.int64)).tolist())


class _Owner:
    """Keeps the chunks of one picture alive while any of its tiles is."""

    __slots__ = ("__weakref__",)


_CERTAIN = 4  # ids that are 124 bits together
_BYTES = ctypes.POINTER(ctypes.c_uint8)
