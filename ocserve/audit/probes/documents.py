"""Probes of published pages: the interface's document, its readable form, and the operator's own pages.

They find that a page is there and speaks of its subject; whether what it says is true is the operator's to state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ocserve.audit.published import PATHS
from ocserve.audit.server import dig
from ocserve.audit.subject import Probe, Subject, named
from ocserve.audit.verdict import Fault, Unproven, Unsaid, clean, expect

_DOCUMENT = "/openapi.json"
_READABLE = ("/docs", "/reference")
_USED = ("/chat/completions", "/completions", "/models")
# What a page of each kind has to speak of.
_SUBJECTS = {
    "privacy": r"privacy|personal data|training",
    "retention": r"retention|retain|delet",
    "pricing": r"\$|usd|price|pricing",
    "status": r"status|uptime|operational|incident|ready",
    "terms": r"terms|agreement|sla\b|uptime|availab",
    "security": r"certif|gdpr|soc ?2|hipaa|iso 27001",
    "support": r"support|contact|[\w.+-]+@[\w-]+(\.[\w-]+)+",
    "policy": r"polic|filter|moderat",
    "limits": r"per.minute|\blimit",
}


async def _openapi(subject: Subject) -> Any:
    document = await subject.document(_DOCUMENT)
    if document is None:
        raise Fault(f"there is no {_DOCUMENT}")
    return document


async def _readable(subject: Subject) -> str:
    """The text of the readable reference. Raises `Fault` without one."""
    for path in _READABLE:
        reply = await subject.server.send("GET", path, at_root=True)
        if reply.status == 200 and b"<" in reply.body:
            return reply.body.decode(errors="replace").lower()
    raise Fault(f"there is no page at {' or '.join(_READABLE)}")


async def reference_endpoints(subject: Subject) -> str:
    """An OpenAPI document describes the endpoints that are used."""
    document = await _openapi(subject)
    expect(str(dig(document, "openapi")).startswith("3."), "it is no OpenAPI 3 document")
    paths = [name.removeprefix("/v1") for name in dig(document, "paths") or {}]
    missing = [path for path in _USED if path not in paths]
    expect(not missing, f"it does not describe {', '.join(missing)}")
    return f"{len(paths)} paths in {_DOCUMENT}"


async def reference_parameters(subject: Subject) -> str:
    """The OpenAPI document describes the parameters of a chat request."""
    document = await _openapi(subject)
    text = str(document)
    missing = [name for name in ("messages", "temperature", "max_tokens", "stream", "stop") if f"'{name}'" not in text]
    expect(not missing, f"it does not describe {', '.join(missing)}")
    return "the parameters of a chat request are described"


async def reference_errors(subject: Subject) -> str:
    """The OpenAPI document says which error statuses there are, and what they mean."""
    document = await _openapi(subject)
    paths = dig(document, "paths") or {}
    path = next((name for name in paths if name.endswith("/chat/completions")), "")
    answers = dig(paths, path, "post", "responses") or {}
    missing = [status for status in ("400", "401", "404", "429") if status not in answers and "4XX" not in answers]
    expect(not missing, f"chat completions do not document status {', '.join(missing)}")
    return f"statuses {', '.join(clean(status, 8) for status in answers)}"


async def reference_examples(subject: Subject) -> str:
    """The reference shows requests and answers as examples."""
    text = str(await _openapi(subject))
    expect("'example'" in text or "'examples'" in text, "the OpenAPI document has no examples")
    return f"examples in {_DOCUMENT}"


async def reference_page(subject: Subject) -> str:
    """The reference can be read as a page, which names the chat endpoint."""
    page = await _readable(subject)
    expect("chat/completions" in page, "the page does not name the chat endpoint")
    return f"{len(page) // 1024} KiB"


async def reference_curl(subject: Subject) -> str:
    """The page shows how to call the server with cURL."""
    expect("curl" in await _readable(subject), "the page has no cURL example")
    return "a cURL example"


async def reference_sdks(subject: Subject) -> str:
    """The page shows how to call the server from Python and JavaScript."""
    page = await _readable(subject)
    missing = [name for name in ("python", "javascript") if name not in page]
    expect(not missing, f"the page has no example for {', '.join(missing)}")
    return "examples for Python and JavaScript"


async def reference_header(subject: Subject) -> str:
    """The page shows the header that carries a key."""
    expect("authorization: bearer" in await _readable(subject), "the page shows no `Authorization: Bearer`")
    return "`Authorization: Bearer`"


async def reference_rotation(subject: Subject) -> str:
    """The page says how keys are replaced and revoked."""
    page = await _readable(subject)
    if not re.search(r"rotat|replac", page) or "revo" not in page:
        raise Unsaid(f"the page at {' or '.join(_READABLE)} does not say how keys are replaced and revoked")
    return "replacing and revoking keys is described"


async def reference_auth(subject: Subject) -> str:
    """The reference says how a request is authenticated."""
    document = await _openapi(subject)
    schemes = dig(document, "components", "securitySchemes")
    expect(isinstance(schemes, dict) and schemes, "the OpenAPI document has no security scheme")
    return f"{', '.join(clean(name, 30) for name in schemes)}"


async def reference_finish_reasons(subject: Subject) -> str:
    """The OpenAPI document lists the reasons for which an answer may end, OpenAI's four among them."""
    listed = next(
        (each for each in _enumerations(await _openapi(subject)) if "length" in each and "stop" in each), None
    )
    if listed is None:
        raise Fault("the OpenAPI document lists no finish reasons")
    missing = [name for name in ("stop", "length", "tool_calls", "content_filter") if name not in listed]
    expect(not missing, f"the listed finish reasons lack {', '.join(missing)}")
    return f"finish reasons {', '.join(clean(each, 40) for each in listed if each is not None)}"


