"""Images among the tokens of a prompt, on real kernels: tiny models and projectors with random weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ocserve.engine import llama, vision
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus
from ocserve.engine.images import Picture
from ocserve.engine.slots import Sequence, Shown
from ocserve.engine.vision import Projector, Tile, image_ids
from ocserve.generation import Failed, Finished, Started
from tests import tiny, tiny_projector
from tests.cost import idle_share
from tests.engine.schedules import Engine, load

KINDS: tuple[tuple[tiny.Family, tiny_projector.Kind], ...] = (("attention", "causal"), ("sliding", "whole"))


def picture(seed: int, width: int = 40, height: int = 30) -> Picture:
    return Picture(width, height, np.random.default_rng(seed).integers(0, 256, 3 * width * height, np.uint8).tobytes())


def projector(path: Path, model: llama.Model) -> Projector:
    log = llama.LoadLog()
    try:
        return Projector(str(path), model, threads=1, use_gpu=False, log=log)
    finally:
        log.close()


class Seer(Engine):
    """An engine whose model sees; its projector's thread runs while it is used."""

    def __init__(self, folder: Path, family: tiny.Family, kind: tiny_projector.Kind, **rest: object) -> None:
        model = load(tiny.write(folder / "m.gguf", family))
        self.projector = projector(tiny_projector.write(folder / "p.gguf", kind), model)
        super().__init__(Path(), model=model, projector=self.projector, **rest)  # type: ignore[arg-type]
        assert self.loop.sight is not None
        threading.Thread(target=self.loop.sight.run, daemon=True).start()

    def show(self, name: str, before: list[int], shown: Picture, after: list[int], tokens: int = 8, **rest) -> Sequence:  # type: ignore[no-untyped-def]
        ids, images = list(before), []
        for part in self.projector.divide(shown, lambda: shown):
            if isinstance(part, Tile):
                images.append(Shown(len(ids), part))
                ids += part.ids
            else:
                ids += part
        return self.submit(name, [*ids, *after], tokens, images=tuple(images), **rest)

    def end_of(self, name: str) -> Finished:
        self.run()
        end = self.end(name)
        assert isinstance(end, Finished), end
        return end


@pytest.fixture(params=KINDS, ids=[kind for _, kind in KINDS])
def seer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Seer]:
    family, kind = request.param
    return Seer(tmp_path, family, kind)


BEFORE, AFTER = [40 + index for index in range(20)], [90, 91, 92, 93, 94]


def test_another_image_changes_the_answer_and_the_same_one_repeats_it(seer: Seer) -> None:
    first = seer.show("first", BEFORE, picture(1), AFTER, logprobs=3)
    other = seer.show("other", BEFORE, picture(2), AFTER, logprobs=3, salt=b"b")
    again = seer.show("again", BEFORE, picture(1), AFTER, logprobs=3, salt=b"c")
    seer.run()
    assert first.generated == again.generated
    told = {name: seer.logprobs(name)[0].chosen.logprob for name in ("first", "other", "again")}
    assert told["first"] == pytest.approx(told["again"], abs=1e-4)
    assert (other.generated, told["other"]) != (first.generated, pytest.approx(told["first"], abs=1e-4))


def test_an_image_counts_exactly_and_is_found_again(seer: Seer) -> None:
    sequence = seer.show("first", BEFORE, picture(1), AFTER)
    usage = seer.end_of("first").usage
    tokens = sum(image.tile.tokens for image in sequence.images)
    assert usage.image_tokens == tokens
    assert tokens in tiny_projector.TOKENS.values()
    assert usage.prompt_tokens == len(sequence.prompt) >= len(BEFORE) + tokens + len(AFTER)
    seer.show("again", BEFORE, picture(1), [*AFTER, 50, 51])
    cached = seer.end_of("again").usage.cached_tokens
    assert cached >= sequence.images[-1].end
    seer.show("other", BEFORE, picture(2), AFTER)
    assert seer.end_of("other").usage.cached_tokens <= sequence.images[0].begin
    seer.show("foreign", BEFORE, picture(1), AFTER, salt=b"another tenant")
    assert seer.end_of("foreign").usage.cached_tokens == 0


def test_the_shared_prompt_answers_as_the_computed_one(seer: Seer) -> None:
    alone = seer.show("alone", BEFORE, picture(3), AFTER, tokens=12)
    seer.run()
    warm = seer.show("warm", BEFORE, picture(3), AFTER, tokens=12)
    choices = seer.show("two", BEFORE, picture(3), AFTER, tokens=12, salt=b"b", choices=2)
    seer.run()
    assert warm.generated == alone.generated
    assert all(member.generated == alone.generated for member in choices.group.members)


def test_a_block_that_ends_inside_an_image_is_restored_up_to_it(tmp_path: Path) -> None:
    """Blocks in the tiers are of 128 tokens; this image lies across the border of the first."""
    seer = Seer(tmp_path, "attention", "causal")
    before = [3 + index for index in range(100)]
    first = seer.show("first", before, picture(1), AFTER)
    seer.run()
    while seer.kv.save_some():
        pass
    seer.kv.drop_kept()
    again = seer.show("again", before, picture(1), AFTER)
    usage = seer.end_of("again").usage
    assert usage.cached_tokens == len(before)
    assert again.generated == first.generated


