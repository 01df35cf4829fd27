"""What is prepared beside the loop: all that can fail fails there, as a refusal, and nothing of it is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest

from ocserve.engine import prepare, sampler
from ocserve.engine.bindings import LlamaError
from ocserve.engine.constraint import GrammarCompiler, Guide
from ocserve.engine.llama import LoadLog, Model
from ocserve.engine.prepare import Preparer
from ocserve.engine.sampler import SamplerChain
from ocserve.engine.speculation import PromptLookup, Speculator
from ocserve.engine.tokens import EncodedPrompt, PromptEncoder
from ocserve.engine.turns import Turns
from ocserve.engine.wire import Prepared, Refused
from ocserve.generation import GenerateRequest, JsonConstraint, Sampling, TextPrompt

CONTEXT = 64


class Chain(SamplerChain):
    """A real chain that tells when it is freed. `fail` says which of them llama.cpp is to refuse."""

    open = 0
    fail: Callable[[int], bool] = staticmethod(lambda seed: False)

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        if Chain.fail(seed):
            raise LlamaError("llama.cpp refused a sampler")
        super().__init__(*args, seed=seed, **kwargs)
        Chain.open += 1

    def close(self) -> None:
        Chain.open -= self._chain is not None
        super().close()


class Drafts(PromptLookup):
    open = 0

    def __init__(self, prompt: tuple[int, ...]) -> None:
        super().__init__(prompt)
        Drafts.open += 1

    def close(self) -> None:
        Drafts.open -= 1


@pytest.fixture
def replies(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Preparer, SimpleQueue[Any]]:
    log = LoadLog()
    vocab = Model(str(tiny_model), gpu_layers=0, log=log).vocab
    log.close()
    encoder = PromptEncoder(vocab, None, context=CONTEXT, turns=Turns())
    told: SimpleQueue[Any] = SimpleQueue()
    grammars = GrammarCompiler(vocab, encoder.plain)
    preparer = Preparer(encoder, vocab, grammars, context=CONTEXT, drafter=Drafts, emit=told.put)
    monkeypatch.setattr(sampler, "SamplerChain", Chain)
    Chain.open = Drafts.open = 0
    threading.Thread(target=preparer.run, daemon=True).start()
    return preparer, told


def request(name: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        model="m",
        prompt=TextPrompt(text="one two"),
        sampling=Sampling(temperature=1.0),
        max_tokens=5,
        choices=3,
    )


def test_a_prepared_request_is_taken_whole_and_once(replies: tuple[Preparer, SimpleQueue[Any]]) -> None:
    preparer, told = replies
    preparer.submit(request("a"))
    assert isinstance(told.get(timeout=10), Prepared)
    assert (Chain.open, Drafts.open) == (3, 3)
    group = preparer.take("a")
    assert group is not None
    assert [sequence.index for sequence in group.members] == [0, 1, 2]
    assert all(sequence.deadline - sequence.arrived == group.request.deadline_s for sequence in group.members)
    assert preparer.take("a") is None


def test_what_is_cancelled_before_it_starts_is_freed(replies: tuple[Preparer, SimpleQueue[Any]]) -> None:
    preparer, told = replies
    preparer.submit(request("a"))
    assert isinstance(told.get(timeout=10), Prepared)
    preparer.cancel("a")
    assert (Chain.open, Drafts.open) == (0, 0)
    assert preparer.take("a") is None


def test_what_is_cancelled_before_it_is_prepared_is_refused_once_nothing_works_on_it(
    replies: tuple[Preparer, SimpleQueue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparer, told = replies
    encode, begun, goes_on = preparer._encoder.encode, threading.Event(), threading.Event()

    def slow(asked: GenerateRequest) -> EncodedPrompt:
        begun.set()
        assert goes_on.wait(10)
        return encode(asked)

    monkeypatch.setattr(preparer._encoder, "encode", slow)
    for name in ("in work", "waiting"):
        preparer.submit(request(name))
    assert begun.wait(10)
    for name in ("in work", "waiting"):
        preparer.cancel(name)
    assert told.empty()
    goes_on.set()
    refusals = [told.get(timeout=10) for _ in range(2)]
    assert [(type(refusal), refusal.request_id) for refusal in refusals] == [(Refused, "in work"), (Refused, "waiting")]
    assert (Chain.open, Drafts.open) == (0, 0)


def test_a_sampler_that_cannot_be_made_refuses_its_request_alone(
    replies: tuple[Preparer, SimpleQueue[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparer, told = replies
    made: list[int] = []
    monkeypatch.setattr(Chain, "fail", lambda seed: made.append(seed) or len(made) == 3)
    preparer.submit(request("a"))
    refused = told.get(timeout=10)
    assert isinstance(refused, Refused)
    assert refused.error.status == 500
    assert (Chain.open, Drafts.open) == (0, 0)
    preparer.submit(request("b"))
    assert isinstance(told.get(timeout=10), Prepared)
    assert Chain.open == 3


@pytest.mark.parametrize("part", ["guide", "drafter", "prediction"])
def test_what_a_choice_has_is_freed_when_its_next_part_cannot_be_made(
    replies: tuple[Preparer, SimpleQueue[Any]], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Each of its parts is made once for each of three choices; the third one fails."""
    preparer, told = replies
    made: list[str] = []

    def failing(make: Callable[..., Any]) -> Callable[..., Any]:
        def third_fails(*args: Any, **kwargs: Any) -> Any:
            made.append(part)
            if len(made) == 3:
                raise RuntimeError
            return make(*args, **kwargs)

        return third_fails

    asked = request("a")
    if part == "guide":
        monkeypatch.setattr(Guide, "copy", failing(Guide.copy))
        asked = msgspec.structs.replace(asked, constraint=JsonConstraint(schema=None))
    elif part == "drafter":
        monkeypatch.setattr(Drafts, "__init__", failing(Drafts.__init__))
    else:
        monkeypatch.setattr(prepare, "Speculator", failing(Speculator))
    preparer.submit(asked)
    refused = told.get(timeout=10)
    assert isinstance(refused, Refused)
    assert refused.error.status == 500
    assert len(made) == 3
    assert (Chain.open, Drafts.open) == (0, 0)


def test_what_an_answer_is_held_to_is_also_what_is_checked_of_it(replies: tuple[Preparer, SimpleQueue[Any]]) -> None:
    preparer, told = replies
    held = msgspec.structs.replace(request("held"), constraint=JsonConstraint(schema='{"type": "integer"}'))
    for each in (held, request("free")):
        preparer.submit(each)
        assert isinstance(told.get(timeout=10), Prepared)
    groups = [preparer.take(name) for name in ("held", "free")]
    assert [[sequence.answer.is_held for sequence in group.members] for group in groups if group] == [
        [True] * 3,
        [False] * 3,
    ]
