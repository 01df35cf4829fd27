"""Probes of refusals: the right status, OpenAI's error object, and a server that goes on."""

from __future__ import annotations

from typing import Any

from ocserve.audit.server import Reply, dig
from ocserve.audit.subject import SHORT, Subject, named
from ocserve.audit.verdict import Fault, Unproven, clean, expect

_WRONG_KEY = {"authorization": "Bearer sk-wrong-0000000000000000000000000000", "x-api-key": ""}
_MALFORMED = (b"{", b'{"model": "x", }', b"", b"[]", b'"text"', b"\xff\xfe{}", b'{"model": NaN}', b"null")
_HUGE_BYTES = (5 * 1024 * 1024, 48 * 1024 * 1024)
_PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # noqa: E501


def _shaped(reply: Reply) -> None:
    """The error object is OpenAI's."""
    expect(reply.headers.get("content-type", "").startswith("application/json"), "an error is not application/json")
    error = dig(reply.json, "error")
    expect(isinstance(error, dict), "an error answer has no `error` object")
    expect(isinstance(dig(error, "message"), str) and error["message"], "error.message is missing")
    expect(isinstance(dig(error, "type"), str), "error.type is missing")
    expect(isinstance(dig(error, "code"), str | int | None), "error.code is neither text nor number")


async def error_key(subject: Subject) -> str:
    """A wrong key is a 401."""
    if subject.server.key is None:
        raise Unproven("the audit has no key, so that none can be wrong")
    fields = subject.fields(SHORT, {"max_tokens": 1})
    reply = await subject.server.send("POST", "/chat/completions", fields, headers=_WRONG_KEY)
    expect(reply.status == 401, f"a wrong key is answered with status {reply.status}")
    _shaped(reply)
    expect(_WRONG_KEY["authorization"][7:] not in reply.body.decode(errors="replace"), "the refusal repeats the key")
    return f"401, code {clean(reply.error.get('code'), 60)}"


async def error_model(subject: Subject) -> str:
    """An unknown model is a 404 that says so."""
    reply = await subject.refused(model="no-such/model:1")
    expect(reply.status == 404, f"an unknown model is answered with status {reply.status}")
    _shaped(reply)
    return f"404, code {clean(reply.error.get('code'), 60)}"


async def error_json(subject: Subject) -> str:
    """What is no JSON object is a 400."""
    for body in _MALFORMED:
        reply = await subject.server.send("POST", "/chat/completions", body)
        expect(reply.status in (400, 422), f"malformed JSON is answered with status {reply.status}")
        _shaped(reply)
    return f"{len(_MALFORMED)} malformed bodies"


async def error_missing(subject: Subject) -> str:
    """A request without a model or without messages is a 400 that names what is missing."""
    for missing in ("model", "messages"):
        fields = subject.fields(SHORT, {"max_tokens": 1})
        del fields[missing]
        reply = await subject.server.send("POST", "/chat/completions", fields)
        expect(reply.status in (400, 422), f"a request without {missing} is answered with status {reply.status}")
        named = reply.error.get("param") == missing or missing in str(reply.error.get("message"))
        expect(named, f"the refusal does not name {missing}")
    return "model and messages are named"


async def error_messages(subject: Subject) -> str:
    """Malformed messages are a 400."""
    wrong: tuple[Any, ...] = (
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": 5}],
        ["x"],
        [{"role": "user", "content": [{"type": "no-such-part"}]}],
    )
    for messages in wrong:
        reply = await subject.refused(messages=messages)
        expect(reply.status in (400, 422), f"malformed messages are answered with status {reply.status}")
        _shaped(reply)
    return f"{len(wrong)} malformed lists of messages"


async def error_route(subject: Subject) -> str:
    """An unknown route is a 404, and a wrong method is refused."""
    missing = await subject.server.send("POST", "/no-such-route", {})
    expect(missing.status == 404, f"an unknown route is answered with status {missing.status}")
    method = await subject.server.send("GET", "/chat/completions")
    expect(method.status in (404, 405), f"GET on the chat endpoint is answered with status {method.status}")
    return f"404 and {method.status}"


