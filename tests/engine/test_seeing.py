"""The thread that encodes images outlives whatever an encoder raises."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Embeddings
from ocserve.engine.seeing import Sight
from ocserve.engine.vision import Tile


@pytest.mark.parametrize("error", [LlamaError("no"), MemoryError(), ValueError("NULL pointer access")])
def test_an_image_that_cannot_be_encoded_is_told_and_the_next_one_is_tried(error: Exception) -> None:
    told = threading.Event()

    class Broken:
        def encode(self, tile: Tile) -> Embeddings:
            raise error

    sight = Sight(Broken(), told.set)
    threading.Thread(target=sight.run, daemon=True).start()
    for name in (b"one", b"other"):
        sequence: Any = SimpleNamespace(
            next_image=SimpleNamespace(tile=SimpleNamespace(key=name)), words_ahead=0, tenant=b"a"
        )
        assert sight.ready([sequence]) == ([], [])
        assert told.wait(10)
        told.clear()
        assert sight.ready([sequence]) == ([], [sequence])