def _enumerations(schema: Any) -> Iterator[list[Any]]:
    """Every list of values in a document, as deep as it is."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(listed := dig(schema, "enum"), list):
        yield listed
    for each in inner:
        yield from _enumerations(each)


async def health(subject: Subject) -> str:
    """The server has a route that says whether it is well."""
    for path in ("/health", "/healthz", "/ready"):
        reply = await subject.server.send("GET", path, at_root=True)
        if reply.status == 200:
            return f"{path} answers in {reply.took_s * 1000:.0f} ms"
    raise Fault("there is no /health, /healthz or /ready")


async def https(subject: Subject) -> str:
    """The server is reached over TLS."""
    scheme, host = urlsplit(subject.server.url).scheme, urlsplit(subject.server.url).hostname or ""
    if scheme != "https" and (host == "localhost" or host.startswith("127.") or host == "::1"):
        raise Unproven("audited on this machine, before the reverse proxy that speaks TLS")
    expect(scheme == "https", "the address is not https")
    return "https, certificate accepted"


async def versioning(subject: Subject) -> str:
    """The address carries the interface's version."""
    path = urlsplit(subject.server.url).path
    expect(re.search(r"/v\d+", path), "the address carries no version")
    return f"`{clean(path, 40)}`"


def _page(kind: str, pattern: str) -> Probe:
    async def run(subject: Subject) -> str:
        pages = await subject.published(kind)
        for page in pages:
            if page.quote(pattern):
                return f"{page.address} is there and speaks of it"
        if kind in subject.pages:
            raise Fault(f"{clean(subject.pages[kind], 120)} does not speak of {kind}")
        looked = " or ".join(PATHS[kind])
        raise Unsaid(
            f"no page was named (--page {kind}=URL), and {looked} {'says nothing' if pages else 'is not there'}"
        )

    run.__doc__ = f"A page on {kind} is published."
    return Probe(f"page-{kind}", run)


PAGES = tuple(_SUBJECTS)
PROBES = (
    *named(
        reference_endpoints, reference_parameters, reference_errors, reference_examples, reference_page,
        reference_curl, reference_sdks, reference_auth, reference_header, reference_rotation,
        reference_finish_reasons, health, https, versioning,
    ),
    *(_page(kind, pattern) for kind, pattern in _SUBJECTS.items()),
)  # fmt: skip
