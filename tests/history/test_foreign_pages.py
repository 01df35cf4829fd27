"""CVE-2026-2611 (MLflow), CVE-2025-49596 (MCP Inspector), llama-server's echoed Origin: a web page drives the server.

A page needs no CORS permission to *send* a form or text body; the engine must never see one.
"""

from __future__ import annotations

import json

import pytest

from tests.http.harness import CHAT, serving

ORIGINS = [
    "https://evil.example",
    "http://localhost:3000",
    "http://localhost.evil",
    "http://127.0.0.1:1",
    "null",
    "file://",
    "chrome-extension://abc",
    "http://[::1]:9",
    "HTTPS://EVIL.EXAMPLE",
    "https://127.0.0.1",
]
SIMPLE_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "text/plain; charset=application/json",
    "",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_foreign_page_reaches_nothing(origin: str) -> None:
    with serving() as served:
        for kind in (*SIMPLE_TYPES, "application/json"):
            for site in ("cross-site", "same-site", "none"):
                headers = {"Origin": origin, "Content-Type": kind, "Sec-Fetch-Site": site}
                answer = served.request("POST", "/v1/chat/completions", CHAT, headers)
                assert answer.status == 403
                assert not [name for name in answer.headers if name.startswith("access-control")]
        assert served.engine.runs == {}


def test_a_form_without_an_origin_is_refused_by_its_type() -> None:
    with serving() as served:
        for kind in SIMPLE_TYPES:
            body = json.dumps(CHAT).encode()
            assert served.request("POST", "/v1/chat/completions", body, {"Content-Type": kind}).status == 415
        assert served.engine.runs == {}
