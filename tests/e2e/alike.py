"""What equality can be asked of a quantised model's greedy answers to one prompt.

Which part of a prompt is cached, and where its cells lie, decides how sums are rounded, and Q4_1 rounds activations as
well: logits move by up to 0.6, so that a token whose two best candidates are close may come out otherwise, and all that
follows it. That streams equal whole answers to the letter is shown on scripted engines, and that the engine's tokens
are right on F32 models.
"""

from __future__ import annotations

NOISE = 0.6  # of log-probabilities
_BEGINNING = 4  # characters


def alike(one: str, other: str) -> bool:
    """Whether both can be greedy answers to the same prompt."""
    return one == other or (len(one) >= _BEGINNING and one[:_BEGINNING] == other[:_BEGINNING])
