"""Image files as pixels: every format, how an image is held, and what is refused before and while it is decoded."""

from __future__ import annotations

import io
import math
import struct
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress

import pytest
from msgspec.structs import replace
from PIL import Image as Pillow
from PIL import ImageOps

from ocserve.config import Images
from ocserve.engine import images, jpeg, pictures
from ocserve.engine.images import Picture
from ocserve.engine.pictures import Pictures
from ocserve.errors import InvalidRequest
from ocserve.generation import Image
from tests.cost import peak_bytes
from tests.e2e.pictures import SIZE, claimed, exif_bomb, hostile, picture

LIMITS = Images()


def given(data: bytes) -> Image:
    return Image(data=data, at=0, where="messages[1].content[0].image_url.url")


def decode(image: Image, limits: Images = LIMITS) -> Picture:
    return images.decode(image, limits, math.inf)


def check(given: Iterable[Image], limits: Images = LIMITS) -> None:
    images.check(given, limits, math.inf)


def saved(image: Pillow.Image, kind: str, **rest: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **rest)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_every_format_is_decoded_by_its_first_frame(kind: str) -> None:
    read = decode(given(picture(kind)))
    assert (read.width, read.height, len(read.rgb)) == (*SIZE, 3 * SIZE[0] * SIZE[1])
    first = Pillow.open(io.BytesIO(picture(kind))).convert("RGB").tobytes()
    assert read.rgb == first
    assert read.digest != decode(given(picture(kind, seed=2))).digest


def test_files_of_the_same_pixels_are_the_same_image() -> None:
    pixels = Pillow.open(io.BytesIO(picture("PNG")))
    again = decode(given(saved(pixels, "WEBP", lossless=True)))
    assert again.digest == decode(given(picture("PNG"))).digest
    wide, tall = Pillow.new("RGB", (8, 2)), Pillow.new("RGB", (2, 8))
    assert decode(given(saved(wide, "PNG"))).digest != decode(given(saved(tall, "PNG"))).digest


def test_an_image_stands_as_its_camera_was_held() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was held upright
    read = decode(given(saved(Pillow.new("RGB", (60, 40)), "JPEG", exif=exif)))
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
    assert tuple(decode(given(saved(image, "PNG"))).rgb[:3]) == expected


@pytest.mark.parametrize("wrong", hostile())
def test_what_is_no_good_image_is_refused_by_name(wrong: str) -> None:
    image = given(hostile()[wrong])

    def refused() -> pytest.ExceptionInfo[InvalidRequest]:
        with pytest.raises(InvalidRequest) as caught:
            decode(image)
        return caught

    assert peak_bytes(refused) < 64 * 1024 * 1024
    caught = refused()
    assert caught.value.param == "messages[1].content[0].image_url.url"
    assert caught.value.code in {"invalid_image", "image_too_large", "unsupported_image_format"}


def test_limits_of_number_bytes_and_pixels_are_exact() -> None:
    data = picture("PNG")
    exact = Images(
        max_count=2, max_file_bytes=len(data), max_pixels=SIZE[0] * SIZE[1], max_total_pixels=2 * SIZE[0] * SIZE[1]
    )
    check((given(data), given(data)), exact)
    for files, limits in (
        ((given(data),) * 3, exact),
        ((given(data),), Images(max_file_bytes=len(data) - 1)),
        ((given(data),), Images(max_pixels=SIZE[0] * SIZE[1] - 1)),
        ((given(data),) * 2, Images(max_total_pixels=2 * SIZE[0] * SIZE[1] - 1)),
        ((given(data),), Images(max_count=0)),
    ):
        with pytest.raises(InvalidRequest):
            check(files, limits)


def test_a_huge_claim_is_judged_by_its_header() -> None:
    with pytest.raises(InvalidRequest, match="40000000 pixels"):
        check((given(claimed(50_000, 1_000)),))


def test_an_extended_webp_is_judged_by_its_header_before_it_is_opened() -> None:
    size = struct.pack("<I", (1 << 14) - 1)[:3]
    data = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<IBBH", 10, 2, 0, 0) + size + size
    with pytest.raises(InvalidRequest, match="40000000 pixels"):
        check((given(data),))