def test_streams_go_on_while_an_image_is_encoded(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, held = Projector.encode, threading.Event()

    def slow(self: Projector, tile: Tile) -> object:
        assert held.wait(20)
        return encode(self, tile)

    monkeypatch.setattr(Projector, "encode", slow)
    stream = seer.submit("stream", [60, 61, 62], 200)
    shown = seer.show("shown", BEFORE, picture(1), AFTER)
    for _ in range(60):
        seer.loop.turn(wait=False)
    assert len(stream.generated) >= 40
    assert isinstance(seer.events["shown"][0], Started)
    assert shown.computed == shown.images[0].begin
    held.set()
    assert seer.end_of("shown").usage.completion_tokens


def test_the_loop_sleeps_while_nothing_but_an_image_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seer, held = Seer(tmp_path, "attention", "causal"), threading.Event()
    encode = Projector.encode
    monkeypatch.setattr(Projector, "encode", lambda self, tile: held.wait(20) and encode(self, tile))
    thread = threading.Thread(target=seer.loop.run, daemon=True)
    thread.start()
    seer.show("one", BEFORE, picture(1), AFTER)
    time.sleep(0.5)
    assert idle_share() < 0.1
    held.set()
    deadline = time.monotonic() + 20
    while seer.end("one") is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    seer.loop.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_an_image_that_cannot_be_encoded_ends_its_request_only(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Projector.encode

    def fails(self: Projector, tile: Tile) -> object:
        raise LlamaError("no")

    monkeypatch.setattr(Projector, "encode", fails)
    stream = seer.submit("stream", [60, 61, 62], 40)
    seer.show("shown", BEFORE, picture(1), AFTER)
    seer.run()
    end = seer.end("shown")
    assert isinstance(end, Failed)
    assert end.error.status == 500
    assert len(stream.generated) == 40
    monkeypatch.setattr(Projector, "encode", encode)
    seer.show("again", BEFORE, picture(1), AFTER)
    assert seer.end_of("again").usage.completion_tokens


def test_half_an_image_that_cannot_be_taken_back_ends_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrent state behind half of an image cannot go back to where the image begins."""
    seer = Seer(tmp_path, "attention", "causal")
    stream = seer.submit("stream", [60, 61, 62], 40)
    monkeypatch.setattr(Context, "decode_embeddings", lambda *args, **rest: DecodeStatus.NO_SLOT)
    monkeypatch.setattr(Context, "truncate", lambda *args: False)
    seer.show("shown", BEFORE, picture(1), AFTER)
    seer.run()
    assert isinstance(seer.end("shown"), Failed)
    assert len(stream.generated) == 40


@pytest.mark.parametrize("park_bytes", [0, 1 << 22])
def test_a_preempted_and_a_cancelled_prompt_leave_nothing_behind(tmp_path: Path, park_bytes: int) -> None:
    seer = Seer(tmp_path, "attention", "causal", pool_tokens=384, park_bytes=park_bytes)
    sequences = [
        seer.show(f"r{index}", BEFORE, picture(index), AFTER, tokens=150, salt=bytes([index])) for index in range(3)
    ]
    seer.show("cancelled", BEFORE, picture(9), AFTER)
    seer.loop.turn(wait=False)
    seer.loop.cancel("cancelled")
    seer.run()
    assert seer.loop.stats().preemptions
    for index, sequence in enumerate(sequences):
        assert seer.end_of(f"r{index}").usage.completion_tokens == 150
        alone = seer.show(f"alone{index}", BEFORE, picture(index), AFTER, tokens=150, salt=bytes([index, 1]))
        seer.run()
        assert alone.generated == sequence.generated
    seer.kv.drop_kept()
    assert seer.kv.cells == 0


@pytest.mark.parametrize("room", [0, 100, 10_000])
def test_pixels_are_held_within_bounds_and_given_up_once_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(vision, "HELD_TOKENS", room)
    model = load(tiny.write(tmp_path / "m.gguf"))
    sees = projector(tiny_projector.write(tmp_path / "p.gguf"), model)
    again: list[int] = []

    def tile(seed: int) -> Tile:
        parts = sees.divide(picture(seed), lambda: again.append(seed) or picture(seed))  # type: ignore[func-returns-value]
        return next(part for part in parts if isinstance(part, Tile))

    waiting = [tile(seed) for seed in range(8)]
    each = tiny_projector.TOKENS["causal"]
    fit = min(8, room // each)
    assert sum(sees._held.values()) == fit * each
    first = [sees.encode(one) for one in waiting]
    assert again == list(range(fit, 8))
    assert sees._held == {}
    for one, found in zip(waiting, first, strict=True):  # after its embeddings were given up too
        assert np.array_equal(sees.encode(one), found)
    assert len(again) == 8 - fit + 8
    left = tile(9)
    del left
    assert sees._held == {}


def test_ids_tell_images_apart() -> None:
    ids = image_ids(b"one", 64)
    assert ids == image_ids(b"one", 64)
    assert ids[0] != image_ids(b"two", 64)[0]
    assert all(-(1 << 31) <= each < 0 for each in ids)
    assert image_ids(b"one", 2) != image_ids(b"one", 2)


def test_a_projector_of_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = load(tiny.write(tmp_path / "m.gguf"))
    path = tiny_projector.write(tmp_path / "p.gguf", embedding=64)
    with pytest.raises(LlamaError, match="mismatch"):
        projector(path, model)
