"""How the operator is reached and what it promises, as it has stated it: as a page and as a document."""

from __future__ import annotations

from ocserve.pages.frame import page, prose
from ocserve.pages.publication import Publication


def document(publication: Publication) -> dict[str, object]:
    """`GET /support` as JSON."""
    stated, texts = publication.operator, publication.texts
    return {
        "name": stated.name,
        "email": stated.email,
        "status_url": stated.status_url,
        "terms_url": stated.terms_url,
        "sla": texts.sla.markdown or None,
        "incidents": texts.incident.markdown or None,
    }


def html(publication: Publication) -> bytes:
    """`GET /support` as a page."""
    stated, texts = publication.operator, publication.texts
    lines = [
        ("Operator", stated.name),
        ("Contact for support, limits, deletion of data and incidents", stated.email),
        ("Status", stated.status_url),
        ("Terms of service", stated.terms_url),
    ]
    items = "".join(f"<li>{title}: {prose(value)}</li>" for title, value in lines if value)
    parts = [f"<ul>{items}</ul>"] if items else []
    if texts.sla:
        parts.append(f"<h2>Service level</h2>{texts.sla.html}")
    if texts.incident:
        parts.append(f"<h2>Incidents and maintenance</h2>{texts.incident.html}")
    return page("Support", "\n".join(parts), publication.links)
