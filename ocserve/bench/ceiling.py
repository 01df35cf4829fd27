"""The server over HTTP beside the bare llama.cpp loop, alternating in one session.

Both decode greedily at the same thread count, with as many sequences as streams, after prompts of about the same
length, and in KV caches of the same size: without flash attention, a row of 8,192 cells takes 3 % longer than of 576.
Tokens that end an answer are kept from being chosen on both sides. A rate is tokens over the time while all sequences
are decoding. Only one side computes at a time, and the two figures of a pair are taken one right after the other: the
speed of a shared machine drifts within minutes.
"""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Self

import msgspec

from ocserve import config
from ocserve.bench import load, measures
from ocserve.bench.client import Target
from ocserve.bench.measures import Ratio
from ocserve.bench.scenario import Group, Phase, Scenario
from ocserve.bench.servers import OwnServer
from ocserve.bench.text import Scale, Texts

_PROMPT_TOKENS = 64
CHUNKS = (16, 64, 256)  # tokens in a batch of the bare loop's prefill
# As engine processes have it: with OpenMP's default, threads that wait for one another spin.
_WAITING = {"GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1"}
_BATCH_TOKENS = 256  # llama.cpp lays out its buffers for the largest batch, which a step of one row feels
# What an own server leaves out here: batches of drafts, and files that are written on when an answer has ended. Its
# attention is computed as that of the bare loop.
_PLAIN = {
    "OCSERVE_ENGINE_BATCH_TOKENS": str(_BATCH_TOKENS),
    "OCSERVE_ENGINE_SPECULATION": "off",
    "OCSERVE_ENGINE_FLASH_ATTENTION": "off",
    "OCSERVE_CACHE_DISK_BYTES": "0",
}


class CeilingFailed(Exception):
    """The bare loop or the server could not be measured; the text says why."""


class Rates(msgspec.Struct, frozen=True):
    """The bare loop at one thread count, tokens per second: prefill by batch size, decode by sequences."""

    threads: int
    prefill: dict[int, float]
    decode: dict[int, float]


class Ceiling(msgspec.Struct, frozen=True):
    """The bare loop at every thread count."""

    rates: tuple[Rates, ...]


class _Facts(msgspec.Struct, frozen=True):
    end_tokens: tuple[int, ...]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """HTTP over the bare loop at one thread count and stream count: rates of each round, and their paired ratio.

    `of_best` is this ceiling as a share of the best thread count's.
    """

    threads: int
    streams: int
    http: tuple[float, ...]
    bare: tuple[float, ...]
    ratio: Ratio
    of_best: float


class BareLoop:
    """`ocserve.engine.ceiling` as a child process, which computes only while it is asked. Raises `CeilingFailed`."""

    def __init__(
        self,
        model: Path,
        *,
        most_sequences: int,
        most_batch: int = 64,
        prompt_tokens: int = _PROMPT_TOKENS,
        tokens: int,
        pool_tokens: int = 0,
    ) -> None:
        """`pool_tokens`: cells of the KV cache, if that is more than the tasks need."""
        sizes = {
            "--most-sequences": most_sequences,
            "--most-batch": most_batch,
            "--prompt-tokens": prompt_tokens,
            "--tokens": tokens,
            "--pool-tokens": pool_tokens,
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `close`
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ocserve.engine.ceiling",
                str(model),
                *(str(x) for pair in sizes.items() for x in pair),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_WAITING | config.engine_environment(),
        )
        self.end_tokens = msgspec.json.decode(self._line(), type=_Facts).end_tokens

    def prefill(self, chunk: int, threads: int) -> float:
        """Tokens per second of a prompt that is read in batches of `chunk`."""
        return self._ask({"threads": threads, "prefill": chunk})

    def decode(self, sequences: int, threads: int) -> float:
        """Tokens per second of `sequences` sequences together."""
        return self._ask({"threads": threads, "decode": sequences})

    def _ask(self, task: dict[str, int]) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(task) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there will be no line
        return msgspec.json.decode(self._line(), type=float)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        status = self._process.wait()
        self._errors.seek(0)
        *_, last = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        self.close()
        raise CeilingFailed(f"the bare loop ended with status {status}: {last}")

    def close(self) -> None:
        """End the process; twice is harmless."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # a question that it died before may be in the buffer still
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def bare(
    model: Path,
    *,
    threads: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[int] = CHUNKS,
    tokens: int = 128,
    on_rate: Callable[[], None] = lambda: None,
) -> Ceiling:
    """Measure the bare loop in a process of its own; `on_rate` hears of each figure. Raises `CeilingFailed`."""
    with BareLoop(model, most_sequences=max(batches), most_batch=max(chunks), tokens=tokens) as loop:
        loop.prefill(min(chunks), threads[0])  # the first batch also pays for pages and buffers

        def heard(rate: float) -> float:
            on_rate()
            return rate

        return Ceiling(
            tuple(
                Rates(
                    count,
                    {chunk: heard(loop.prefill(chunk, count)) for chunk in chunks},
                    {batch: heard(loop.decode(batch, count)) for batch in batches},
                )
                for count in threads
            )
        )


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two sides at one thread count."""

    loop: BareLoop
    target: Target
    scale: Scale
    threads: int
    tokens: int

    def http(self, label: str, streams: int) -> float:
        """The decode rate over HTTP. Raises `CeilingFailed`."""
        group = Group(name="streams", conversations=streams, prompt_tokens=_PROMPT_TOKENS, output_tokens=self.tokens)
        scenario = Scenario(name="ceiling", about="", phases=(Phase(name="x", groups=(group,)),))
        texts = Texts(label, self.scale)
        player = load.Load(self.target, texts, time.perf_counter(), lambda: None, lambda sample: None)
        samples = load.run(player.scenario(scenario))
        rate = measures.decode_rate(samples)
        if rate is None:
            errors = {sample.error for sample in samples if sample.error is not None}
            raise CeilingFailed(
                f"{streams} streams never streamed together ({', '.join(sorted(errors)) or 'too short'})"
            )
        return rate

    def bare(self, label: str, streams: int) -> float:
        """The decode rate of the bare loop."""
        return self.loop.decode(streams, self.threads)


