"""The bare llama.cpp loop as one JSON object: `python -m ocserve.engine.ceiling MODEL --threads 1 2 --batch 1 8`.

Prebuilt batches, `llama_decode` and the sampler chain, nothing else: what this machine can do at most. Run as a child
process by `ocserve bench --ceiling`, so that its memory is back when it ends. Rates are tokens per second.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence

import msgspec

from ocserve.engine import llama
from ocserve.engine.bindings import LlamaError, api
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.sampler import SamplerChain
from ocserve.generation import Sampling

_PREFILL_TOKENS = 512


class Rates(msgspec.Struct, frozen=True):
    """The ceiling at one thread count: prefill by tokens in a batch, decode (all sequences together) by sequences."""

    threads: int
    prefill: dict[int, float]
    decode: dict[int, float]


class Ceiling(msgspec.Struct, frozen=True):
    """`end_tokens` are the tokens that end an answer; they were kept from being chosen."""

    end_tokens: tuple[int, ...]
    rates: tuple[Rates, ...]


class _Loop:
    """One context and what is asked of it."""

    def __init__(self, model: llama.Model, end_tokens: Sequence[int], *, threads: int, batches: Sequence[int],
                 chunks: Sequence[int], prompt_tokens: int, tokens: int) -> None:  # fmt: skip
        most = max(batches)
        self._vocab = model.vocab
        self._prompt_tokens, self._tokens = prompt_tokens, tokens
        self._context = Context(
            model,
            pool_tokens=max(most * (prompt_tokens + tokens), _PREFILL_TOKENS) + 64,
            sequences=most,
            batch_tokens=max(*chunks, most, prompt_tokens),
            threads=threads,
        )
        self._sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(end_tokens, -100.0))
        self._draw = random.Random(0)  # noqa: S311 -- reproducible, not secret

    def _prompt(self, count: int) -> list[int]:
        return [self._draw.randrange(self._vocab.size // 2, self._vocab.size - 1) for _ in range(count)]

    def _decode(self, rows: Sequence[Row]) -> None:
        if (status := self._context.decode(rows)) is not DecodeStatus.OK:
            raise LlamaError(f"a batch of {len(rows)} tokens failed ({status.name})")

    def prefill(self, chunk: int) -> float:
        """Read a prompt in batches of `chunk` tokens."""
        prompt = self._prompt(max(_PREFILL_TOKENS // chunk, 1) * chunk)
        batches = [
            [
                Row(token, begin + at, 0, begin + at == len(prompt) - 1)
                for at, token in enumerate(prompt[begin:][:chunk])
            ]
            for begin in range(0, len(prompt), chunk)
        ]
        begun = time.perf_counter()
        for rows in batches:
            self._decode(rows)
        self._context.logits(len(batches[-1]) - 1)  # waits for what is still being computed
        rate = len(prompt) / (time.perf_counter() - begun)
        self._context.forget(0)
        return rate

    def decode(self, sequences: int) -> float:
        """Generate with `sequences` sequences together, each after a prompt of its own."""
        chains, next_tokens = [], []
        for sequence in range(sequences):
            prompt = self._prompt(self._prompt_tokens)
            chain = SamplerChain(self._vocab, self._sampling, seed=1, window=64, prompt=prompt)
            self._decode([Row(token, at, sequence, at == len(prompt) - 1) for at, token in enumerate(prompt)])
            next_tokens.append(chain.sample(self._context, len(prompt) - 1))
            chains.append(chain)
        rate = self._steps(chains, next_tokens)
        for sequence, chain in enumerate(chains):
            chain.close()
            self._context.forget(sequence)
        return rate

    def _steps(self, chains: Sequence[SamplerChain], next_tokens: list[int]) -> float:
        count, context, decode = len(chains), self._context, api.llama_decode
        batch = api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for row in range(count):
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, row, True
            begun = time.perf_counter()
            for position in range(self._prompt_tokens, self._prompt_tokens + self._tokens):
                for row in range(count):
                    batch.token[row], batch.pos[row] = next_tokens[row], position
                if decode(context.pointer, batch) != 0:
                    raise LlamaError(f"a step of {count} sequences failed")
                next_tokens = [chain.sample(context, row) for row, chain in enumerate(chains)]
            return count * self._tokens / (time.perf_counter() - begun)
        finally:
            api.llama_batch_free(batch)

    def close(self) -> None:
        self._context.close()


def measure(
    path: str,
    *,
    threads: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[int],
    prompt_tokens: int,
    tokens: int,
    gpu_layers: int = 0,
) -> Ceiling:
    """Rates at each thread count: prefill for each of `chunks`, decode for each of `batches`.

    Decode generates `tokens` tokens in each sequence after `prompt_tokens`. Raises `LlamaError`.
    """
    log = llama.LoadLog()
    try:
        model = llama.Model(path, gpu_layers=gpu_layers, log=log)
    finally:
        log.close()
    end_tokens = tuple(token for token in range(model.vocab.size) if model.vocab.is_end(token))
    found = []
    for count in threads:
        loop = _Loop(
            model,
            end_tokens,
            threads=count,
            batches=batches,
            chunks=chunks,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
        )
        try:
            loop.prefill(chunks[0])  # the first batch also pays for pages and buffers
            prefill = {chunk: loop.prefill(chunk) for chunk in chunks}
            decode = {batch: loop.decode(batch) for batch in batches}
        finally:
            loop.close()
        found.append(Rates(count, prefill, decode))
    return Ceiling(end_tokens, tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunk", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--gpu-layers", type=int, default=0)
    options = parser.parse_args()
    try:
        ceiling = measure(
            options.model,
            threads=options.threads,
            batches=options.batch,
            chunks=options.chunk,
            prompt_tokens=options.prompt_tokens,
            tokens=options.tokens,
            gpu_layers=options.gpu_layers,
        )
    except LlamaError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(msgspec.json.encode(ceiling).decode() + "\n")


if __name__ == "__main__":
    main()
