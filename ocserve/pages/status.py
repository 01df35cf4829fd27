"""The public status as one page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ocserve.doors import Maintenance
from ocserve.pages import frame
from ocserve.pages.frame import LINKS, Link


def page(
    *,
    ready: bool,
    models: Sequence[str],
    uptime_s: float,
    availability: float | None,
    maintenance: Maintenance | None,
    links: Sequence[Link] = LINKS,
) -> bytes:
    """The page. `models` are those whose names may be told, `availability` a share of 1."""
    named = "".join(f"<li>{escape(model)}</li>" for model in models)
    listed = f"<h2>Models</h2><ul>{named}</ul>" if models else ""
    served = "" if availability is None else f" Of the requests since then {availability:.3%} were not failed by it."
    planned = ""
    if maintenance is not None:
        message = f" {escape(maintenance.message)}" if maintenance.message else ""
        planned = f"<h2>Maintenance</h2><p>{maintenance.window.replace('/', ' to ')}.{message}</p>"
    state = "Serving" if ready else "Not serving at present"
    began = f"<p>{state}. The server started {_lasted(uptime_s)} ago.{served}</p>"
    return frame.page("Status", f"{began}{planned}{listed}", links)


def _lasted(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
