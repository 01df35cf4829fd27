"""What is kept of requests, for how long, who else sees it and how it is deleted: as a page and as a document."""

from __future__ import annotations

from ocserve.pages.frame import page, prose, table
from ocserve.pages.publication import Kept, Publication

_TRAINING = "Nothing is trained on prompts or on completions: this server has no means to."
_LOGS = "Prompts, completions and keys are in no log, no metric, no ledger and no error message."


def document(publication: Publication) -> dict[str, object]:
    """`GET /privacy` as JSON."""
    stated = publication.operator
    return {
        "training_on_prompts": False,
        "training_on_completions": False,
        "retention": [_retention(each) for each in publication.kept],
        "zero_data_retention": _keeps_no_content(publication),
        "disclosed": [{"to": to, "content": content, "what": what} for to, content, what in _disclosed(publication)],
        "deletion": _deletion(publication),
        "operator": {
            "name": stated.name,
            "email": stated.email,
            "locations": list(stated.locations),
            "certifications": list(stated.certifications),
            "terms_url": stated.terms_url,
            "status_url": stated.status_url,
        },
        "text": publication.texts.privacy.markdown or None,
    }


def html(publication: Publication) -> bytes:
    """`GET /privacy` as a page."""
    stated = publication.operator
    by = f" at {prose(stated.name)}" if stated.name else ""
    disclosed = [
        f"<li>{prose(to[:1].upper() + to[1:])}: {', '.join(what)}{'' if content else ', never content'}.</li>"
        for to, content, what in _disclosed(publication)
    ]
    others = f"<ul>{''.join(disclosed)}</ul>" if disclosed else "<p>Nobody.</p>"
    rows = [
        (each.what, "yes" if each.content else "no", "yes" if each.on_disk else "no", each.until)
        for each in publication.kept
    ]
    parts = [
        f"<p>This is what the server{by} does with personal data and with what is sent to it. {_LOGS} {_TRAINING}</p>",
        "<h2>Retention</h2>",
        table(("What is kept", "has content", "on disk", "how long"), rows),
        *(["<p>Content is kept on no disk (zero data retention).</p>"] if _keeps_no_content(publication) else []),
        f"<h2>Who else sees it</h2>{others}",
        f"<h2>Deletion</h2><p>{prose(_deletion(publication))}</p>",
    ]
    if stated.locations:
        parts.append(f"<h2>Where</h2><p>Answers are computed in: {', '.join(stated.locations)}.</p>")
    if stated.certifications:
        parts.append(f"<h2>Stated</h2><p>{prose(', '.join(stated.certifications))}</p>")
    if publication.texts.privacy:
        parts.append(f"<h2>The operator's policy</h2>{publication.texts.privacy.html}")
    return page("Privacy", "\n".join(parts), publication.links)


def _retention(kept: Kept) -> dict[str, object]:
    found: dict[str, object] = {"what": kept.what, "content": kept.content, "on_disk": kept.on_disk}
    if kept.days is not None:
        found["days"] = kept.days
    if kept.seconds is not None:
        found["seconds"] = kept.seconds
    return {**found, "until": kept.until}


def _keeps_no_content(publication: Publication) -> bool:
    """Whether content is kept on no disk and shown to nobody else; what is in memory is there for its own key only."""
    return not publication.judged and not any(each.content and each.on_disk for each in publication.kept)


def _disclosed(publication: Publication) -> list[tuple[str, bool, list[str]]]:
    """(to whom, whether that is content, what)."""
    found: list[tuple[str, bool, list[str]]] = []
    if publication.judged:
        found.append(
            ("the content policy hook of the operator's choice", True, [f"{each}s" for each in publication.judged])
        )
    if publication.fetches:
        found.append(("the hosts of images that requests name by their addresses", False, ["these addresses"]))
    if publication.collector:
        found.append(("the operator's trace collector", False, ["names", "counts", "times"]))
    return found


def _deletion(publication: Publication) -> str:
    said = []
    if publication.ledger_days is not None:
        said.append(f"Rows of the ledger are deleted after {publication.ledger_days} days.")
    said.append("A stored response is deleted by its client with `DELETE /v1/responses/{id}`.")
    purged = []
    if publication.ledger_days is not None:
        purged.append("The operator deletes rows with `ocserve privacy purge`, all of them or those of one key.")
    if any(each.content and each.on_disk for each in publication.kept):
        purged.append(
            "What prompts computed is not kept by key on disk: the operator deletes it with `ocserve privacy purge` "
            "for all keys at once, and for no single one."
        )
    if purged and publication.operator.email:
        purged.append(f"Who wants that writes to {publication.operator.email}.")
    return " ".join((*said, *purged))