def against_http(
    model: Path,
    folder: Path,
    *,
    threads: Sequence[int],
    streams: Sequence[int],
    rounds: int,
    tokens: int,
    arguments: str = "",
    key: str | None = None,
    on_pair: Callable[[], None],
) -> list[Share]:
    """Alternate the bare loop and an own server, at each thread and stream count `rounds` times, after one unmeasured.

    Drafts and tiers are off, so that both sides decode the same batches and nothing else. `on_pair` hears of every
    pair, measured or not. Raises `CeilingFailed`, `load.TargetUnusable` and `servers.ServerFailed`.
    """
    found = []
    for count in threads:
        settings = _PLAIN | {
            "OCSERVE_ENGINE_THREADS_DECODE": str(count),
            "OCSERVE_ENGINE_THREADS_PREFILL": str(count),
            "OCSERVE_ENGINE_PARALLEL": str(max(streams)),
        }
        server = OwnServer(f"{arguments} {shlex.quote(str(model))}", folder / f"threads-{count}", settings)
        with ExitStack() as stack:
            stack.callback(server.stop)
            server.start()
            target = Target("HTTP", server.url, asyncio.run(load.first_model(server.url, key)), key)
            scale = asyncio.run(load.calibrate(target, "ceiling"))
            # Attention costs what the context is long: the template's tokens are part of it.
            prompt_tokens = _PROMPT_TOKENS + round(scale.overhead)
            loop = stack.enter_context(
                BareLoop(
                    model,
                    most_sequences=max(streams),
                    most_batch=_BATCH_TOKENS,
                    prompt_tokens=prompt_tokens,
                    tokens=tokens,
                    pool_tokens=server.cells(key),
                )
            )
            pair = _Pair(loop, replace(target, bias=loop.end_tokens), scale, count, tokens)
            found += _alternate(pair, streams, rounds, on_pair)
    best = {each: max(median(share.bare) for share in found if share.streams == each) for each in streams}
    return [msgspec.structs.replace(share, of_best=median(share.bare) / best[share.streams]) for share in found]


def _alternate(pair: _Pair, streams: Sequence[int], rounds: int, on_pair: Callable[[], None]) -> list[Share]:
    http: dict[int, list[float]] = {each: [] for each in streams}
    loop: dict[int, list[float]] = {each: [] for each in streams}
    for number in range(rounds + 1):
        for each in streams:
            sides = [(http, pair.http), (loop, pair.bare)]
            for rates, measure in sides if number % 2 else reversed(sides):
                rate = measure(f"{number}/{each}", each)
                if number:
                    rates[each].append(rate)
            on_pair()
    return [_share(pair.threads, each, http[each], loop[each]) for each in streams]


def _share(threads: int, streams: int, http: Sequence[float], bare: Sequence[float]) -> Share:
    name = f"{streams} streams, {threads} threads"
    ratio = measures.ratio(name, "decode tok/s", zip(http, bare, strict=True))
    assert ratio is not None
    return Share(threads=threads, streams=streams, http=tuple(http), bare=tuple(bare), ratio=ratio, of_best=1.0)
