"""What an answer costs, as every vendor's clients are told: a number of US dollars called `cost`."""

from __future__ import annotations

_PICODOLLARS = 10**12  # of a US dollar


def cost(picodollars: int | None) -> dict[str, float]:
    """A part of an answer's usage object; nothing where nothing is charged, and until it is known."""
    return {} if picodollars is None else {"cost": picodollars / _PICODOLLARS}
