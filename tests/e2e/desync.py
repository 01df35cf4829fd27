"""Some 300 requests that two HTTP parsers might cut in different places, each with another request behind it.

`{id}` stands for the number of the case. The request proper calls itself `c{id}`; what stands behind it, and may pass
for a request of its own, is a GET that calls itself `s{id}`. Sources: RFC 9112, the advisories on h11 (CVE-2025-43859),
Gunicorn, Node.js, HAProxy (CVE-2021-40346), and the collections of PortSwigger and of http-garden.
"""

from __future__ import annotations

from collections.abc import Iterator

HOST = b"models.example.com"
_BODY = b'{"content":"x"}'
_CHUNKED = b"f\r\n" + _BODY + b"\r\n0\r\n\r\n"
HIDDEN = b"GET /v1/models/s{id} HTTP/1.1\r\nHost: " + HOST + b"\r\nX-Request-Id: s{id}\r\nAuthorization: {key}\r\n\r\n"


def _get(
    line: bytes = b"GET /v1/models/c{id} HTTP/1.1",
    *fields: bytes,
    host: bytes = b"Host: " + HOST,
    end: bytes = b"\r\n",
    behind: bytes = HIDDEN,
) -> bytes:
    head = [line, *([host] if host else []), b"X-Request-Id: c{id}", b"Authorization: {key}", *fields]
    return end.join(head) + end + end + behind


def _post(*fields: bytes, body: bytes, end: bytes = b"\r\n", behind: bytes = HIDDEN) -> bytes:
    line = b"POST /tokenize HTTP/1.1"
    return _get(line, b"Content-Type: application/json", *fields, end=end, behind=body + behind)


def two_lengths() -> Iterator[bytes]:
    """Content-Length and Transfer-Encoding together, in both orders."""
    for length in (b"0", b"4", b"15", b"%d" % len(_CHUNKED), b"200"):
        for fields in (
            (b"Content-Length: " + length, b"Transfer-Encoding: chunked"),
            (b"Transfer-Encoding: chunked", b"Content-Length: " + length),
        ):
            yield _post(*fields, body=_CHUNKED)
            yield _post(*fields, body=b"0\r\n\r\n")
            yield _post(*fields, body=_BODY)


def transfer_encodings() -> Iterator[bytes]:
    """Transfer-Encoding that one parser takes for chunked and another does not, alone and beside a length."""
    values = (
        *(b"xchunked", b"chunked ", b" chunked", b"\tchunked", b"\x0bchunked", b"\x0cchunked", b"chunked\x00"),
        *(b"Chunked", b"CHUNKED", b"chunked, identity", b"identity, chunked", b"gzip, chunked", b"chunked, chunked"),
        *(b"chunked;q=1", b'"chunked"', b"chun\rked", b"\r\n chunked", b"chunked,", b",chunked", b"identity", b""),
        *(b"chunked\r\n\tx", b"chunke\xe4", b"deflate", b"\xa0chunked"),
    )
    fields = [
        *(b"Transfer-Encoding:" + value for value in (b"chunked", *(b" " + value for value in values))),
        *(name + b": chunked" for name in (b"Transfer-Encoding ", b"Transfer-Encoding\t", b"Transfer_Encoding")),
        *(name + b": chunked" for name in (b" Transfer-Encoding", b"Transfer-Encoding\x00", b"\x0bTransfer-Encoding")),
        *(b"X: y" + end + b"Transfer-Encoding: chunked" for end in (b"\n", b"\r", b"\r\r\n")),
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding\r\n : chunked",
    ]
    for field in fields:
        yield _post(field, body=b"0\r\n\r\n")
        yield _post(b"Content-Length: 5", field, body=b"0\r\n\r\n")


def lengths() -> Iterator[bytes]:
    """Content-Length in odd shapes."""
    values = (
        *(
            b"+15",
            b"-1",
            b"0xf",
            b"15,15",
            b"15, 15",
            b"15,16",
            b"15 ",
            b"15\x00",
            b"",
            b"1e1",
            b"1_5",
            b"15 15",
            b"015",
        ),
        *(b"99999999999999999999", b"18446744073709551631", b"\x0b15", b"15;", b"\xb9\xb5", b"15.0", b'"15"', b"NaN"),
    )
    for value in values:
        yield _post(b"Content-Length: " + value, body=_BODY)
    for name in (b"Content-Length ", b"Content_Length", b" Content-Length", b"Content-Length\x00", b"content-length"):
        yield _post(name + b": 15", body=_BODY)
    yield _post(b"Content-Length: 15", b"Content-Length: 15", body=_BODY)
    yield _post(b"Content-Length: 15", b"Content-Length: 0", body=_BODY)
    yield _post(b"Content-Length: 0", b"Content-Length: 15", body=_BODY)
    yield _post(b"Content-Length:\r\n 15", body=_BODY)
    yield _post(b"Content-Length: 1\r\n 5", body=_BODY)
    yield _post(b"X: y\nContent-Length: 15", body=_BODY)
    yield _get(b"GET /v1/models/c{id} HTTP/1.1", b"Content-Length: %d" % len(HIDDEN))
    yield _get(b"HEAD /v1/models/c{id} HTTP/1.1", b"Content-Length: %d" % len(HIDDEN))
    yield _get(b"DELETE /v1/models/c{id} HTTP/1.1", b"Content-Length: 0")


