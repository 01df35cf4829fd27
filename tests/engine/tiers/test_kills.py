"""A process that is killed while it writes leaves nothing that a later one takes for a stored prefix."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

from ocserve.engine.tiers.disk import DiskTier

LIMIT_BYTES = 8 * 1024 * 1024

# Writes without end; the payload under a key follows from the key. The limit makes it remove files as well.
_WRITER = f"""
import hashlib, itertools, random, sys
from pathlib import Path
from ocserve.engine.tiers.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), b"model", {LIMIT_BYTES}, sys.exit)
chance = random.Random(int(sys.argv[2]))
for number in itertools.count():
    key = hashlib.sha256(str(chance.randrange(60)).encode()).digest()
    tier.put(key, key * chance.choice((1, 1000, 20000)))
    if number == 20:
        print("writing", flush=True)
    if number % 10 == 0:
        tier.flush(10)
"""


def test_a_killed_writer_leaves_only_whole_files(tmp_path: Path, full: bool) -> None:
    place = tmp_path / "prefixes"
    reasons: list[str] = []
    hits = 0
    for seed in range(100 if full else 20):
        command = [sys.executable, "-c", _WRITER, str(place), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            time.sleep(random.Random(seed).uniform(0, 0.03))
            writer.kill()
        tier = DiskTier(place, b"model", LIMIT_BYTES, reasons.append)
        for number in range(60):
            key = hashlib.sha256(str(number).encode()).digest()
            found = tier.get(key)
            hits += found is not None
            assert found is None or bytes(found) in (key, key * 1000, key * 20000)
        # Nothing was torn: a file has its name only when it is whole.
        assert tier.stats().rejected == 0
        tier.close()
        present = sum(file.stat().st_size for file in place.rglob("*.kv"))
        assert present <= LIMIT_BYTES
    assert hits > 0
    assert reasons == []
