"""The bare llama.cpp loop: prebuilt batches, `llama_decode` and llama.cpp's sampler chain, nothing else.

What this machine can do with llama.cpp alone; the engine need not draw by that chain where it knows better.
`python -m ocserve.engine.ceiling MODEL` is a child process of `ocserve bench`, so that its memory is back when it ends:
it prints a `Facts` object, reads one `Task` a line from stdin and answers each with a number of tokens per second,
until stdin ends. Between two tasks it computes nothing.
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


class Facts(msgspec.Struct, frozen=True):
    """`end_tokens` are the tokens that end an answer; they are kept from being chosen."""

    end_tokens: tuple[int, ...]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """`prefill`: read a prompt in batches of so many tokens. `decode`: generate in so many sequences together."""

    threads: int
    prefill: int = 0
    decode: int = 0


class Bare:
    """One context, of `pool_tokens` or as much more as the largest tasks need, and what is asked of it."""

    def __init__(self, model: llama.Model, *, threads: int, most_sequences: int, most_batch: int, prompt_tokens: int,
                 tokens: int, pool_tokens: int) -> None:  # fmt: skip
        self._vocab = model.vocab
        self._prompt_tokens, self._tokens = prompt_tokens, tokens
        self._context = Context(
            model,
            pool_tokens=max(most_sequences * (prompt_tokens + tokens) + 64, _PREFILL_TOKENS + 64, pool_tokens),
            sequences=most_sequences,
            batch_tokens=max(most_batch, most_sequences, prompt_tokens),
            threads=threads,
            flash_attention=False,  # which is slower on a processor
        )
        self.facts = Facts(tuple(token for token in range(model.vocab.size) if model.vocab.is_end(token)))
        self._sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(self.facts.end_tokens, -100.0))
        self._draw = random.Random(0)  # noqa: S311 -- reproducible, not secret

    def run(self, task: Task) -> float:
        """Tokens per second. Raises `LlamaError`."""
        self._context.use_threads(task.threads)
        return self._prefill(task.prefill) if task.prefill else self._generate(task.decode)

    def _prompt(self, count: int) -> list[int]:
        return [self._draw.randrange(self._vocab.size // 2, self._vocab.size - 1) for _ in range(count)]

    def _decode(self, rows: Sequence[Row]) -> None:
        if (status := self._context.decode(rows)) is not DecodeStatus.OK:
            raise LlamaError(f"a batch of {len(rows)} tokens failed ({status.name})")

    def _prefill(self, chunk: int) -> float:
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

    def _generate(self, sequences: int) -> float:
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


def _measure(path: str, options: argparse.Namespace) -> None:
    log = llama.LoadLog()
    try:
        model = llama.Model(path, gpu_layers=options.gpu_layers, log=log)
    finally:
        log.close()
    bare = Bare(
        model,
        threads=1,
        most_sequences=options.most_sequences,
        most_batch=options.most_batch,
        prompt_tokens=options.prompt_tokens,
        tokens=options.tokens,
        pool_tokens=options.pool_tokens,
    )
    try:
        _say(bare.facts)
        for line in sys.stdin.buffer:
            _say(bare.run(msgspec.json.decode(line, type=Task)))
    finally:
        bare.close()


def _say(answer: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--most-sequences", type=int, default=8)
    parser.add_argument("--most-batch", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pool-tokens", type=int, default=0)
    parser.add_argument("--gpu-layers", type=int, default=0)
    options = parser.parse_args()
    try:
        _measure(options.model, options)
    except LlamaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
