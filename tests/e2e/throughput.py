"""The server over HTTP beside the bare llama.cpp loop, alternating in one run: `python -m tests.e2e.throughput MODEL`.

The bare loop is prebuilt batches, `llama_decode` and the sampler chain, nothing else, in a process of its own. Both
decode the same greedy tokens after the same prompt at the same thread count; a rate is tokens after the first over the
time they took. Only one side computes at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import openai

from tests.e2e.daemon import daemon

PROMPT = "Tell me a long story about a lighthouse keeper and the sea."
_SYSTEM = "You write long stories."
END_OF_TURN = 2  # SmolLM2's <|im_end|>, suppressed on both sides so that both decode the full count


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second: bare loop, one HTTP stream, and the sum over eight HTTP streams, per round."""

    bare: tuple[float, ...]
    one: tuple[float, ...]
    eight: tuple[float, ...]
    widest_step: int

    @property
    def http_over_bare(self) -> float:
        """Median over rounds of the paired ratio."""
        return statistics.median(http / bare for http, bare in zip(self.one, self.bare, strict=True))

    @property
    def eight_over_one(self) -> float:
        return statistics.median(eight / one for eight, one in zip(self.eight, self.one, strict=True))


def _bare_loop(model: str, threads: int, tokens: int, pipe: Connection) -> None:
    """Child process: on each message decode `tokens` tokens and answer with the rate."""
    from ocserve.engine import llama
    from ocserve.engine.bindings import api
    from ocserve.engine.context import Context, Row
    from ocserve.engine.sampler import SamplerChain
    from ocserve.generation import Sampling

    log = llama.LoadLog()
    loaded = llama.Model(model, gpu_layers=0, log=log)
    log.close()
    context = Context(loaded, pool_tokens=2048, sequences=1, batch_tokens=256, threads=threads)
    api = api
    text = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    prompt = loaded.vocab.tokenize(text, parse_special=True)
    while pipe.recv():
        chain = SamplerChain(
            loaded.vocab,
            Sampling(temperature=0, logit_bias={END_OF_TURN: -100.0}),
            seed=1,
            window=2048,
            prompt=prompt,
        )
        rows = [Row(token, index, 0, index == len(prompt) - 1) for index, token in enumerate(prompt)]
        context.decode(rows)
        token = chain.sample(context, len(prompt) - 1)
        batch = api.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 0, True
        begun = time.perf_counter()
        for position in range(len(prompt), len(prompt) + tokens - 1):
            batch.token[0], batch.pos[0] = token, position
            api.llama_decode(context.pointer, batch)
            token = chain.sample(context, 0)
        pipe.send((tokens - 1) / (time.perf_counter() - begun))
        chain.close()
        context.forget(0)


@contextmanager
def bare_loop(model: Path, threads: int, tokens: int) -> Iterator[Connection]:
    """A bare loop that waits to be asked for a run."""
    ours, theirs = multiprocessing.Pipe()
    spawner = multiprocessing.get_context("spawn")
    child = spawner.Process(target=_bare_loop, args=(str(model), threads, tokens, theirs), daemon=True)
    child.start()
    try:
        yield ours
    finally:
        ours.send(False)
        child.join(10)
        child.close()


async def stream(client: openai.AsyncOpenAI, tokens: int, salt: str = "") -> tuple[float, float, int]:
    """One streamed completion: time of the first text, time of the last, completion tokens by the usage."""
    first = last = 0.0
    completion = 0
    answer = await client.chat.completions.create(
        model="default",
        messages=[{"role": "system", "content": _SYSTEM}, {"role": "user", "content": PROMPT + salt}],
        max_tokens=tokens,
        temperature=0,
        logit_bias={str(END_OF_TURN): -100},
        stream=True,
    )
    async for chunk in answer:
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter()
            first = first or last
        if chunk.usage:
            completion = chunk.usage.completion_tokens
    return first, last, completion


async def streams(url: str, count: int, tokens: int) -> float:
    """Decode rate summed over `count` concurrent streams: tokens after everyone's first, over that time."""
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        runs = await asyncio.gather(*(stream(client, tokens, "!" * index) for index in range(count)))
    assert all(completion == tokens for _, _, completion in runs)
    begun, ended = min(first for first, _, _ in runs), max(last for _, last, _ in runs)
    return count * (tokens - 1) / (ended - begun)


def measure(model: Path, *, threads: int, tokens: int, rounds: int) -> Rates:
    """Alternate the three runs `rounds` times, after one unmeasured round."""
    bare, one, eight = [], [], []
    with (
        daemon(str(model), "--threads", str(threads), "--parallel", "8") as server,
        bare_loop(model, threads, tokens) as pipe,
    ):
        for round_ in range(rounds + 1):
            pipe.send(True)
            rates = pipe.recv(), asyncio.run(streams(server.base_url, 1, tokens)), 0.0
            rates = (*rates[:2], asyncio.run(streams(server.base_url, 8, tokens)))
            if round_:
                for series, rate in zip((bare, one, eight), rates, strict=True):
                    series.append(rate)
        histogram = server.health()["stats"]["steps_by_sequences"]
    widest = max(index for index, steps in enumerate(histogram) if steps)
    return Rates(tuple(bare), tuple(one), tuple(eight), widest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rates = measure(options.model, threads=options.threads, tokens=options.tokens, rounds=options.rounds)
    for name, series in (("bare loop", rates.bare), ("HTTP, 1 stream", rates.one), ("HTTP, 8 streams", rates.eight)):
        print(f"{name:16} {statistics.median(series):7.1f} tok/s   " + "  ".join(f"{rate:.1f}" for rate in series))
    print(f"HTTP / bare      {rates.http_over_bare:7.3f}")
    print(f"8 / 1 streams    {rates.eight_over_one:7.3f}   widest step {rates.widest_step} sequences")


if __name__ == "__main__":
    main()