def chunks() -> Iterator[bytes]:
    """Chunk sizes, extensions, ends and trailers."""
    sizes = (
        *(b"f;ext=1", b"f ;ext", b" f", b"f ", b"f\t", b"+f", b"0xf", b"0000000f", b"F", b"f;", b"f;\x00", b"f\x00"),
        *(b"1000000000000000f", b"fffffffffffffffff", b"-1", b"G", b"", b"f,", b"f;a\rb", b"f;a=" + b"x" * 20_000),
        *(b"f;a\nb", b"f\x0b", b"f\r", b"\xef\xbb\xbff", b"1_5", b'f;a="\r\n"'),
    )
    for size in sizes:
        yield _post(b"Transfer-Encoding: chunked", body=size + b"\r\n" + _BODY + b"\r\n0\r\n\r\n")
    bodies = (
        *(b"f\n" + _BODY + b"\r\n0\r\n\r\n", b"f\r\n" + _BODY + b"\n0\r\n\r\n", b"f\r\n" + _BODY + b"0\r\n\r\n"),
        *(b"f\r\n" + _BODY + b"XX0\r\n\r\n", b"f\r\n" + _BODY + b"X\r\n0\r\n\r\n", b"f\r" + _BODY + b"\r0\r\r"),
        *(b"f\r\n" + _BODY + b"\r\n0\n\n", b"f\r\n" + _BODY + b"\r\n0\r\n\n", b"f\r\n" + _BODY + b"\r\n0\r\r\n"),
        *(b"f\r\n" + _BODY + b"\r\n0\r\nX: y\r\n\r\n", b"f\r\n" + _BODY + b"\r\n0\r\nContent-Length: 99\r\n\r\n"),
        *(b"f\r\n" + _BODY + b"\r\n0\r\nX y\r\n\r\n", b"f\r\n" + _BODY + b"\r\n0\r\n: y\r\n\r\n", b"f\r\n" + _BODY),
        *(
            b"f\r\n" + _BODY + b"\r\n00\r\n\r\n",
            b"f\r\n" + _BODY + b"\r\n0;x\r\n\r\n",
            b"f\r\n" + _BODY + b"\r\n-0\r\n\r\n",
        ),
        *(b"f\r\n" + _BODY + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\n" + _BODY + b"\r\n0\r\n\r\n"),
        b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY) + b"0\r\n\r\n",
    )
    for body in bodies:
        yield _post(b"Transfer-Encoding: chunked", body=body)


def line_ends() -> Iterator[bytes]:
    """What ends a line, and what stands before the first."""
    yield _get(end=b"\n")
    yield _get(end=b"\r")
    yield _get(end=b"\r\r\n")
    yield _get(end=b"\n\r")
    yield _post(b"Content-Length: 15", body=_BODY, end=b"\n")
    yield _post(b"Transfer-Encoding: chunked", body=_CHUNKED, end=b"\n")
    for before in (b"\r\n", b"\n", b"\r", b"\r\n" * 5, b" ", b"\t", b"\x00", b"\xef\xbb\xbf", b"X"):
        yield before + _get()
    for within in (
        b"X: a\nY: b",
        b"X: a\rY: b",
        b"X: a\x00b",
        b"X: a\x0bb",
        b"X: a\x85b",
        b"X: a\xe2\x80\xa8b",
        b"X:\n y",
    ):
        yield _get(b"GET /v1/models/c{id} HTTP/1.1", within)
    yield _get().replace(b"\r\n\r\nGET", b"\r\n\nGET", 1)
    yield _get().replace(b"\r\n\r\nGET", b"\n\nGET", 1)
    yield _get().replace(b"\r\n\r\nGET", b"\n\r\nGET", 1)


