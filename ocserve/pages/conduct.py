"""The content policy as a page and as a document: the operator's text, and what the server does with what is judged."""

from __future__ import annotations

from ocserve.pages.frame import page
from ocserve.pages.publication import Publication


def document(publication: Publication) -> dict[str, object]:
    """`GET /policy` as JSON."""
    judged = publication.judged
    return {
        "text": publication.texts.policy.markdown or None,
        "checks": list(judged),
        "finish_reason": "content_filter",
        "refused_prompt": {"status": 400, "code": "content_filter"} if "prompt" in judged else None,
        "streams": publication.policy.streams if "answer" in judged else None,
        "on_failure": publication.policy.on_failure if judged else None,
    }


def html(publication: Publication) -> bytes:
    """`GET /policy` as a page."""
    parts = [publication.texts.policy.html] if publication.texts.policy else []
    parts.append(f"<h2>How it is enforced</h2>{''.join(f'<p>{said}</p>' for said in _enforced(publication))}")
    return page("Content policy", "\n".join(parts), publication.links)


def _enforced(publication: Publication) -> list[str]:
    judged, policy = publication.judged, publication.policy
    if not judged:
        return ["Prompts and answers are not judged automatically."]
    what = " and ".join(f"{each}s" for each in judged)
    said = [f"What is put before an automatic judge of the operator's choice: {what}."]
    if "prompt" in judged:
        said.append(
            "A prompt that is refused is answered with status 400 and the code <code>content_filter</code> before "
            "anything is computed; <code>category</code> says of what kind it is. It is free."
        )
    if "answer" in judged:
        how = (
            "An answer is sent once it has been judged, streamed ones too."
            if policy.streams == "hold"
            else "A streamed answer is sent as it is generated, and any other once it has been judged."
        )
        said.append(
            f"{how} One that is refused ends with the finish reason <code>content_filter</code> (in each dialect's own "
            "word) and without its text and tool calls, unless they were streamed before. What was generated is in "
            "<code>usage</code> and is charged as any other answer."
        )
    said.append(
        "Where no verdict comes, requests are refused with status 503 and the code <code>policy_unavailable</code>, "
        "and an answer that was generated is charged as one that failed by our fault."
        if policy.on_failure == "refuse"
        else "Where no verdict comes, requests pass."
    )
    return said
