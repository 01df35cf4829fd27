"""Image files for requests: good ones in every format, and those that a server must not fall for."""

from __future__ import annotations

import base64
import functools
import io
import struct
import zlib

from PIL import Image

SIZE = (48, 40)


def picture(kind: str = "PNG", *, seed: int = 1, size: tuple[int, int] = SIZE) -> bytes:
    """A file of an image that depends on `seed`; an animation where the format has them."""
    frames = [
        Image.linear_gradient("L").rotate(37 * seed + 90 * number).resize(size).convert("RGB") for number in range(2)
    ]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if kind in ("GIF", "WEBP") else {}
    frames[0].save(file, kind, **more)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claimed(width: int, height: int) -> bytes:
    """A small PNG whose header says that it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 65_536)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a compressed comment of a gigabyte's kind: 16 MiB of zeros in each of sixteen chunks."""
    bomb = b"Comment\0\0" + zlib.compress(b"\0" * (16 * 1024 * 1024), 9)
    good = picture("PNG")
    return good[:33] + _chunk(b"zTXt", bomb) * 16 + good[33:]


def scan_bomb() -> bytes:
    """A progressive JPEG that goes over its image hundreds of times, in a few bytes each."""
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 500 + data[-2:]


def exif_bomb(kind: str) -> bytes:
    """A good image of two megabytes whose metadata say 60,000 times that a value is all of these megabytes.

    It is turned by 90 degrees all the same.
    """
    bulk = bytes(1 << 21 if kind != "JPEG" else 1 << 13)
    count = 60_000 if kind != "JPEG" else 4_000
    entries = [struct.pack("<HHLL", 0x0112, 3, 1, 6)]
    entries += [struct.pack("<HHLL", 0x0113 + number, 7, len(bulk), 8) for number in range(count)]
    exif = b"II*\0" + struct.pack("<LH", 8, len(entries)) + b"".join(entries) + bulk
    good = picture(kind)
    if kind == "PNG":
        return good[:33] + _chunk(b"eXIf", exif) + good[33:]
    if kind == "JPEG":
        exif = b"Exif\0\0" + exif
        assert len(exif) < 1 << 16
        return good[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + good[2:]
    file = io.BytesIO()
    Image.open(io.BytesIO(good)).save(file, kind, exif=exif)
    return file.getvalue()


@functools.cache
def hostile() -> dict[str, bytes]:
    """What must be refused, by what is wrong with it."""
    png, jpeg, gif, webp = (picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP"))
    bmp = io.BytesIO()
    Image.new("RGB", SIZE).save(bmp, "BMP")
    tiff = io.BytesIO()
    Image.new("RGB", SIZE).save(tiff, "TIFF")
    return {
        "no image": b"hello, world",
        "png cut in its header": png[:20],
        "png cut in its data": png[: len(png) // 2],
        "jpeg cut off": jpeg[: len(jpeg) // 2],
        "gif cut off": gif[:40],
        "webp cut off": webp[: len(webp) // 2],
        "claims 50,000 by 50,000 pixels": claimed(50_000, 50_000),
        "claims a side of 2^31 - 1": claimed(2**31 - 1, 1),
        "less data than its header claims": claimed(2_000, 2_000),
        "1 by 5000": picture(size=(1, 5000)),
        "a bitmap": bmp.getvalue(),
        "a tiff": tiff.getvalue(),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "text bomb": text_bomb(),
        "scan bomb": scan_bomb(),
    }
