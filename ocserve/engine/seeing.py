"""Encoding images beside the decode loop: one thread turns tiles into embeddings, which the loop takes as they come.

Encoding takes seconds on a processor. In the loop every stream would wait for it; here they go on, slowed down only by
sharing the processor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from functools import partial
from typing import Protocol
from weakref import WeakSet

from ocserve.engine.context import Context, DecodeStatus, Embeddings
from ocserve.engine.slots import Sequence, Shown
from ocserve.engine.vision import Tile

# Embeddings that are kept for the next prompt with the same image whose cells are gone: 50 images of Gemma 3 4B.
KEPT_BYTES = 128 * 1024 * 1024

Key = tuple[bytes, bytes]  # tenant, content: nobody is to notice what others have sent


class Encodes(Protocol):
    """A projector."""

    def encode(self, tile: Tile) -> Embeddings:
        """Raises `LlamaError`."""


class Sight:
    """Embeddings of the tiles that are wanted. `ready` and `look` are for the loop's thread, `run` is the other's."""

    def __init__(self, projector: Encodes, on_seen: Callable[[], None], *, kept_bytes: int = KEPT_BYTES) -> None:
        """`on_seen` is called when another of the wanted tiles has been encoded, or could not be."""
        self._projector = projector
        self._on_seen = on_seen
        self._kept_bytes = kept_bytes
        self._turn = threading.Condition()
        self._wanted: dict[Key, Tile] = {}
        self._seen: OrderedDict[Key, Embeddings] = OrderedDict()  # least recently used first
        self._failed: WeakSet[Tile] = WeakSet()  # another request with the same image has its own try
        self._bytes = 0

    def ready(self, prompts: Ordered[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        """Those that need not wait for an image now, and those of which one cannot be encoded.

        What the prompts come to next is encoded from now on, in their order, and nothing else.
        """
        ready, failed, wanted = [], [], {}
        with self._turn:
            for sequence in prompts:
                image = sequence.next_image
                if image is None:
                    ready.append(sequence)
                    continue
                key = _key(sequence, image)
                if image.tile in self._failed:
                    failed.append(sequence)
                    continue
                wanted[key] = image.tile
                if sequence.words_ahead or key in self._seen:
                    ready.append(sequence)
            self._wanted = wanted
            self._turn.notify()
        return ready, failed

    def look(self, sequence: Sequence) -> Embeddings | None:
        """The embeddings of the image that comes next in a prompt, None where they are not there."""
        image = sequence.next_image
        key = _key(sequence, image) if image is not None else None
        with self._turn:
            if key is None or key not in self._seen:
                return None
            self._seen.move_to_end(key)
            return self._seen[key]

    def run(self) -> None:
        """Encode for ever; the thread's target."""
        while True:
            with self._turn:
                self._turn.wait_for(self._next)
                key, tile = self._next()[0]
            try:
                found = self._projector.encode(tile)
            except Exception:  # noqa: BLE001  # whatever it was, who waits for this image must hear of it
                with self._turn:
                    self._failed.add(tile)
                    self._wanted.pop(key, None)
            else:
                with self._turn:
                    self._keep(key, found)
            del tile  # and with it the file: nobody may want another one for long
            self._on_seen()

    def _next(self) -> list[tuple[Key, Tile]]:
        """The tile to encode next, if there is one."""
        return next(([(key, tile)] for key, tile in self._wanted.items() if key not in self._seen), [])

    def _keep(self, key: Key, found: Embeddings) -> None:
        self._seen[key] = found
        self._bytes += found.nbytes
        for other in list(self._seen):
            if self._bytes <= self._kept_bytes:
                break
            if other not in self._wanted:
                self._bytes -= self._seen.pop(other).nbytes


def computations(
    context: Context, sequence: Sequence, image: Shown, rows: Embeddings
) -> Iterator[tuple[Callable[[], DecodeStatus], int]]:
    """The batches that compute an image of a prompt, one after the other: how, and of how many rows."""
    assert sequence.slot is not None
    for begin in range(0, len(rows), context.batch_tokens):
        batch = rows[begin : begin + context.batch_tokens]
        last, whole = image.end == sequence.length, image.tile.whole
        yield (
            partial(context.decode_embeddings, batch, image.begin + begin, sequence.slot, logits=last, whole=whole),
            len(batch),
        )


def _key(sequence: Sequence, image: Shown) -> Key:
    return sequence.tenant, image.tile.key