async def error_shape(subject: Subject) -> str:
    """Every refusal has message, type, param and code, and says them in JSON."""
    replies = [
        await subject.refused(model="no-such/model:1"),
        await subject.refused(temperature=-5),
        await subject.refused(messages=[]),
        await subject.server.send("POST", "/chat/completions", b"{"),
        await subject.server.send("POST", "/completions", b"{"),
        await subject.server.send("GET", "/models/no-such-model"),
    ]
    for reply in replies:
        expect(400 <= reply.status < 500, f"a client's mistake is answered with status {reply.status}")
        _shaped(reply)
        expect({"param", "code"} <= reply.error.keys(), "an error object lacks `param` or `code`")
    return f"{len(replies)} refusals of statuses {', '.join(sorted({str(reply.status) for reply in replies}))}"


async def error_types_named(subject: Subject) -> str:
    """Errors tell apart what went wrong: their codes differ."""
    kinds = [await subject.refused(model="no-such/model:1"), await subject.refused(temperature=-5)]
    codes = [(reply.error.get("type"), reply.error.get("code"), reply.status) for reply in kinds]
    expect(codes[0] != codes[1], "an unknown model and a wrong value have the same error")
    expect(all(str(reply.error.get("message", "")).count(" ") >= 2 for reply in kinds), "a message says nothing")
    return f"codes {', '.join(clean(code[1], 40) for code in codes)}"


async def error_size(subject: Subject) -> str:
    """A huge body is refused at once, as 413 or 400, and the server goes on."""
    found = []
    for size in _HUGE_BYTES:
        body = b'{"model":"' + b"x" * size + b'"}'
        try:
            reply = await subject.server.send("POST", "/chat/completions", body)
        except Fault as fault:
            if "connection broke" not in str(fault):
                raise
            found.append("the connection is closed")  # what a client sees that goes on writing after the refusal
            continue
        expect(reply.status in (400, 413, 422), f"{size >> 20} MiB are answered with status {reply.status}")
        _shaped(reply)
        found.append(f"status {reply.status}")
    await subject.chat(SHORT, max_tokens=1)
    sizes = " and ".join(f"{size >> 20} MiB" for size in _HUGE_BYTES)
    return f"{sizes}: {', '.join(found)}; the next request is answered"


async def error_parameter(subject: Subject) -> str:
    """A parameter that does not exist is refused by name, or named as ignored; never swallowed."""
    reply = await subject.refused(no_such_parameter=1, max_tokens=1)
    if reply.status == 200:
        ignored = reply.headers.get("x-ocserve-ignored", "")
        expect("no_such_parameter" in ignored, "an unknown parameter was swallowed")
        return "named as ignored"
    expect(reply.status in (400, 422), f"an unknown parameter is answered with status {reply.status}")
    expect("no_such_parameter" in str(reply.error), "the refusal does not name the parameter")
    return f"status {reply.status}, named"


async def error_images(subject: Subject) -> str:
    """An image for a model that takes none is a 400, not an answer without it."""
    if subject.takes("image"):
        raise Unproven("the model takes images")
    parts = [{"type": "text", "text": SHORT}, {"type": "image_url", "image_url": {"url": _PIXEL}}]
    reply = await subject.refused(parts, max_tokens=1)
    expect(reply.status in (400, 415, 422), f"an image is answered with status {reply.status}")
    return f"status {reply.status}, param {clean(reply.error.get('param'), 60)}"


async def error_server(subject: Subject) -> str:
    """Nothing that was asked led to a server error; if something did, it was told in the error object's shape."""
    failed = [each for each in subject.server.exchanges if each.status >= 500]
    if not failed:
        raise Unproven(f"none of {len(subject.server.exchanges)} requests led to a server error, so none could be seen")
    expect(all(each.error_shaped for each in failed), f"{len(failed)} server errors, not all with an error object")
    return f"{len(failed)} server errors, each with an error object"


async def error_none_of_ours(subject: Subject) -> str:
    """No request of this audit, malformed ones included, led to a status of 500 or above."""
    failed = [each for each in subject.server.exchanges if each.status >= 500]
    expect(not failed, f"{len(failed)} of {len(subject.server.exchanges)} requests ended in a server error")
    return f"{len(subject.server.exchanges)} requests, no server error"


PROBES = named(
    error_key, error_model, error_json, error_missing, error_messages, error_route, error_shape, error_types_named,
    error_size, error_parameter, error_images,
)  # fmt: skip
LAST = named(error_server, error_none_of_ours)