def request_lines() -> Iterator[bytes]:
    """Targets, versions, methods and what separates them."""
    path = b"/v1/models/c{id}"
    for target in (
        *(
            b"http://" + HOST + path,
            b"https://" + HOST + path,
            b"http://evil.example" + path,
            b"http://u:p@" + HOST + path,
        ),
        *(
            b"HTTP://" + HOST + path,
            HOST + b":443",
            b"*",
            b"//" + HOST + path,
            path + b"#x",
            path + b"?a b",
            path + b"?x=1",
        ),
        *(
            b"/v1/../v1/models/c{id}",
            b"/v1/%2e%2e/v1/models/c{id}",
            b"/v1//models/c{id}",
            b"\\v1\\models",
            b"/v1/models/%00",
        ),
        *(
            path + b"%0d%0aX:%20y",
            path + b"\x00",
            path + b"\xff",
            path + b"\x7f",
            path + b"%",
            path + b"%zz",
            b"",
            b"v1",
        ),
        *(path + b";x=y", b"/v1/models/c{id}/", b"/" + b"a" * 9000, b"?", b"/v1/models/c{id} HTTP/1.1\r\nX: y\r\nfoo"),
    ):
        yield _get(b"GET " + target + b" HTTP/1.1")
    for version in (
        b"HTTP/1.0",
        b"HTTP/0.9",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/9.9",
        b"http/1.1",
        b"HTTP/1.1 ",
        b"HTTP/1",
        b"",
    ):
        yield _get(b"GET " + path + b" " + version)
    for line in (
        *(
            b"GET\t" + path + b"\tHTTP/1.1",
            b"GET  " + path + b"  HTTP/1.1",
            b"GET " + path,
            b"get " + path + b" HTTP/1.1",
        ),
        *(b"GE\x00T " + path + b" HTTP/1.1", b"G(T " + path + b" HTTP/1.1", b"CONNECT " + HOST + b":443 HTTP/1.1"),
        *(
            b"TRACE " + path + b" HTTP/1.1",
            b"X" * 300 + b" " + path + b" HTTP/1.1",
            b"PRI * HTTP/2.0",
            b"OPTIONS * HTTP/1.1",
        ),
    ):
        yield _get(line)
    yield _post(b"Transfer-Encoding: chunked", body=_CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0", 1)


def hosts() -> Iterator[bytes]:
    """None, two, and odd ones."""
    values = (
        *(
            b"",
            HOST + b":443",
            HOST + b".",
            b"u@" + HOST,
            HOST + b",evil.example",
            HOST + b" evil.example",
            b"[::1]",
            b"a/b",
        ),
        *(HOST + b":99999", HOST + b":x", b"\x00", b"evil.example", HOST.upper(), b"localhost"),
    )
    for value in values:
        yield _get(host=b"Host: " + value)
    for host in (
        b"",
        b"Host : " + HOST,
        b"host: " + HOST,
        b" Host: " + HOST,
        b"Host: " + HOST + b"\r\nHost: evil.example",
    ):
        yield _get(host=host)
    yield _get(host=b"Host: evil.example\r\nHost: " + HOST)
    yield _get(b"GET http://" + HOST + b"/v1/models/c{id} HTTP/1.1", host=b"Host: evil.example")


def fields() -> Iterator[bytes]:
    """Header fields."""
    for field in (
        *(
            b"X : y",
            b" X: y",
            b": y",
            b"X",
            b"X(: y",
            b"X@: y",
            b"X\x80: y",
            b"X\x00: y",
            b"X: \x00",
            b"X:",
            b"X:y",
            b"X: y\r\n z",
        ),
        *(b"X: " + b"a" * 9000, b"X: " + b"a" * 40_000, b"\r\n".join(b"X%d: y" % each for each in range(150))),
        *(b"Connection: close", b"Connection: keep-alive", b"Connection: X-Request-Id", b"Connection: Authorization"),
        *(
            b"Connection: Transfer-Encoding",
            b"Connection: Host",
            b"Keep-Alive: timeout=999",
            b"Proxy-Connection: close",
        ),
        *(
            b"Expect: 100-continue",
            b"Expect: 200-ok",
            b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA",
        ),
        *(
            b"Upgrade: websocket\r\nConnection: Upgrade",
            b"TE: trailers",
            b"Trailer: Content-Length",
            b"X-Forwarded-For: 127.0.0.1",
        ),
        *(
            b"Content-Encoding: gzip",
            b"Content-Type: text/plain",
            b"X-HTTP-Method-Override: DELETE",
            b"X-Original-URL: /metrics",
        ),
    ):
        yield _get(b"GET /v1/models/c{id} HTTP/1.1", field)
        yield _post(b"Content-Length: 15", field, body=_BODY)


def pipelines() -> Iterator[bytes]:
    """Several requests on one connection, which are several requests."""
    yield _get()
    yield _get(behind=HIDDEN * 2)
    yield _get(behind=HIDDEN * 9)
    yield _post(b"Content-Length: 15", body=_BODY)
    yield _post(b"Transfer-Encoding: chunked", body=_CHUNKED)
    yield _post(b"Content-Length: 15", body=_BODY, behind=b"\r\n" + HIDDEN)
    yield _post(b"Content-Length: 14", body=_BODY)
    yield _post(b"Content-Length: 16", body=_BODY)
    yield _get(b"HEAD /v1/models/c{id} HTTP/1.1")
    yield _get(b"GET /v1/models/c{id} HTTP/1.1", b"Connection: close")
    yield _get(behind=b"")[:-2]
    yield _get(behind=HIDDEN[:20])


FAMILIES = (two_lengths, transfer_encodings, lengths, chunks, line_ends, request_lines, hosts, fields, pipelines)


def cases() -> list[bytes]:
    """All of them, in an order that mixes the families."""
    rows = [list(family()) for family in FAMILIES]
    return [row[place] for place in range(max(map(len, rows))) for row in rows if place < len(row)]
