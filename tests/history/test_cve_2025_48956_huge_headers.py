"""CVE-2025-48956 (vLLM): one GET with an enormous header exhausted the server's memory."""

from __future__ import annotations

import resource
from contextlib import suppress

from tests.http.harness import parse, read_all, serving


def test_a_header_stream_is_cut_early_and_costs_no_memory() -> None:
    with serving() as served:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent = 0
        with served.connect() as peer:
            peer.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nX: ")
            with suppress(OSError):
                for _ in range(1000):
                    sent += peer.send(b"a" * 65536)
            data = read_all(peer)
        assert sent < 16 * 1024 * 1024  # most of it lay in the kernel's buffers
        if data:
            assert parse(data).error["code"] == "headers_too_large"
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"cut after {sent} bytes, {grown_kib} KiB more memory")
        assert grown_kib < 16 * 1024
        assert served.request("GET", "/ready").status == 200
