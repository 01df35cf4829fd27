"""The published limits as a page and as a document, made from the settings that the limiter obeys."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ocserve import config
from ocserve.modelcard import ServedModel
from ocserve.pages.frame import page as framed
from ocserve.pages.frame import prose
from ocserve.pages.publication import NOTHING_STATED, Publication

_ROWS = (
    ("requests_per_minute", "Requests per minute"),
    ("requests_per_day", "Requests per day"),
    ("tokens_per_minute", "Tokens per minute (prompt and answer)"),
    ("tokens_per_day", "Tokens per day (prompt and answer)"),
    ("concurrent_requests", "Requests at the same time"),
)
_HOLDS = "a limit that is raised holds from the next request on."
_METHOD = (
    "A minute's or a day's worth may come at once; then the limit refills continuously. Tokens are held for a "
    "request's prompt and the most that it may answer, and what it did not use comes back when it ends. A model's own "
    "limits hold beside those of the key."
)


def document(
    limits: config.Limits,
    own: config.Allowance | None,
    models: Sequence[ServedModel],
    publication: Publication = NOTHING_STATED,
) -> dict[str, object]:
    """The limits for programs; null is unlimited. `own` are a caller's own, `models` those whose names may be told."""
    of_models = {each.model: each for each in limits.models}
    return {
        "of": "each key" if own is None else "this key",
        "limits": _allowed(own or limits),
        "models": [
            {
                "id": model.id,
                "parallel": model.parallel,
                "queue": limits.queue,
                "limits": _allowed(of_models[model.id]) if model.id in of_models else None,
            }
            for model in models
        ],
        "method": _METHOD,
        "raise": _raised(publication),
    }


def _raised(publication: Publication) -> str:
    """Whom a customer asks; where nothing is stated, the reader may be the operator."""
    if email := publication.operator.email:
        return f"Ask {email}; {_HOLDS}"
    if publication.has_support:
        return f"Ask the operator, as Support says; {_HOLDS}"
    return f"Ask the operator, who runs `ocserve keys limits NAME --rpm 600 --tpm 100000`; {_HOLDS}"


def _allowed(limits: config.Allowance) -> dict[str, int | None]:
    return {name: getattr(limits, name) for name, _ in _ROWS}


def page(
    limits: config.Limits,
    own: config.Allowance | None,
    models: Sequence[ServedModel],
    publication: Publication = NOTHING_STATED,
) -> bytes:
    """The same for readers."""
    of_models = {each.model: each for each in limits.models}
    columns = [("Each key", limits) if own is None else ("This key", own)]
    columns += [(model.id, of_models[model.id]) for model in models if model.id in of_models]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    rows = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td>{_shown(found, name)}</td>' for _, found in columns)}</tr>"
        for name, title in _ROWS
    )
    queues = "".join(
        f"<li>{escape(model.id)}: {model.parallel} answers at a time, {limits.queue} more may wait.</li>"
        for model in models
    )
    body = f"""<table><tr><th>Limit</th>{head}</tr>{rows}</table>
<p>{_METHOD} A key may have limits of its own. Where there are limits, headers of the answers say which hold and
what is left: <code>x-ratelimit-limit-requests</code>, <code>-remaining-requests</code>,
<code>-reset-requests</code>, and the same of tokens. Beyond a limit, and where a model has no room, the answer is 429
at once, and <code>Retry-After</code> names a moment at which the same request is served.</p><ul>{queues}</ul>
<h2>To have a limit raised</h2><p>{prose(_raised(publication))}</p>"""
    return framed("Limits", body, publication.links)


def _shown(limits: config.Allowance, name: str) -> str:
    value: int | None = getattr(limits, name)
    return "unlimited" if value is None else f"{value:,}"
