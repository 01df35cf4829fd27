"""A cursor over a GGUF file that trusts no length: it reads through a window and knows how many bytes are left."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

from ocserve.catalog.errors import GgufInvalid

WINDOW = 256 * 1024

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


class Reader:
    """A forward cursor over the file that knows how many bytes are left and holds one window of them."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._window = b""
        self._start = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return self._size - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes; the caller has bounded `count`."""
        if count > self.left:
            raise GgufInvalid(f"the file ends inside its header, at byte {self._size}")
        if self._at + count > len(self._window):
            self._start, self._at = self.position, 0
            self._file.seek(self._start)
            self._window = self._file.read(min(max(count, WINDOW), self._size - self._start))
            if len(self._window) < count:
                raise GgufInvalid("the file became shorter while it was read")
        begin, self._at = self._at, self._at + count
        return self._window[begin : self._at]

    def skip(self, count: int) -> None:
        """Move on by `count` bytes without reading them."""
        if count > self.left:
            raise GgufInvalid(f"a value at byte {self.position} reaches beyond the end of the file")
        self._at += count
        if self._at > len(self._window):
            self._start, self._at, self._window = self.position, 0, b""

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def string_length(self, what: str, longest: int) -> int:
        length = self.u64()
        if length > self.left:
            raise GgufInvalid(f"{what} claims {length} bytes, and {self.left} are left in the file")
        if length > longest:
            raise GgufInvalid(f"{what} claims {length} bytes; at most {longest} are allowed")
        return length

    def text(self, what: str, longest: int) -> str:
        raw = self.take(self.string_length(what, longest))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise GgufInvalid(f"{what} is not UTF-8") from None
        if "\0" in text:
            raise GgufInvalid(f"{what} contains a NUL")
        return text

    def pass_strings(self, count: int, longest: int, marks: bytearray | None) -> None:
        """Move over `count` strings, each at most `longest` bytes; set `marks[i]` where string i is a byte token."""
        done = 0
        while done < count:
            done = self._pass_whole_strings(done, count, longest, marks)
            if done < count:  # this one does not lie wholly inside the window
                length = self.string_length("a string in an array", longest)
                if marks is not None and length == 6:
                    marks[done] = _BYTE_TOKEN.fullmatch(self.take(6)) is not None
                else:
                    self.skip(length)
                done += 1

    def _pass_whole_strings(self, done: int, count: int, longest: int, marks: bytearray | None) -> int:
        window, at, end = self._window, self._at, len(self._window)
        unpack, is_byte_token = _U64.unpack_from, _BYTE_TOKEN.match
        while done < count and at + 8 <= end:
            length = unpack(window, at)[0]
            if length > longest or at + 8 + length > end:
                break
            if marks is not None and length == 6 and is_byte_token(window, at + 8):
                marks[done] = 1
            at += 8 + length
            done += 1
        self._at = at
        return done
