"""Probes of images, for models that take them: each format as a data URL, addresses, counts and wrong data."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

from ocserve.audit.subject import Probe, Subject, named
from ocserve.audit.verdict import Unproven, expect

# A red square of 32 x 32 pixels lies in `pictures/` in each format.
_FORMATS = ("png", "jpeg", "gif", "webp")
_ASK = "What colour is this?"


def data_url(kind: str) -> str:
    """The square as a data URL."""
    data = resources.files("ocserve.audit").joinpath("pictures", f"square.{kind}").read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _parts(*urls: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": _ASK}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]


def _needs_vision(subject: Subject) -> None:
    if not subject.takes("image"):
        raise Unproven("the listing names no image input for this model")


async def _taken(subject: Subject, kind: str) -> str:
    _needs_vision(subject)
    bare = await subject.chat(_ASK, max_tokens=1)
    seen = await subject.chat(_parts(data_url(kind)), max_tokens=4)
    more = seen.used("prompt_tokens") - bare.used("prompt_tokens")
    expect(more > 0, "the image does not count: it was dropped")
    return f"{more} tokens for 32 x 32 pixels"


def _format(kind: str) -> Probe:
    async def run(subject: Subject) -> str:
        return await _taken(subject, kind)

    run.__doc__ = f"An image in {kind.upper()} is taken as a data URL, and counts."
    return Probe(f"image-{kind}", run)


async def image_several(subject: Subject) -> str:
    """Several images in one message are taken, each counting."""
    _needs_vision(subject)
    one = await subject.chat(_parts(data_url("png")), max_tokens=1)
    two = await subject.chat(_parts(data_url("png"), data_url("jpeg")), max_tokens=1)
    expect(two.used("prompt_tokens") > one.used("prompt_tokens"), "a second image does not count")
    return f"{one.used('prompt_tokens')} and {two.used('prompt_tokens')} prompt tokens"


async def image_wrong(subject: Subject) -> str:
    """Data that is no image is a 400."""
    _needs_vision(subject)
    for url in ("data:image/png;base64,AAAA", "data:image/png;base64,%%%", "data:text/plain;base64,aGVsbG8=", "x"):
        reply = await subject.refused(_parts(url), max_tokens=1)
        expect(reply.status in (400, 413, 415, 422), f"what is no image is answered with status {reply.status}")
    return "4 wrong images refused"


async def image_url(subject: Subject) -> str:
    """An image's address is fetched, or refused by name; never ignored."""
    _needs_vision(subject)
    reply = await subject.refused(_parts("https://no-such-host.invalid/image.png"), max_tokens=1)
    expect(reply.status != 200, "an image that cannot be fetched was ignored")
    expect(reply.status < 500, f"an address that leads nowhere is answered with status {reply.status}")
    raise Unproven(
        f"addresses are refused (status {reply.status}); no public address of an image is known to the audit"
    )


PROBES = (*(_format(kind) for kind in _FORMATS), *named(image_several, image_wrong, image_url))
