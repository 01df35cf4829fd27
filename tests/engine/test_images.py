"""Image files as pixels: every format, how an image is held, and what is refused before and while it is decoded."""

from __future__ import annotations

import io
import resource

import pytest
from PIL import Image as Pillow

from ocserve.config import Images
from ocserve.engine.images import check, decode
from ocserve.errors import InvalidRequest
from ocserve.generation import Image
from tests.e2e.pictures import SIZE, claimed, hostile, picture

LIMITS = Images()


def given(data: bytes) -> Image:
    return Image(data=data, at=0, where="messages[1].content[0].image_url.url")


def saved(image: Pillow.Image, kind: str, **rest: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **rest)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_every_format_is_decoded_by_its_first_frame(kind: str) -> None:
    read = decode(given(picture(kind)), LIMITS)
    assert (read.width, read.height, len(read.rgb)) == (*SIZE, 3 * SIZE[0] * SIZE[1])
    first = Pillow.open(io.BytesIO(picture(kind))).convert("RGB").tobytes()
    assert read.rgb == first
    assert read.digest != decode(given(picture(kind, seed=2)), LIMITS).digest


def test_files_of_the_same_pixels_are_the_same_image() -> None:
    pixels = Pillow.open(io.BytesIO(picture("PNG")))
    again = decode(given(saved(pixels, "WEBP", lossless=True)), LIMITS)
    assert again.digest == decode(given(picture("PNG")), LIMITS).digest
    wide, tall = Pillow.new("RGB", (8, 2)), Pillow.new("RGB", (2, 8))
    assert decode(given(saved(wide, "PNG")), LIMITS).digest != decode(given(saved(tall, "PNG")), LIMITS).digest


def test_an_image_stands_as_its_camera_was_held() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was held upright
    read = decode(given(saved(Pillow.new("RGB", (60, 40)), "JPEG", exif=exif)), LIMITS)
    assert (read.width, read.height) == (40, 60)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Pillow.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),
        (Pillow.new("LA", (4, 4), (10, 255)), (10, 10, 10)),
        (Pillow.new("L", (4, 4), 77), (77, 77, 77)),
        (Pillow.new("1", (4, 4), 1), (255, 255, 255)),
        (Pillow.new("I;16", (4, 4), 0x8000), (128, 128, 128)),
        (Pillow.new("P", (4, 4), 0), (0, 0, 0)),
    ],
    ids=["transparent", "grey with alpha", "grey", "black and white", "16 bits", "palette"],
)
def test_every_mode_becomes_colours_on_white(image: Pillow.Image, expected: tuple[int, int, int]) -> None:
    assert tuple(decode(given(saved(image, "PNG")), LIMITS).rgb[:3]) == expected


@pytest.mark.parametrize("wrong", hostile())
def test_what_is_no_good_image_is_refused_by_name(wrong: str) -> None:
    image = given(hostile()[wrong])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest) as caught:
        decode(image, LIMITS)
    assert caught.value.param == "messages[1].content[0].image_url.url"
    assert caught.value.code in {"invalid_image", "image_too_large", "unsupported_image_format"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_limits_of_number_bytes_and_pixels_are_exact() -> None:
    data = picture("PNG")
    exact = Images(max_count=2, max_file_bytes=len(data), max_pixels=SIZE[0] * SIZE[1])
    check((given(data), given(data)), exact)
    for images, limits in (
        ((given(data),) * 3, exact),
        ((given(data),), Images(max_file_bytes=len(data) - 1)),
        ((given(data),), Images(max_pixels=SIZE[0] * SIZE[1] - 1)),
        ((given(data),), Images(max_count=0)),
    ):
        with pytest.raises(InvalidRequest):
            check(images, limits)


def test_a_huge_claim_is_judged_by_its_header() -> None:
    with pytest.raises(InvalidRequest, match="40000000 pixels"):
        check((given(claimed(50_000, 1_000)),), LIMITS)
