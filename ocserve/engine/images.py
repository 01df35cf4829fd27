"""Image files as pixels, under limits: a file is judged by its header before anything of it is decoded."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image as Pillow

from ocserve.config import Images
from ocserve.engine import jpeg
from ocserve.engine.jpeg import orientation
from ocserve.errors import InvalidRequest
from ocserve.generation import Image

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
_JPEG, _RIFF = b"\xff\xd8\xff", b"RIFF"
# Encoders' own scripts have at most 18 (four colours); each scan is a pass over the whole image.
_MOST_SCANS = 32
# By Exif's value for how the camera was held.
_TURNED = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
# Beyond that, projectors that keep an image's shape make nothing of it; Qwen's own code refuses it too.
_MOST_STRETCHED = 200
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image: three bytes for each pixel, row by row."""

    width: int
    height: int
    rgb: bytes

    @property
    def digest(self) -> bytes:
        """Names the content; two files of the same pixels are the same image."""
        return hashlib.blake2b(
            self.rgb, digest_size=_DIGEST_BYTES, salt=self.width.to_bytes(8) + self.height.to_bytes(8)
        ).digest()


def check(images: Iterable[Image], limits: Images, until: float) -> None:
    """Refuse what exceeds a limit before any image is decoded; raises `InvalidRequest`, which names the part.

    `until` is when to give up, in monotonic seconds: a header may have as many parts as the file has room for.
    """
    pixels = 0
    for number, image in enumerate(images, start=1):
        if number > limits.max_count:
            raise _refused(image, f"a request has at most {limits.max_count} images.", "too_many_images")
        if len(image.data) > limits.max_file_bytes:
            most = f"an image file has at most {limits.max_file_bytes} bytes, this one has {len(image.data)}."
            raise _refused(image, most, "image_too_large")
        with _opened(image, limits, until) as file:
            pixels += file.width * file.height
        if pixels > limits.max_total_pixels:
            most = f"the images of a request have at most {limits.max_total_pixels} pixels together."
            raise _refused(image, most, "image_too_large")


def decode(image: Image, limits: Images, until: float) -> Picture:
    """The pixels of a file, of an animation those of its first frame; raises `InvalidRequest`, which names the part.

    The image stands as its camera was held (Exif), and on white where it is transparent. `until` is when to give up,
    in monotonic seconds; of WebP, which is decoded in one piece, only before that.
    """
    with _opened(image, limits, until) as file:
        try:
            file.load()
            method = _TURNED.get(orientation(file.info.get("exif", b"")))
            rgb = _on_white(file if method is None else file.transpose(method))
            return Picture(rgb.width, rgb.height, rgb.tobytes())
        except _TooSlow:
            raise _too_slow(image) from None
        except Exception:  # noqa: BLE001  # what a decoder raises for a damaged file is not bounded by its documentation
            raise _refused(image, "the image is damaged or cut off.", "invalid_image") from None


class _TooSlow(Exception):
    """An image was not decoded in time."""


class _Timed(io.BytesIO):
    """A file that is read until a moment: decoders and parsers ask for a piece after the other."""

    def __init__(self, data: bytes, until: float) -> None:
        super().__init__(data)
        self._until = until

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._until:
            raise _TooSlow
        return super().read(size)


def _opened(image: Image, limits: Images, until: float) -> Pillow.Image:
    """The file with its header read and within the limits; nothing is decoded yet."""
    data, exif = image.data, b""
    try:
        if data.startswith(_JPEG):
            found = jpeg.read(data)
            _check_scans(image, found.scans)
            data, exif = found.data, found.exif
        elif data.startswith(_RIFF):
            _check_size(image, *_webp_canvas(data), limits)
        file = Pillow.open(_Timed(data, until), formats=_FORMATS)
    except InvalidRequest:
        raise
    except _TooSlow:
        raise _too_slow(image) from None
    except Exception:  # noqa: BLE001  # as above; Pillow's own limit of pixels included
        names = "JPEG, PNG, GIF or WebP"
        raise _refused(image, f"this is no {names} file that can be read.", "unsupported_image_format") from None
    if exif:
        file.info["exif"] = exif
    _check_size(image, file.width, file.height, limits)
    return file


def _check_scans(image: Image, scans: int) -> None:
    if scans > _MOST_SCANS:
        most = f"a JPEG file has at most {_MOST_SCANS} scans, this one has {scans}."
        raise _refused(image, most, "image_too_large")


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """The size that an extended WebP file claims, up to 2^24 each: its decoder asks for that memory when it is opened.

    (1, 1) for the simple kinds, which have at most 2^14 and are judged when they have been opened.
    """
    if data[12:16] != b"VP8X":
        return 1, 1
    return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1


def _check_size(image: Image, width: int, height: int, limits: Images) -> None:
    if width * height > limits.max_pixels:
        most = f"an image has at most {limits.max_pixels} pixels, this one has {width} × {height}."
        raise _refused(image, most, "image_too_large")
    if max(width, height) > _MOST_STRETCHED * min(width, height):
        raise _refused(image, f"one side is more than {_MOST_STRETCHED} times the other.", "invalid_image")


def _on_white(file: Pillow.Image) -> Pillow.Image:
    if file.mode.startswith("I;16"):
        return file.point(lambda value: value * (1 / 256), "L").convert("RGB")
    if not file.has_transparency_data:
        return file.convert("RGB")
    coloured = file.convert("RGBA")
    white = Pillow.new("RGB", coloured.size, "white")
    white.paste(coloured, mask=coloured)
    return white


def _too_slow(image: Image) -> InvalidRequest:
    return _refused(image, "the images of this request take too long to decode.", "image_too_large")


def _refused(image: Image, reason: str, code: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{image.where}': {reason}", param=image.where, code=code)
