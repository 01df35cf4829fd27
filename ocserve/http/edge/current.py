"""The edge's settings as they are now: a reload replaces some of them while requests are served."""

from __future__ import annotations

from ocserve import config


class Edge:
    """Holds them. Whoever reads a setting for a request reads it from `now`."""

    def __init__(self, settings: config.Server) -> None:
        self.now = settings

    @property
    def refuse_unknown(self) -> bool:
        """Whether unknown parameters are refused."""
        return self.now.unknown_parameters == "refuse"
