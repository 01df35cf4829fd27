"""A moderation service in a thread: it refuses whatever says `forbidden`, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ocserve import config

ALLOWED = b'{"allow": true}'
REFUSED = b'{"allow": false, "category": "violence", "message": "Not here, please."}'
Answer = tuple[int, bytes, dict[str, str]]


def by_word(question: dict[str, Any]) -> Answer:
    """Refuses what says the word, wherever it stands."""
    return 200, REFUSED if "forbidden" in json.dumps(question) else ALLOWED, {}


class Moderator:
    """The service. `answer` may be replaced at any time."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Answer] = by_word
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.url = ""

    def settings(self, **further: Any) -> config.Policy:
        """The settings that have it asked."""
        return config.Policy(url=self.url, **further)

    def of(self, stage: str) -> list[dict[str, Any]]:
        """What it was asked of one stage."""
        return [question for question in self.asked if question["stage"] == stage]


@contextmanager
def moderating() -> Iterator[Moderator]:
    """A moderator on a free port."""
    moderator = Moderator()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            moderator.connections += 1
            super().setup()

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["content-length"])))
            moderator.asked.append(question)
            moderator.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, body, headers = moderator.answer(question)
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    moderator.url = f"http://127.0.0.1:{server.server_address[1]}/check"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield moderator
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