def test_the_first_frame_of_an_animation_may_not_exceed_its_screen() -> None:
    data = bytearray(saved(Pillow.new("P", (2_000, 1_000)), "GIF"))
    data[6:10] = struct.pack("<HH", 10, 10)
    with pytest.raises(InvalidRequest, match="1000000 pixels"):
        check((given(bytes(data)),), Images(max_pixels=1_000_000))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_as_with_all_its_metadata(mode: str, progressive: bool) -> None:
    pixels = Pillow.open(io.BytesIO(picture("PNG"))).convert(mode)
    rest = {"progressive": progressive, "icc_profile": bytes(100_000), "comment": b"said", "restart_marker_rows": 1}
    data = saved(pixels, "JPEG", **rest)
    found = jpeg.read(data)
    assert found.scans == len(data.split(b"\xff\xda")) - 1
    assert len(found.data) < len(data) - 100_000
    assert decode(given(data)).rgb == Pillow.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_metadata_that_multiply_themselves_cost_nothing(kind: str) -> None:
    data = exif_bomb(kind)
    assert peak_bytes(lambda: check((given(data),))) < 64 * 1024 * 1024
    assert peak_bytes(lambda: decode(given(data))) < 64 * 1024 * 1024
    read = decode(given(data))
    assert (read.width, read.height) == (SIZE[1], SIZE[0])


def behind(mark: bytes, data: bytes, at: int, most: int = 0xFFFF) -> bytes:
    """The file with what follows the position `at` behind a mark that seems to be a segment of that."""
    return data[:at] + mark + struct.pack(">H", min(most, len(data) - at)) + data[at:]


@pytest.mark.parametrize("mark", [b"\xff\0", b"\xff\x01", b"\xff\xd0", b"\xff\x02", b"\xff\xc8", b"\xff\xf0"])
def test_nothing_hides_behind_what_decoders_pass_over(mark: bytes) -> None:
    """Pillow and libjpeg skip some of these marks and read what lies behind them."""
    found = jpeg.read(behind(mark, exif_bomb("JPEG"), 2))
    with suppress(Pillow.UnidentifiedImageError):
        assert "exif" not in Pillow.open(io.BytesIO(found.data), formats=["JPEG"]).info
    bomb = hostile()["scan bomb"]
    first = bomb.index(b"\xff\xda", bomb.index(b"\xff\xda") + 2)
    hidden = jpeg.read(behind(mark, bomb, first))
    assert hidden.scans > 500 or hidden.data.count(b"\xff\xda") == hidden.scans


def test_a_segment_that_is_shorter_than_its_length_is_refused() -> None:
    good = picture("JPEG")
    with pytest.raises(jpeg.NotJpeg):
        jpeg.read(good[:2] + b"\xff\xe0\0\0" + good[2:])


def test_fill_before_a_marker_costs_nothing() -> None:
    good = picture("JPEG")
    assert decode(given(good[:2] + bytes([255]) * (1 << 20) + good[2:])).rgb == decode(given(good)).rgb
    begun = time.process_time()
    jpeg.read(good[:2] + bytes([255]) * (16 << 20) + good[2:])
    assert time.process_time() - begun < 1.0  # 0.02 s; a step of Python for each byte would take 3 s


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("order", ["II*\0", "MM\0*"])
def test_every_way_to_hold_a_camera(value: int, order: str) -> None:
    ends = "<" if order.startswith("I") else ">"
    exif = order.encode() + struct.pack(ends + "LHHHLHHL", 8, 1, 0x0112, 3, 1, value, 0, 0)
    file = Pillow.open(io.BytesIO(saved(Pillow.open(io.BytesIO(picture("PNG"))), "PNG", exif=exif)))
    expected = ImageOps.exif_transpose(file)
    read = decode(given(saved(file, "PNG", exif=exif)))
    assert (read.width, read.height, read.rgb) == (*expected.size, expected.tobytes())


def test_a_jpeg_of_endless_segments_is_none() -> None:
    good = picture("JPEG")
    with pytest.raises(InvalidRequest):
        check((given(good[:2] + b"\xff\xfe\0\2" * 20_000 + good[2:]),))


def test_what_takes_too_long_is_given_up_within_a_part_of_it() -> None:
    """Every chunk of a PNG costs its reader some microseconds, and a file has room for more than a million."""
    good = picture("PNG")
    empty = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    slow = given(good[:33] + empty * 200_000 + good[33:])
    begun = time.monotonic()
    for read in (lambda: images.check((slow,), LIMITS, begun + 0.1), lambda: images.decode(slow, LIMITS, begun + 0.1)):
        with pytest.raises(InvalidRequest, match="too long"):
            read()


def test_all_images_of_a_request_have_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sees:
        def divide(self, picture: Picture, again: object) -> list[tuple[int, ...]]:
            return [(1,)]

    reader = Pictures(Sees(), LIMITS, most_whole=64)  # type: ignore[arg-type]
    assert reader.read([given(picture())] * 3, 100) == [[(1,)]] * 3
    reader.limits = replace(LIMITS, max_count=2)  # as a reload has it
    with pytest.raises(InvalidRequest):
        reader.read([given(picture())] * 3, 100)
    monkeypatch.setattr(pictures, "_LONGEST_S", -1.0)
    with pytest.raises(InvalidRequest, match="too long") as caught:
        reader.read([given(picture())], 100)
    assert caught.value.param == "messages[1].content[0].image_url.url"
