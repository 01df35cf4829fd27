"""What an engine process is allowed and what it inherits."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from ocserve.engine.process import gpu_makers, spawn, usable_cores

REPORT = """
import os, resource, signal, socket, sys
from ocserve.engine.process import confine, inherited_socket
confine(int(sys.argv[1]))
end = inherited_socket(sys.argv[2])
descriptors = len(os.listdir('/proc/self/fd')) - 1
status = open('/proc/self/status').read()
facts = [resource.getrlimit(resource.RLIMIT_CORE)[0], descriptors, 'NoNewPrivs:\\t1' in status,
         open('/proc/self/oom_score_adj').read().strip(), signal.getsignal(signal.SIGTERM) == signal.SIG_IGN,
         'SECRET_KEY' in os.environ]
end.sendall(repr(facts).encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits differ elsewhere")
async def test_an_engine_process_is_confined_and_inherits_only_its_socket() -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PYTHON", "LD_"))}
    process, ours = await spawn((sys.executable, "-c", REPORT), environment)
    ours.setblocking(False)
    facts = eval(await asyncio.get_running_loop().sock_recv(ours, 4096))
    assert await process.wait() == 0
    ours.close()
    core, descriptors, no_new_privileges, oom, ignores_sigterm, has_secret = facts
    assert core == 0
    assert descriptors == 4  # standard streams and the socket
    assert no_new_privileges
    assert oom == "500"
    assert ignores_sigterm
    assert not has_secret


def test_at_least_one_core_is_usable() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("file", "found"),
    [("proc/driver/nvidia/version", "NVIDIA"), ("dev/nvidia0", "NVIDIA"), ("dev/kfd", "AMD"), ("dev/null", None)],
)
def test_gpus_are_found_by_their_drivers(tmp_path: Path, file: str, found: str | None) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert (found in gpu_makers(tmp_path)) == (found is not None)
