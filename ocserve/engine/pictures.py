"""The images of a prompt, from files to what stands for them among its tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ocserve.config import Images
from ocserve.engine.bindings import LlamaError
from ocserve.engine.images import check, decode
from ocserve.engine.vision import Projector, Tile
from ocserve.errors import ContextLengthExceeded, InvalidRequest
from ocserve.generation import Image

# For decoding a request's images: a third of what a preparation may take before the engine counts as hung.
_LONGEST_S = 10.0


class Pictures:
    """Reads images for one model, on the preparing thread. `most_whole` tokens may attend to all of each other.

    `limits` may be replaced at any time; they hold from the next prompt on.
    """

    def __init__(self, projector: Projector, limits: Images, *, most_whole: int) -> None:
        self._projector = projector
        self.limits = limits
        self._most_whole = most_whole

    def read(self, images: Sequence[Image], context: int) -> list[list[tuple[int, ...] | Tile]]:
        """For each image its tiles and the tokens around them; raises `InvalidRequest`, which names the image.

        No more is decoded once they are more than the `context`.
        """
        until = time.monotonic() + _LONGEST_S
        check(images, self.limits, until)
        found: list[list[tuple[int, ...] | Tile]] = []
        tokens = 0
        for image in images:
            parts = self._divided(image, until)
            tokens += sum(part.tokens if isinstance(part, Tile) else len(part) for part in parts)
            if tokens >= context:
                raise ContextLengthExceeded(limit=context, prompt_tokens=tokens, param="messages", at_least=True)
            found.append(parts)
        return found

    def _divided(self, image: Image, until: float) -> list[tuple[int, ...] | Tile]:
        picture = decode(image, self.limits, until)
        try:
            parts = self._projector.divide(picture, lambda: decode(image, self.limits, time.monotonic() + _LONGEST_S))
        except LlamaError:
            reason = f"Invalid '{image.where}': this model can make nothing of an image of this size."
            raise InvalidRequest(reason, param=image.where, code="invalid_image") from None
        widest = max((part.tokens for part in parts if isinstance(part, Tile) and part.whole), default=0)
        if widest > self._most_whole:
            raise InvalidRequest(
                f"Invalid '{image.where}': this image takes {widest} tokens at once, and this server computes at most "
                f"{self._most_whole} together (engine.batch_tokens).",
                param=image.where,
                code="image_too_large",
            )
        return parts
