"""The bindings: what llama.cpp's C side would not check or would not survive."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ocserve.engine import llama
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.sampler import SamplerChain, _fold
from ocserve.generation import Sampling
from tests import tiny


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> llama.Model:
    log = llama.LoadLog()
    loaded = llama.Model(str(tiny_model), gpu_layers=0, log=log)
    log.close()
    return loaded


@pytest.fixture
def context(model: llama.Model) -> Context:
    return Context(model, pool_tokens=512, sequences=4, batch_tokens=64, threads=1)


def test_a_collected_load_log_is_not_called_again() -> None:
    """llama.cpp keeps the hook's address: after `close` it must be one that lives for ever. In a process of its own."""
    script = (
        "import gc\n"
        "from ocserve.engine import bindings, llama\n"
        "log = llama.LoadLog(); log.close(); del log; gc.collect()\n"
        "junk = [bytes(64) for _ in range(10000)]\n"
        "other = type('Log', (), {'lines': []})()\n"
        "try:\n    llama.Model('/nonexistent', gpu_layers=0, log=other)\n"
        "except bindings.LlamaError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "refused")
    gc.collect()


def test_a_missing_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    log = llama.LoadLog()
    with pytest.raises(LlamaError, match="could not load"):
        llama.Model(str(tmp_path / "none.gguf"), gpu_layers=0, log=log)
    log.close()


def test_the_high_level_bindings_and_their_pickling_cache_are_not_loaded() -> None:
    script = (
        "import sys, ocserve.engine.llama as _; print('diskcache' in sys.modules, 'llama_cpp.llama' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_content_is_not_parsed_for_special_tokens_unless_asked(model: llama.Model) -> None:
    text = "<|im_start|>user"
    assert model.vocab.tokenize(text, parse_special=True)[0] == 1
    assert not {0, 1, 2} & set(model.vocab.tokenize(text, parse_special=False))


@pytest.mark.parametrize("token", [-1, 10**6, 2**40])
def test_token_ids_outside_the_vocabulary_never_reach_c(model: llama.Model, token: int) -> None:
    for read in (model.vocab.piece, model.vocab.text, model.vocab.is_end):
        with pytest.raises(LlamaError):
            read(token)


def test_pieces_give_back_every_byte(model: llama.Model) -> None:
    text = "the inn, grüße 🎈 \x00\x7f " + " " * 70
    ids = model.vocab.tokenize(text, parse_special=False)
    assert b"".join(model.vocab.piece(token) for token in ids).decode() == text


def test_batches_and_chunks_compute_what_one_sequence_alone_computes(context: Context) -> None:
    prompt = [40, 50, 60, 70, 80, 90]
    assert context.decode([Row(t, i, 0, i == 5) for i, t in enumerate(prompt)]) is DecodeStatus.OK
    alone = np.array(context.logits(5))
    rows = [Row(t, i, 1, False) for i, t in enumerate(prompt[:3])] + [Row(33, 0, 2, False)]
    context.decode(rows)
    rows = [Row(34, 1, 2, True)] + [Row(t, i + 3, 1, i == 2) for i, t in enumerate(prompt[3:])]
    context.decode(rows)
    assert np.allclose(context.logits(3), alone, atol=1e-4)


def test_forgetting_frees_the_cells(context: Context) -> None:
    context.decode([Row(40, 0, 3, False)])
    assert context.occupied(3)
    context.forget(3)
    assert not context.occupied(3)


def test_a_full_pool_is_a_status_and_the_context_lives_on(model: llama.Model) -> None:
    small = Context(model, pool_tokens=256, sequences=2, batch_tokens=64, threads=1)
    status = DecodeStatus.OK
    position = 0
    while status is DecodeStatus.OK:
        status = small.decode([Row(40, position + i, 0, False) for i in range(64)])
        position += 64
    assert status is DecodeStatus.NO_SLOT
    small.forget(0)
    assert small.decode([Row(40, 0, 1, True)]) is DecodeStatus.OK


def sampled(model: llama.Model, context: Context, sampling: Sampling, seed: int, prompt: list[int]) -> list[int]:
    """Ten tokens drawn after `prompt` on sequence 0."""
    context.forget(0)
    chain = SamplerChain(model.vocab, sampling, seed=seed, window=512, prompt=prompt)
    context.decode([Row(t, i, 0, i == len(prompt) - 1) for i, t in enumerate(prompt)])
    tokens = [chain.sample(context, len(prompt) - 1)]
    for position in range(len(prompt), len(prompt) + 9):
        context.decode([Row(tokens[-1], position, 0, True)])
        tokens.append(chain.sample(context, 0))
    chain.close()
    return tokens


def test_every_sampling_parameter_has_its_effect(model: llama.Model, context: Context) -> None:
    def draw(seed: int = 1, **parameters: object) -> list[int]:
        return sampled(model, context, Sampling(**parameters), seed, [40, 50, 60])  # type: ignore[arg-type]

    greedy = draw(temperature=0.0)
    assert draw(temperature=0.0, seed=9) == greedy
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1) == greedy
    assert draw(top_p=1e-6) == greedy
    assert draw(min_p=1.0) == greedy
    assert draw(temperature=1e-4) == greedy
    first = greedy[0]
    assert draw(temperature=0.0, logit_bias={first: -100.0})[0] != first
    assert draw(logit_bias={77: 100.0}) == [77] * 10
    # Repetition counts the prompt; frequency and presence count only what was generated.
    assert draw(temperature=0.0, logit_bias={40: 30.0})[0] == 40
    assert draw(temperature=0.0, logit_bias={40: 30.0}, repetition_penalty=2.0**6)[0] != 40
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        tokens = draw(temperature=0.0, logit_bias={40: 1.0 + 5.0, 41: 5.5 + 5.0}, **penalty)
        assert tokens[0] == draw(temperature=0.0, logit_bias={40: 6.0, 41: 10.5})[0]


def test_64_bit_seeds_are_folded_without_reaching_the_random_one(model: llama.Model) -> None:
    assert _fold(0xFFFFFFFF) != 0xFFFFFFFF
    assert _fold(5) == 5
    assert _fold(5 << 32) == 5


@pytest.mark.parametrize("family", ["attention", "sliding", "recurrent"])
def test_every_architecture_family_decodes_several_sequences(tmp_path: Path, family: tiny.Family) -> None:
    log = llama.LoadLog()
    loaded = llama.Model(str(tiny.write(tmp_path / "m.gguf", family)), gpu_layers=0, log=log)
    log.close()
    context = Context(loaded, pool_tokens=512, sequences=3, batch_tokens=64, threads=1)
    greedy = Sampling(temperature=0.0)
    alone = sampled(loaded, context, greedy, 1, [40, 50, 60])
    assert len(alone) == 10
    assert alone == sampled(loaded, context, greedy, 1, [40, 50, 60])
