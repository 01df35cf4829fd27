"""The server over HTTP beside the bare llama.cpp loop, alternating in one session.

Both decode greedily at the same thread count, with as many sequences as streams, after prompts of about the same
length; tokens that end an answer are kept from being chosen on both sides. A rate is tokens over the time while all
sequences are decoding. Only one side computes at a time.
"""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec

from ocserve import config
from ocserve.bench import load, measures
from ocserve.bench.client import Target
from ocserve.bench.measures import Ratio
from ocserve.bench.scenario import Group, Phase, Scenario
from ocserve.bench.servers import OwnServer
from ocserve.bench.text import Texts

_PROMPT_TOKENS = 64
_TIMEOUT_S = 3600.0
# As engine processes have it: with OpenMP's default, threads that wait for one another spin.
_WAITING = {"GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1"}


class CeilingFailed(Exception):
    """The bare loop or the server could not be measured; the text says why."""


class Rates(msgspec.Struct, frozen=True):
    """The bare loop at one thread count, tokens per second: prefill by batch size, decode by sequences."""

    threads: int
    prefill: dict[int, float]
    decode: dict[int, float]


class Ceiling(msgspec.Struct, frozen=True):
    """What `ocserve.engine.ceiling` prints."""

    end_tokens: tuple[int, ...]
    rates: tuple[Rates, ...]


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


def bare(
    model: Path,
    *,
    threads: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[int] = (16, 64, 256),
    tokens: int = 128,
) -> Ceiling:
    """Measure the bare loop in a process of its own. Raises `CeilingFailed`."""
    argv = [sys.executable, "-m", "ocserve.engine.ceiling", str(model)]
    for flag, values in (("--threads", threads), ("--batch", batches), ("--chunk", chunks)):
        argv += [flag, *map(str, values)]
    argv += ["--prompt-tokens", str(_PROMPT_TOKENS), "--tokens", str(tokens)]
    try:
        finished = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=config.engine_environment() | _WAITING,
        )
    except subprocess.TimeoutExpired:
        raise CeilingFailed("the bare loop took too long") from None
    if finished.returncode != 0:
        *_, last = finished.stderr.strip().splitlines() or ["no message"]
        raise CeilingFailed(f"the bare loop ended with status {finished.returncode}: {last}")
    return msgspec.json.decode(finished.stdout, type=Ceiling)


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
    on_round: Callable[[], None],
) -> list[Share]:
    """Alternate the bare loop and an own server `rounds` times at each thread count, after one unmeasured round.

    Drafts are off, so that both sides decode the same batches. Raises `CeilingFailed`, `load.TargetUnusable` and
    `servers.ServerFailed`.
    """
    found = []
    for count in threads:
        settings = f"OCSERVE_ENGINE_THREADS_DECODE={count} OCSERVE_ENGINE_THREADS_PREFILL={count}"
        words = f"{settings} OCSERVE_ENGINE_SPECULATION=off OCSERVE_ENGINE_PARALLEL={max(streams)} {arguments} "
        server = OwnServer(f"{words} {shlex.quote(str(model))}", folder / f"threads-{count}")
        server.start()
        try:
            found += _alternate(server, model, count, streams, rounds=rounds, tokens=tokens, key=key, on_round=on_round)
        finally:
            server.stop()
    best = {each: max(median(share.bare) for share in found if share.streams == each) for each in streams}
    return [msgspec.structs.replace(share, of_best=median(share.bare) / best[share.streams]) for share in found]


def _alternate(
    server: OwnServer,
    model: Path,
    threads: int,
    streams: Sequence[int],
    *,
    rounds: int,
    tokens: int,
    key: str | None,
    on_round: Callable[[], None],
) -> list[Share]:
    target = Target("HTTP", server.url, asyncio.run(load.first_model(server.url, key)), key)
    end_tokens = bare(model, threads=[threads], batches=[1], chunks=[64], tokens=8).end_tokens
    target = replace(target, bias=end_tokens)
    scale = asyncio.run(load.calibrate(target, "ceiling"))
    http: dict[int, list[float]] = {each: [] for each in streams}
    loop: dict[int, list[float]] = {each: [] for each in streams}
    for number in range(rounds + 1):
        sides: list[Callable[[], dict[int, float]]] = [
            lambda: bare(model, threads=[threads], batches=streams, chunks=[64], tokens=tokens).rates[0].decode,
            lambda: _http(target, Texts(f"ceiling/{number}", scale), streams, tokens),  # noqa: B023 -- called here
        ]
        order = (0, 1) if number % 2 == 0 else (1, 0)
        rates = {side: sides[side]() for side in order}
        on_round()
        if number:
            for each in streams:
                loop[each].append(rates[0][each])
                http[each].append(rates[1][each])
    shares = []
    for each in streams:
        ratio = measures.ratio(
            f"{each} streams, {threads} threads", "decode tok/s", zip(http[each], loop[each], strict=True)
        )
        assert ratio is not None
        shares.append(
            Share(
                threads=threads,
                streams=each,
                http=tuple(http[each]),
                bare=tuple(loop[each]),
                ratio=ratio,
                of_best=1.0,
            )
        )
    return shares


def _http(target: Target, texts: Texts, streams: Sequence[int], tokens: int) -> dict[int, float]:
    """The decode rate of each stream count."""
    phases = tuple(
        Phase(
            name=f"x{each}",
            groups=(Group(name="streams", conversations=each, prompt_tokens=_PROMPT_TOKENS, output_tokens=tokens),),
        )
        for each in streams
    )
    scenario = Scenario(name="ceiling", about="", phases=phases)
    player = load.Load(target, texts, time.perf_counter(), lambda: None, lambda sample: None)
    samples = asyncio.run(player.scenario(scenario))
    rates = {}
    for each in streams:
        rate = measures.decode_rate(measures.cell(samples, f"x{each}", "streams"))
        if rate is None:
            errors = {sample.error for sample in samples if sample.error is not None}
            raise CeilingFailed(f"{each} streams never streamed together ({', '.join(sorted(errors)) or 'too short'})")
        rates[each] = rate
    return rates
