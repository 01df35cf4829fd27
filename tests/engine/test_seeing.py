"""The thread that encodes images outlives whatever an encoder raises."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Embeddings
from ocserve.engine.seeing import Sight
from ocserve.engine.vision import Tile


class Shows:
    """A tile of which only the content's name matters."""

    def __init__(self, key: bytes) -> None:
        self.key = key


def awaiting(tile: Shows) -> Any:
    return SimpleNamespace(next_image=SimpleNamespace(tile=tile), words_ahead=0, tenant=b"a")


@pytest.mark.parametrize("error", [LlamaError("no"), MemoryError(), ValueError("NULL pointer access")])
def test_an_image_that_cannot_be_encoded_is_told_and_the_next_one_is_tried(error: Exception) -> None:
    told = threading.Event()

    class Broken:
        def encode(self, tile: Tile) -> Embeddings:
            raise error

    sight = Sight(Broken(), told.set)
    threading.Thread(target=sight.run, daemon=True).start()
    for name in (b"one", b"other"):
        sequence = awaiting(Shows(name))
        assert sight.ready([sequence]) == ([], [])
        assert told.wait(10)
        told.clear()
        assert sight.ready([sequence]) == ([], [sequence])


def test_a_failure_waits_for_its_own_sequence_and_is_nobody_elses() -> None:
    """The loop asks for some prompts at a time: one may be without its cells when its image fails."""
    told = threading.Event()

    class Broken:
        def encode(self, tile: Tile) -> Embeddings:
            if tile.key == b"one":
                raise LlamaError("no")
            return np.zeros((1, 1), np.float32)

    sight = Sight(Broken(), told.set)
    threading.Thread(target=sight.run, daemon=True).start()
    failing, other, again = awaiting(Shows(b"one")), awaiting(Shows(b"other")), awaiting(Shows(b"one"))
    assert sight.ready([failing]) == ([], [])
    assert told.wait(10)
    told.clear()
    assert sight.ready([other]) == ([], [])
    assert told.wait(10)
    told.clear()
    assert sight.ready([other, again]) == ([other], [])  # another request with the same image has its own try
    assert told.wait(10)
    assert sight.ready([failing, other, again]) == ([other], [failing, again])
