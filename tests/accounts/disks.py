"""Disks that remember and disks that fail, as SQLite VFSs over the real one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import apsw

SECTOR = 512


@dataclass(frozen=True)
class Op:
    """A call for a file, or `told`: `name` was acknowledged.

    `offset` is a size for `truncate`; for `delete` whether the folder is synced.
    """

    kind: str
    name: str
    offset: int = 0
    data: bytes = b""


class _Disk(apsw.VFS):
    """Passes everything on; each call is shown to `before` first."""

    def __init__(self, name: str, before: Callable[[Op], None]) -> None:
        self.before = before
        super().__init__(name, "")

    def xOpen(self, name: object, flags: list[int]) -> _File:  # noqa: N802 - SQLite's name
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self.before(Op("open", Path(path).name))
        return _File(name, flags, Path(path).name, self.before)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.before(Op("delete", Path(filename).name, int(syncdir)))
        super().xDelete(filename, syncdir)

    def excepthook(self, *_: object) -> None:
        """What fails on purpose is no news."""


class _File(apsw.VFSFile):
    def __init__(self, name: object, flags: list[int], shown: str, before: Callable[[Op], None]) -> None:
        self._shown = shown
        self._before = before
        super().__init__("", name, flags)  # type: ignore[arg-type]

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._before(Op("write", self._shown, offset, bytes(data)))
        super().xWrite(data, offset)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._before(Op("read", self._shown))
        return super().xRead(amount, offset)

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._before(Op("truncate", self._shown, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._before(Op("sync", self._shown))
        super().xSync(flags)

    def xLock(self, level: int) -> None:  # noqa: N802
        self._before(Op("lock", self._shown))
        super().xLock(level)

    def xFileSize(self) -> int:  # noqa: N802
        self._before(Op("size", self._shown))
        return super().xFileSize()

    def excepthook(self, *_: object) -> None:
        """As above."""


@contextmanager
def disk(before: Callable[[Op], None]) -> Iterator[str]:
    """The name of a VFS that shows `before` what is about to happen; what that raises, SQLite sees."""
    name = f"disk-{random.getrandbits(64):x}"
    made = _Disk(name, before)
    try:
        yield name
    finally:
        made.unregister()


@dataclass
class Image:
    """A file as power loss may leave it: what was synced, and what was done since."""

    synced: bytearray = field(default_factory=bytearray)
    since: list[Op] = field(default_factory=list)
    exists: bool = False
    perhaps_deleted: bool = False

    def do(self, op: Op) -> None:
        if op.kind == "delete":
            if op.offset:
                self.synced, self.since, self.exists = bytearray(), [], False
            self.perhaps_deleted = not op.offset
        elif op.kind == "sync":
            for each in self.since:
                _apply(self.synced, each)
            self.since, self.exists = [], True
        elif op.kind in ("write", "truncate"):
            if self.perhaps_deleted:  # made anew
                self.synced, self.since, self.perhaps_deleted = bytearray(), [], False
            self.since.append(op)

    def after_power_loss(self, chance: random.Random) -> bytes | None:
        """What is found afterwards; None: nothing. Unsynced work is lost, done in part, or done out of order."""
        if self.perhaps_deleted and chance.random() < 0.5:
            return None
        content = bytearray(self.synced)
        fate = chance.choice(("lost", "kept", "some", "some", "torn"))
        kept = [] if fate == "lost" else list(self.since)
        if fate in ("some", "torn"):
            kept = [op for op in kept if chance.random() < 0.5]
            chance.shuffle(kept)
        for op in kept:
            _apply(content, _torn(op, chance) if fate == "torn" and op.kind == "write" else op)
        return bytes(content) if self.exists or kept else None


class Folder:
    """A folder of such files, which starts with some empty ones."""

    def __init__(self, *names: str) -> None:
        self._files = {name: Image(exists=True) for name in names}

    def do(self, op: Op) -> None:
        file = self._files.setdefault(op.name, Image())
        if op.kind == "sync" and not file.exists:  # SQLite syncs the folder too, with what was deleted from it
            self._files = {name: each for name, each in self._files.items() if not each.perhaps_deleted}
        file.do(op)

    def after_power_loss(self, chance: random.Random) -> dict[str, bytes]:
        """The files that are found afterwards."""
        found = {name: file.after_power_loss(chance) for name, file in self._files.items()}
        return {name: content for name, content in found.items() if content is not None}


def _torn(op: Op, chance: random.Random) -> Op:
    """Some sectors of a write."""
    sectors = max(1, len(op.data) // SECTOR)
    first = chance.randrange(sectors)
    last = chance.randrange(first, sectors) + 1
    end = len(op.data) if last == sectors else last * SECTOR
    return Op("write", op.name, op.offset + first * SECTOR, op.data[first * SECTOR : end])


def _apply(content: bytearray, op: Op) -> None:
    if op.kind == "truncate":
        del content[op.offset :]
        return
    if len(content) < op.offset:
        content.extend(bytes(op.offset - len(content)))
    content[op.offset : op.offset + len(op.data)] = op.data
