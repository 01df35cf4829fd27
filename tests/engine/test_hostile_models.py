"""P18, second half: files that native code should never see, fed to the engine process all the same.

The header validator is left out on purpose. Whatever llama.cpp makes of the file, the front must learn of it as a
`LoadError` or get a working engine, and no process may be left.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import psutil
import pytest

from ocserve.engine.handle import EngineHandle, LoadError, Supervision
from ocserve.engine.wire import EngineSpec


def mutated(chance: random.Random, content: bytes, header_bytes: int) -> bytes:
    """One to four wounds: flipped bits, numbers replaced by extremes, cuts, swapped pieces; most in the header."""
    wounded = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        position = chance.randrange(header_bytes if chance.random() < 0.9 else len(wounded))
        match chance.randrange(5):
            case 0:
                wounded[position] ^= 1 << chance.randrange(8)
            case 1:
                number = chance.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, chance.randrange(2**32)))
                wounded[position : position + 4] = struct.pack("<I", number)
            case 2:
                number = chance.choice((0, 2**31, 2**32, 2**60, 2**63, 2**64 - 1))
                wounded[position : position + 8] = struct.pack("<Q", number)
            case 3:
                del wounded[len(wounded) - chance.randrange(1, len(wounded) // 2) :]
            case 4:
                other = chance.randrange(header_bytes)
                wounded[position : position + 8], wounded[other : other + 8] = (
                    wounded[other : other + 8],
                    wounded[position : position + 8],
                )
        if len(wounded) < 64:
            break
        header_bytes = min(header_bytes, len(wounded))
    return bytes(wounded)


def children() -> set[int]:
    """Processes below this one; other tests may keep servers."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def load(path: Path) -> str:
    """`ready` or `refused`; anything else raises."""
    spec = EngineSpec(
        path=str(path),
        context=256,
        parallel=1,
        pool_tokens=256,
        gpu_layers=0,
        require_gpu=False,
        threads_decode=1,
        threads_prefill=1,
        batch_tokens=32,
    )
    engine = EngineHandle(spec, dict(os.environ), Supervision(load_timeout_s=20))
    try:
        await engine.open()
    except LoadError:
        return "refused"
    finally:
        await engine.close()
    return "ready"


async def test_p18_hostile_files_never_hurt_the_front(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    content = tiny_model.read_bytes()
    header_bytes = content.index(b"output_norm.weight") + 1500
    path = tmp_path / "hostile.gguf"
    outcomes = {"ready": 0, "refused": 0}
    before = children()
    for _ in range(500 if full else 25):
        path.write_bytes(mutated(chance, content, header_bytes))
        outcomes[await load(path)] += 1
        assert children() <= before
    print(outcomes)
    assert outcomes["refused"] > 0


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 1000, b"not a model at all"])
async def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(content)
    assert await load(path) == "refused"
