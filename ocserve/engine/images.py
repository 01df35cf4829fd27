"""Image files as pixels, under limits: a file is judged by its header before anything of it is decoded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image as Pillow
from PIL import ImageOps

from ocserve.config import Images
from ocserve.errors import InvalidRequest
from ocserve.generation import Image

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")
_BYTES_PER_PIXEL = 3
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


def check(images: Iterable[Image], limits: Images) -> None:
    """Refuse what exceeds a limit before any image is decoded; raises `InvalidRequest`, which names the part."""
    for number, image in enumerate(images, start=1):
        if number > limits.max_count:
            raise _refused(image, f"a request has at most {limits.max_count} images.", "too_many_images")
        if len(image.data) > limits.max_file_bytes:
            most = f"an image file has at most {limits.max_file_bytes} bytes, this one has {len(image.data)}."
            raise _refused(image, most, "image_too_large")
        with _opened(image) as file:
            _check_size(image, file, limits)


def decode(image: Image, limits: Images) -> Picture:
    """The pixels of a file, of an animation those of its first frame; raises `InvalidRequest`, which names the part.

    The image stands as its camera was held (Exif), and on white where it is transparent.
    """
    with _opened(image) as file:
        _check_size(image, file, limits)
        try:
            rgb = _on_white(ImageOps.exif_transpose(file))
            return Picture(rgb.width, rgb.height, rgb.tobytes())
        except Exception:  # noqa: BLE001  # what a decoder raises for a damaged file is not bounded by its documentation
            raise _refused(image, "the image is damaged or cut off.", "invalid_image") from None


def _opened(image: Image) -> Pillow.Image:
    """The file with its header read; nothing is decoded yet."""
    try:
        return Pillow.open(io.BytesIO(image.data), formats=_FORMATS)
    except Exception:  # noqa: BLE001  # as above; Pillow's own limit of pixels included
        names = "JPEG, PNG, GIF or WebP"
        raise _refused(image, f"this is no {names} file that can be read.", "unsupported_image_format") from None


def _check_size(image: Image, file: Pillow.Image, limits: Images) -> None:
    width, height = file.size
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
    return Pillow.alpha_composite(Pillow.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def _refused(image: Image, reason: str, code: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{image.where}': {reason}", param=image.where, code=code)
