"""Any bytes in, OpenAI's error out: raw HTTP, JSON, types, bounds, every field, over real connections."""

from __future__ import annotations

import json
import random
import socket
import time
from typing import Any

from tests.api import mutations
from tests.api.mutations import Case
from tests.http.harness import CHAT, COMPLETION, Answer, Served, read_one

SEED = 20261121


class Client:
    """Sends requests one after another and reconnects whenever the server has closed."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._peer: socket.socket | None = None

    def post(self, path: str, body: bytes) -> Answer:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._served.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        if self._peer is None:
            self._peer = self._served.connect()
        self._peer.sendall(head + body)
        answer = read_one(self._peer)
        if answer.headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def random_bodies(count: int) -> list[Case]:
    """Cut, spliced and random bytes; what happens to stay valid JSON objects is left out."""
    dice = random.Random(SEED)
    good = json.dumps({**CHAT, "temperature": 0.5, "stop": ["a", "b"], "logit_bias": {"5": 1}}).encode()
    found: list[Case] = []
    while len(found) < count:
        kind = dice.randrange(4)
        if kind == 0:
            body = good[: dice.randrange(len(good))]
        elif kind == 1:
            body = dice.randbytes(dice.randrange(1, 300))
        elif kind == 2:
            place = dice.randrange(len(good))
            body = good[:place] + dice.randbytes(dice.randrange(1, 4)) + good[place:]
        else:
            body = good + dice.choice([b"}", b",", b"null", b"{}", b"\x00", b"]"])
        try:
            json.loads(body)
        except ValueError:
            found.append(Case("/v1/chat/completions", body, ...))
    return found


def chosen_cases(full: bool) -> list[Case]:
    """Every field with every value; the short form takes a seeded sample that still has every field."""
    cases = [
        *mutations.bodies("/v1/chat/completions", CHAT, mutations.CHAT),
        *mutations.bodies("/v1/completions", COMPLETION, mutations.COMPLETION),
    ]
    if not full:
        random.Random(SEED).shuffle(cases)
        first = {(case.path, case.param): case for case in cases}
        cases = [*first.values(), *cases[: 1400 - len(first)]]
    return [*cases, *mutations.message_cases("/v1/chat/completions"), *random_bodies(1000 if full else 400)]


def test_two_thousand_malformed_requests(served: Served, full: bool) -> None:
    client = Client(served)
    before = served.engine.steps
    wrong: list[Any] = []
    slowest = 0.0
    begun = time.monotonic()
    cases = chosen_cases(full)
    for case in cases:
        sent = time.monotonic()
        answer = client.post(case.path, case.body)
        slowest = max(slowest, time.monotonic() - sent)
        if not 400 <= answer.status < 500:
            wrong.append((answer.status, case))
            continue
        error = answer.error
        if case.param is not ... and not (error["param"] or "").startswith(case.param):
            wrong.append((error, case))
    client.close()
    raw = raw_requests(served, full)
    for data in raw:
        sent = time.monotonic()
        with served.connect() as peer:
            peer.sendall(data)
            answer = read_one(peer)
        slowest = max(slowest, time.monotonic() - sent)
        if not 400 <= answer.status < 500:
            wrong.append((answer.status, data[:100]))
        else:
            assert answer.error["message"]
    total = len(cases) + len(raw)
    print(
        f"{total} malformed requests (seed {SEED}) in {time.monotonic() - begun:.1f} s, slowest {slowest * 1000:.0f} ms"
    )
    assert not wrong, wrong[:5]
    assert total >= 2000
    assert slowest < 2
    assert served.engine.steps == before
    assert served.chat().status == 200


def raw_requests(served: Served, full: bool) -> list[bytes]:
    """Bytes that are not HTTP, or nearly."""
    dice = random.Random(SEED + 1)
    host = f"127.0.0.1:{served.port}".encode()
    get = b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
    post = b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + host + b"\r\nContent-Type: application/json\r\n"
    fixed = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nHost: " + host + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n folded: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nBad Name: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: a\x00b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.0\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: " + host + b"\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        post + b"Content-Length: -1\r\n\r\n{}",
        post + b"Content-Length: 2, 3\r\n\r\n{}",
        post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        post + b"Content-Length: 0x2\r\n\r\n{}",
        post + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    ]  # fmt: skip
    made: list[bytes] = []
    for _ in range(600 if full else 160):
        place = dice.randrange(0, 4)  # inside the method: never a valid request again
        made.append(get[:place] + bytes([dice.choice(b'\x00\x01\x7f\x80\xff ()<>@,;:\\"/[]?={}')]) + get[place:])
    return [*fixed, *made]
