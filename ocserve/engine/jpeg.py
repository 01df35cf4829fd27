"""JPEG files before they are decoded: how often the decoder would pass over the image, and how the camera was held.

A progressive file may have thousands of scans of a few bytes, each a pass over every block. Metadata is taken out: its
parsers follow offsets that the file chooses, so that a small file could have them copy terabytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# The end of a scan's data: a marker that neither stands for a byte of it nor restarts the decoder.
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_BEHIND_FILL = re.compile(rb"[^\xff]")
_SCAN, _END = 0xDA, 0xD9
# What a decoder needs: frames, tables and scans, and of the application's own segments, for the colours, those of JFIF
# and of Adobe. Decoders differ in what they make of anything else, so that it could hide from one what another reads.
_KEPT = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDA, 0xDB, 0xDD, 0xE0, 0xEE))
_WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # 0: no marker at all, decoders pass over it
_EXIF, _EXIF_NAME = 0xE1, b"Exif\0\0"
_MOST_SEGMENTS = 10_000  # a colour profile of the largest file has 320


class NotJpeg(Exception):
    """The file is none, or none that a camera or a program would write."""


@dataclass(frozen=True, slots=True)
class Jpeg:
    """A file without its metadata; `exif` is what there was of one kind, empty if there was none."""

    data: bytes
    scans: int
    exif: bytes


def read(data: bytes) -> Jpeg:
    """Walk over the markers of a file; of one that is cut off as far as it goes. Raises `NotJpeg`."""
    kept, scans, exif = [data[:2]], 0, b""
    position = 2
    for _ in range(_MOST_SEGMENTS):
        begin = data.find(b"\xff", position)
        marked = _BEHIND_FILL.search(data, begin) if begin >= 0 else None  # any number of them may precede a marker
        if marked is None:
            return Jpeg(b"".join(kept), scans, exif)
        position = marked.start()
        marker = data[position]
        if marker == _END:
            kept.append(b"\xff\xd9")
            return Jpeg(b"".join(kept), scans, exif)
        if marker in _WITHOUT_LENGTH:
            position += 1
            continue
        length = int.from_bytes(data[position + 1 : position + 3])
        if length < 2:
            raise NotJpeg("a segment shorter than its own length")
        end = position + 1 + length
        if marker == _SCAN:
            scans += 1
            behind = _BEHIND_SCAN.search(data, end)
            end = behind.start() if behind else len(data)
        if marker == _EXIF and not exif and data.startswith(_EXIF_NAME, position + 3):
            exif = data[position + 3 : end]
        if marker in _KEPT:
            kept.append(b"\xff" + data[position:end])
        position = end
    raise NotJpeg(f"more than {_MOST_SEGMENTS} segments")


def orientation(exif: bytes) -> int:
    """How the image is to be turned: the value of Exif's tag 274, 1 … 8; 1 where it is not said."""
    tiff = exif.removeprefix(_EXIF_NAME)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return 1

    def number(begin: int, size: int) -> int:
        return int.from_bytes(tiff[begin : begin + size], "big" if order == "big" else "little")

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == 0x0112:
            return value if 1 <= (value := number(entry + 8, 2)) <= 8 else 1
    return 1
