"""The real all-MiniLM-L6-v2 against its published equations, its authors' tokenizer, and common sense."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from ocserve.engine import llama, wire
from ocserve.engine.context import KV_TYPES
from ocserve.engine.embedding import Embedder
from ocserve.engine.embedding_context import Pooling, PoolingContext
from ocserve.engine.embedding_inputs import InputEncoder
from ocserve.generation import Embedded, EmbedRequest, TextPrompt
from tests import minilm as writer
from tests.conftest import MiniLm
from tests.engine.scripted_worker import FACTS

# Ids by the `tokenizers` library (0.23.3) from the model's own tokenizer.json.
TOKENISED: dict[str, tuple[int, ...]] = {
    "The quick brown fox jumps over the lazy dog.": (
        101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102,
    ),
    "Héllo Wörld! naïve café": (101, 7592, 2088, 999, 15743, 7668, 102),
    "東京は日本の首都です": (101, 1879, 1755, 1672, 1864, 1876, 1671, 100, 1961, 1665, 30184, 102),
    "emoji 🙂 and\ttabs\n\nnewlines": (101, 7861, 29147, 2072, 100, 1998, 21628, 2015, 2047, 12735, 102),
    "internationalization uncharacteristically": (101, 2248, 3989, 4895, 7507, 22648, 3334, 6553, 3973, 102),
    "don't stop: a+b=c; x/y, 3.14 (100%)": (
        101, 2123, 1005, 1056, 2644, 1024, 1037, 1009, 1038, 1027, 1039, 1025, 1060, 1013, 1061, 1010, 1017, 1012, 2403,
        1006, 2531, 1003, 1007, 102,
    ),
    "ﬁne ½ ① Ａ": (101, 1984, 2638, 1092, 100, 100, 102),
    "def f(x):\n    return x**2  # square": (
        101, 13366, 1042, 1006, 1060, 1007, 1024, 2709, 1060, 1008, 1008, 1016, 1001, 2675, 102,
    ),
    "a\u0301 e\u0301 \u200b zero width": (101, 1037, 1041, 5717, 9381, 102),
}  # fmt: skip
FAMILIES = (
    ("A cat is sleeping on the sofa.", "The kitten naps on the couch.", "A small feline rests on the settee."),
    ("The central bank raised interest rates.", "Borrowing costs went up after the bank's decision.",
     "Monetary policy was tightened again."),
    ("How do I install a Python package?", "Use pip to add a library to your environment.",
     "Installing Python modules from the package index"),
    ("It will rain heavily tomorrow.", "The forecast predicts storms for the next day.", "Expect showers and thunder."),
)  # fmt: skip

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Model:
    """The model in this process."""

    def __init__(self, files: MiniLm) -> None:
        log = llama.LoadLog()
        self.model = llama.Model(str(files.path), gpu_layers=0, log=log)
        self.context = PoolingContext(
            self.model, context=512, batch_tokens=256, sequences=64, threads=2, kv_type=KV_TYPES["f16"]
        )
        log.close()
        self._replies: SimpleQueue[Any] = SimpleQueue()
        encoder = InputEncoder(self.model.vocab, context=512)
        self.embedder = Embedder(
            self.context, encoder, facts=FACTS, reply=lambda name, answer: self._replies.put(answer)
        )
        for target in (self.embedder.prepare, self.embedder.compute):
            threading.Thread(target=target, daemon=True).start()

    def vectors(self, *texts: str) -> list[Vector]:
        inputs = tuple(TextPrompt(text=text) for text in texts)
        self.embedder.handle(wire.Ask(question=EmbedRequest(request_id="r", model="m", inputs=inputs)))
        answer = self._replies.get(timeout=60)
        assert isinstance(answer, Embedded), answer
        return [np.frombuffer(vector, "<f4") for vector in answer.vectors]


@pytest.fixture(scope="module")
def model(minilm: MiniLm) -> Iterator[Model]:
    made = Model(minilm)
    yield made
    made.embedder.stop()


def test_the_file_says_how_it_is_to_be_used(model: Model) -> None:
    assert (model.context.pooling, model.context.dimensions, model.context.splits) == (Pooling.MEAN, 384, False)


@pytest.mark.parametrize("text", TOKENISED)
def test_texts_are_tokenised_as_its_authors_do(model: Model, text: str) -> None:
    assert tuple(model.model.vocab.tokenize(text, parse_special=False, framed=True)) == TOKENISED[text]


def test_vectors_are_those_of_the_published_equations(model: Model, minilm: MiniLm) -> None:
    weights = writer.weights(minilm.source / "model.safetensors")
    for text, vector in zip(TOKENISED, model.vectors(*TOKENISED), strict=True):
        expected = writer.reference(weights, TOKENISED[text])
        assert float(vector @ expected) > 0.9999, text
        np.testing.assert_allclose(vector, expected, atol=2e-3)


def test_batches_of_all_sizes_give_the_same_vectors(model: Model) -> None:
    texts = [" ".join(["word", str(n), "and more of it"] * (n % 17 + 1)) for n in range(70)]
    together = model.vectors(*texts)
    for text, vector in list(zip(texts, together, strict=True))[::7]:
        (alone,) = model.vectors(text)
        assert float(vector @ alone) > 0.99999


def test_what_means_the_same_lies_nearer_than_what_does_not(model: Model) -> None:
    vectors = np.array(model.vectors(*(text for family in FAMILIES for text in family)))
    families = np.repeat(np.arange(len(FAMILIES)), len(FAMILIES[0]))
    likeness = vectors @ vectors.T
    for index, family in enumerate(families):
        others = likeness[index][families != family].max()
        mine = np.delete(likeness[index][families == family], index % len(FAMILIES[0])).max()
        assert mine > others + 0.1
