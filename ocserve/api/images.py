"""Images inside requests: base64 text becomes the bytes of a file. What is in the file is for the engine to judge."""

from __future__ import annotations

import base64
import binascii

from ocserve.api import fields
from ocserve.errors import InvalidRequest
from ocserve.generation import Image
from ocserve.modelcard import ServedModel

_MAX_URL = 8192
MEDIA_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def require_vision(model: ServedModel, where: str) -> None:
    """Refuse an image that the model cannot see; `where` is what would have it look."""
    if "image" not in model.input_modalities:
        raise fields.unsupported(where, "this model reads no images.")


def of_base64(text: str, where: str) -> Image:
    """The image that `text` stands for, in the standard or the URL-safe alphabet, padded or not; at the beginning."""
    standard = text.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        data = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"Invalid '{where}': this is not base64.", param=where) from None
    if not data:
        raise InvalidRequest(f"Invalid '{where}': the image is empty.", param=where)
    return Image(data=data, at=0, where=where)


def of_url(url: str, model: ServedModel, where: str) -> Image:
    """The image that a data URL holds, or one that is to be fetched where the operator allows that."""
    if model.image_urls and url[:8].lower().startswith(("http://", "https://")):
        if len(url) > _MAX_URL:
            raise InvalidRequest(f"Invalid '{where}': an address has at most {_MAX_URL} characters.", param=where)
        return Image(data=b"", at=0, where=where, url=url)
    head, comma, data = url.partition(",")
    media_type, _, encoding = head.removeprefix("data:").partition(";")
    if not head.startswith("data:") or not comma:
        raise fields.unsupported(where, "images are sent as data URLs; this server fetches none.")
    if media_type.lower() not in MEDIA_TYPES or encoding.lower() != "base64":
        raise InvalidRequest(f"Invalid '{where}': expected a base64 data URL of {', '.join(MEDIA_TYPES)}.", param=where)
    return of_base64(data, where)
