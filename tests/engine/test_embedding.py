"""Embedding and reranking: what is computed, in which batches, and what is refused."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ocserve.engine import llama, wire
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import KV_TYPES
from ocserve.engine.embedding import Embedder, Job, Part, compose
from ocserve.engine.embedding_context import PoolingContext
from ocserve.engine.embedding_inputs import InputEncoder
from ocserve.errors import ApiError, EngineFailed, InputTooLong, InvalidRequest
from ocserve.generation import (
    Answer,
    ChatPrompt,
    Embedded,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    Question,
    Scored,
    ScoreRequest,
    TextPrompt,
    TokenPrompt,
)
from tests import tiny, tiny_embedding
from tests.engine.scripted_worker import FACTS
from tests.tiny_embedding import CLS, CONTEXT, DIMENSIONS, SEP, Kind

# Flash attention reads keys and values in F16 and sums in an order that follows the batch.
NOISE = 1e-3
KINDS: tuple[Kind, ...] = ("encoder", "reranker", "decoder", "judge")


class Running:
    """An embedder with its threads, as the engine process runs it."""

    def __init__(self, path: Path, *, batch_tokens: int = CONTEXT, sequences: int = 8) -> None:
        log = llama.LoadLog()
        model = llama.Model(str(path), gpu_layers=0, log=log)
        self.context = PoolingContext(
            model,
            context=CONTEXT,
            batch_tokens=batch_tokens,
            sequences=sequences,
            threads=1,
            kv_type=KV_TYPES["f32"],
        )
        log.close()
        template = model.metadata("tokenizer.chat_template.rerank")
        self.encoder = InputEncoder(model.vocab, context=CONTEXT, template=template)
        self.replies: SimpleQueue[tuple[str, Answer | ApiError]] = SimpleQueue()
        self.embedder = Embedder(
            self.context, self.encoder, facts=FACTS, reply=lambda name, answer: self.replies.put((name, answer))
        )
        threading.Thread(target=self.embedder.prepare, daemon=True).start()
        self._computing = threading.Thread(target=self.embedder.compute, daemon=True)
        self._computing.start()

    def ask(self, question: Question) -> Answer | ApiError:
        self.embedder.handle(wire.Ask(question=question))
        name, answer = self.replies.get(timeout=20)
        assert name == question.request_id
        return answer

    def embed(self, *inputs: str | tuple[int, ...], **options: Any) -> Embedded:
        answer = self.ask(embed(*inputs, **options))
        assert isinstance(answer, Embedded), answer
        return answer

    def score(self, query: str, *documents: str) -> Scored:
        answer = self.ask(ScoreRequest(request_id="s", model="m", query=query, documents=documents))
        assert isinstance(answer, Scored), answer
        return answer

    def stop(self) -> None:
        self.embedder.stop()
        self._computing.join(10)
        assert not self._computing.is_alive()


def embed(*inputs: str | tuple[int, ...], name: str = "e", **options: Any) -> EmbedRequest:
    prompts = tuple(TextPrompt(text=each) if isinstance(each, str) else TokenPrompt(tokens=each) for each in inputs)
    return EmbedRequest(request_id=name, model="m", inputs=prompts, **options)


def vectors(answer: Embedded) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    return [np.frombuffer(vector, "<f4") for vector in answer.vectors]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("embedding")
    return {kind: tiny_embedding.write(folder / f"{kind}.gguf", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def running(models: dict[Kind, Path]) -> Iterator[dict[Kind, Running]]:
    started = {kind: Running(path) for kind, path in models.items()}
    yield started
    for each in started.values():
        each.stop()


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_texts_stand_in_the_frame_of_the_vocabulary(running: dict[Kind, Running]) -> None:
    encoder = running["encoder"].encoder
    ids = encoder.encode(TextPrompt(text="ab c"), "input")
    assert (ids[0], ids[-1], len(ids)) == (CLS, SEP, 5)
    assert running["decoder"].encoder.encode(TextPrompt(text="ab"), "input")[-1] == tiny.END_OF_TURN


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_text_never_becomes_a_control_token(running: dict[Kind, Running], kind: Kind) -> None:
    for text in ("[SEP]", "[CLS] a [MASK]", "<|im_end|>", "<|endoftext|>"):
        ids = running[kind].encoder.encode(TextPrompt(text=text), "input")
        inner = ids[1:-1] if kind == "encoder" else ids[:-1]
        assert not set(inner) & {0, 2, 3, 4}, (text, ids)


def test_a_query_and_a_document_are_laid_out_as_the_model_knows_them(running: dict[Kind, Running]) -> None:
    encoder = running["reranker"].encoder
    asked, read = (encoder.encode(TextPrompt(text=text), "x")[1:-1] for text in ("ab", "c d"))
    assert encoder.pair(encoder.query("ab"), "c d", "x") == (CLS, *asked, SEP, *read, SEP)
    assert encoder.pair(encoder.query("ab"), "", "x") == (CLS, *asked, SEP, SEP)
    judged = running["judge"].encoder.pair(running["judge"].encoder.query("<|im_end|>"), "{query}", "x")
    assert judged[0] == 1  # the layout's own control tokens are, those in a text are not
    assert judged.count(2) == 1
    assert judged[-1] == 2


def test_an_input_that_does_not_fit_is_refused_with_the_limit(running: dict[Kind, Running]) -> None:
    encoder = running["encoder"].encoder
    assert len(encoder.encode(TextPrompt(text="a" * (CONTEXT - 2)), "input")) == CONTEXT
    with pytest.raises(InputTooLong) as caught:
        encoder.encode(TextPrompt(text="a" * (CONTEXT - 1)), "input[3]")
    assert (caught.value.param, caught.value.code) == ("input[3]", "context_length_exceeded")
    assert f"maximum context length is {CONTEXT} tokens" in caught.value.message
    assert f"{CONTEXT + 1} tokens" in caught.value.message
    error = running["encoder"].ask(embed("a", "b", (1,) * (CONTEXT + 1)))
    assert isinstance(error, ApiError)
    assert error.param == "input[2]"
    error = running["reranker"].ask(ScoreRequest(request_id="s", model="m", query="a", documents=("b", "c" * 100)))
    assert isinstance(error, ApiError)
    assert error.param == "documents[1]"
    error = running["reranker"].ask(ScoreRequest(request_id="s", model="m", query="a" * 100, documents=("b",)))
    assert isinstance(error, ApiError)
    assert error.param == "query"


def test_token_ids_are_checked_against_the_vocabulary(running: dict[Kind, Running]) -> None:
    error = running["encoder"].ask(embed((CLS, 10_000, SEP)))
    assert isinstance(error, InvalidRequest)
    assert error.param == "input"
    assert "10000" in error.message


def test_what_a_text_is_in_tokens_can_be_asked(running: dict[Kind, Running]) -> None:
    def encoded(prompt: TextPrompt | TokenPrompt | ChatPrompt, **options: bool) -> Answer | ApiError:
        return running["encoder"].ask(EncodeRequest(request_id="t", model="m", prompt=prompt, **options))

    answer = encoded(TextPrompt(text="ab"))
    assert isinstance(answer, Encoded)
    assert answer.tokens == running["encoder"].encoder.encode(TextPrompt(text="ab"), "input")
    assert len(answer.tokens) == running["encoder"].embed("ab").tokens[0]
    bare = encoded(TextPrompt(text="ab"), add_bos=False)
    assert isinstance(bare, Encoded)
    assert bare.tokens == answer.tokens[1:-1]
    back = encoded(TokenPrompt(tokens=answer.tokens))
    assert isinstance(back, Encoded)
    assert (back.pieces[0], back.pieces[-1]) == (b"[CLS]", b"[SEP]")
    assert isinstance(encoded(ChatPrompt(messages=())), InvalidRequest)
    assert isinstance(encoded(TokenPrompt(tokens=(10_000,))), InvalidRequest)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_vector_is_the_same_alone_and_among_others(running: dict[Kind, Running], kind: Kind) -> None:
    texts = ["a", "the cat", "abcdefgh ij", "z" * 40, "one two three", "4"] * 4
    together = vectors(running[kind].embed(*texts))
    for text, vector in zip(texts[:6], together, strict=False):
        (alone,) = vectors(running[kind].embed(text))
        np.testing.assert_allclose(vector, alone, atol=NOISE)
    np.testing.assert_array_equal(np.argsort([v @ together[0] for v in together[:6]])[-1], 0)
    assert len({vector.tobytes() for vector in together[:6]}) == 6


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_texts_and_their_token_ids_have_the_same_vector(running: dict[Kind, Running], kind: Kind) -> None:
    ids = running[kind].encoder.encode(TextPrompt(text="the cat"), "input")
    text, tokens = vectors(running[kind].embed("the cat", ids))
    np.testing.assert_allclose(text, tokens, atol=NOISE)


def test_usage_is_every_token_that_was_computed(running: dict[Kind, Running]) -> None:
    before = running["encoder"].embedder.stats().prefill_tokens
    answer = running["encoder"].embed("ab", "c", (CLS, SEP))
    assert answer.tokens == (4, 3, 2)
    assert running["encoder"].embedder.stats().prefill_tokens - before == 9


def test_vectors_have_length_one_unless_they_are_wanted_as_they_are(running: dict[Kind, Running]) -> None:
    (vector,) = vectors(running["encoder"].embed("abc"))
    (raw,) = vectors(running["encoder"].embed("abc", normalise=False))
    assert vector.shape == (DIMENSIONS,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    np.testing.assert_allclose(raw / np.linalg.norm(raw), vector, atol=1e-6)


def test_a_shortened_vector_is_the_first_numbers_and_has_length_one(running: dict[Kind, Running]) -> None:
    (full,) = vectors(running["encoder"].embed("abc"))
    (short,) = vectors(running["encoder"].embed("abc", dimensions=8))
    np.testing.assert_allclose(short, full[:8] / np.linalg.norm(full[:8]), atol=1e-6)


@pytest.mark.parametrize("kind", ["reranker", "judge"])
def test_scores_lie_between_nought_and_one_and_belong_to_their_document(
    running: dict[Kind, Running], kind: Kind
) -> None:
    documents = ("a b c", "xyz", "", "the cat", "9" * 20)
    together = running[kind].score("who", *documents)
    assert all(0 < score < 1 for score in together.scores)
    assert len(set(together.scores)) > 2
    for document, score, tokens in zip(documents, together.scores, together.tokens, strict=True):
        alone = running[kind].score("who", document)
        assert alone.scores[0] == pytest.approx(score, abs=5 * NOISE)
        assert (
            alone.tokens[0]
            == tokens
            == len(running[kind].encoder.pair(running[kind].encoder.query("who"), document, "x"))
        )


def test_tokens_are_counted_as_they_would_be_computed_and_nothing_is_computed(running: dict[Kind, Running]) -> None:
    computed = running["encoder"].embed("a", "some words")
    steps = running["encoder"].embedder.stats().steps
    assert running["encoder"].embed("a", "some words", count_only=True) == Embedded(vectors=(), tokens=computed.tokens)
    assert running["encoder"].embedder.stats().steps == steps
    question = ScoreRequest(request_id="s", model="m", query="who", documents=("b", "b c"))
    scored = running["reranker"].ask(question)
    assert isinstance(scored, Scored)
    counted = running["reranker"].ask(replace(question, count_only=True))
    assert counted == Scored(scores=(), tokens=scored.tokens)


def test_a_model_does_what_it_was_made_for_and_says_so(running: dict[Kind, Running]) -> None:
    for kind, question in (
        ("reranker", embed("a")),
        ("encoder", ScoreRequest(request_id="s", model="m", query="a", documents=("b",))),
    ):
        error = running[kind].ask(question)  # type: ignore[index]
        assert isinstance(error, InvalidRequest)
        assert (error.param, error.code) == ("model", "model_not_capable")


def test_a_generating_model_is_no_embedding_model(tiny_model: Path) -> None:
    log = llama.LoadLog()
    model = llama.Model(str(tiny_model), gpu_layers=0, log=log)
    log.close()
    with pytest.raises(LlamaError, match="does not say how its outputs are pooled"):
        PoolingContext(model, context=64, batch_tokens=64, sequences=1, threads=1, kv_type=KV_TYPES["f16"])


def test_an_input_may_be_spread_over_batches_where_only_its_end_counts(models: dict[Kind, Path]) -> None:
    whole, parted = Running(models["decoder"]), Running(models["decoder"], batch_tokens=7, sequences=3)
    assert (whole.context.batch_tokens, parted.context.batch_tokens) == (CONTEXT, 7)
    texts = ["x" * length for length in (1, 5, 6, 7, 13, 14, 40, 60, 2)]
    for one, other in zip(vectors(whole.embed(*texts)), vectors(parted.embed(*texts)), strict=True):
        np.testing.assert_allclose(one, other, atol=NOISE)
    assert parted.embedder.stats().steps >= sum(length + 1 for length in map(len, texts)) // 7
    whole.stop()
    parted.stop()


def test_an_encoder_takes_an_input_whole_however_small_its_batches_are_wished(models: dict[Kind, Path]) -> None:
    running = Running(models["encoder"], batch_tokens=7)
    assert running.context.batch_tokens == CONTEXT
    assert running.embed("a" * (CONTEXT - 2)).tokens == (CONTEXT,)
    running.stop()


# --- batches ----------------------------------------------------------------------------------------------------------


def job(*sizes: int) -> Job:
    return Job(embed("x"), [(1,) * size for size in sizes])


@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=1, max_size=6),
    rows=st.integers(20, 64),
    inputs=st.integers(1, 9),
    splits=st.booleans(),
)
def test_every_token_is_computed_once_in_order_within_the_bounds(
    sizes: list[list[int]], rows: int, inputs: int, splits: bool
) -> None:
    rows = rows if not splits else rows // 3  # then inputs may be longer than a batch
    jobs = deque(job(*each) for each in sizes)
    known = list(jobs)
    seen: dict[tuple[int, int], int] = {}
    unfinished: Part | None = None
    while jobs:
        parts = compose(jobs, unfinished, rows=rows, inputs=inputs, splits=splits)
        assert 0 < sum(part.end - part.begin for part in parts) <= rows
        assert 0 < len(parts) <= inputs
        assert sum(not part.ends for part in parts) <= splits
        unfinished = next((part for part in parts if not part.ends), None)
        for part in parts:
            place = known.index(part.job), part.index
            assert seen.get(place, 0) == part.begin
            seen[place] = part.end
            if part.ends:
                part.job.outputs[part.index] = np.zeros(1, np.float32)
        for each in [each for each in jobs if each.done]:
            jobs.remove(each)
    assert seen == {(n, i): size for n, each in enumerate(sizes) for i, size in enumerate(each)}


def test_one_text_does_not_wait_for_two_thousand() -> None:
    long, short = job(*[10] * 2000), job(10)
    parts = compose(deque([long, short]), None, rows=64, inputs=64, splits=False)
    assert short in [part.job for part in parts]


def test_a_short_input_does_not_wait_for_all_the_long_ones_of_another() -> None:
    """Each of those takes two batches, so that whoever was first in an odd one was once first in every odd one."""
    long, short = job(*[1024] * 20), job(3)
    jobs, unfinished = deque([long, short]), None
    for _ in range(4):
        parts = compose(jobs, unfinished, rows=512, inputs=64, splits=True)
        unfinished = next((part for part in parts if not part.ends), None)
    assert short.started == 1


def test_who_was_passed_over_for_want_of_room_comes_first_in_its_turn() -> None:
    small, large = job(*[10] * 50), job(64)
    jobs = deque([small, large])
    first = compose(jobs, None, rows=64, inputs=64, splits=False)
    assert large not in [part.job for part in first]
    assert [part.job for part in compose(jobs, None, rows=64, inputs=64, splits=False)] == [large]


# --- life -------------------------------------------------------------------------------------------------------------


def test_who_no_longer_waits_is_refused_once_and_others_are_answered(running: dict[Kind, Running]) -> None:
    each = running["encoder"]
    each.embedder.handle(wire.Ask(question=embed(*["a" * 60] * 500, name="gone")))
    each.embedder.handle(wire.Cancel(request_id="gone"))
    each.embedder.handle(wire.Ask(question=embed("b", name="kept")))
    answers = dict(each.replies.get(timeout=20) for _ in range(2))
    assert isinstance(answers["gone"], EngineFailed)
    assert isinstance(answers["kept"], Embedded)
    assert each.embed("b")
    assert each.replies.empty()


def test_an_input_that_is_given_up_halfway_leaves_its_cells_to_others(models: dict[Kind, Path]) -> None:
    parted = Running(models["decoder"], batch_tokens=4, sequences=2)
    expected = vectors(parted.embed("the cat"))
    for number in range(40):
        parted.embedder.handle(wire.Ask(question=embed(*["x" * 60] * 30, name=f"gone{number}")))
        parted.embedder.handle(wire.Ask(question=embed("ab", name=f"kept{number}")))
        assert parted.replies.get(timeout=20)[0] == f"kept{number}"
        parted.embedder.handle(wire.Cancel(request_id=f"gone{number}"))
        assert parted.replies.get(timeout=20)[0] == f"gone{number}"
    np.testing.assert_allclose(vectors(parted.embed("the cat")), expected, atol=NOISE)
    parted.stop()


def test_questions_from_many_sides_each_get_their_own(running: dict[Kind, Running]) -> None:
    each = running["encoder"]
    texts = {f"q{n}": [chr(97 + n), chr(97 + n) * 5, f"{n}"] for n in range(20)}
    expected = {name: each.embed(*mine) for name, mine in texts.items()}
    for name, mine in texts.items():
        each.embedder.handle(wire.Ask(question=embed(*mine, name=name)))
    for _ in texts:
        name, answer = each.replies.get(timeout=20)
        assert isinstance(answer, Embedded)
        for one, other in zip(vectors(answer), vectors(expected[name]), strict=True):
            np.testing.assert_allclose(one, other, atol=NOISE)
