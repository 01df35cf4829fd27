"""A provider that does everything right, and can be given one fault.

It shares no code with the product: what the probes ask of it is written here a second time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from tests.audit import toy_model

KEY = "sk-provider-0123456789"
MODEL = "org/toy:1"
CONTEXT, MOST = 12_288, 10_240
SLOTS, QUEUE = 4, 64
_MAGIC = {"png": b"\x89PNG", "jpeg": b"\xff\xd8", "gif": b"GIF8", "webp": b"RIFF"}
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1), "top_a": (0, 1), "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2), "repetition_penalty": (0.01, 2),
}  # fmt: skip
_INTEGERS = {
    "max_tokens": (1, MOST), "max_completion_tokens": (1, MOST), "top_k": (0, 2**31 - 1), "seed": (0, 2**31 - 1),
    "n": (1, 8), "top_logprobs": (0, 20),
}  # fmt: skip
_TAKEN = {
    "model", "messages", "prompt", "stream", "stream_options", "stop", "logit_bias", "logprobs", "response_format",
    "tools", "tool_choice", "parallel_tool_calls", "echo", "structured_outputs", *_RANGES, *_INTEGERS,
}  # fmt: skip
PRICES = {
    "prompt": "0.00000002", "completion": "0.00000006", "image": "0", "request": "0.000001",
    "input_cache_read": "0.00000001", "input_cache_write": "0.00000003",
}  # fmt: skip
PUBLIC = {
    "/health",
    "/docs",
    "/openapi.json",
    "/page",
    "/pricing",
    "/privacy",
    "/policy",
    "/status",
    "/support",
    "/limits",
}

Headers = dict[str, str]
Answer = tuple[int, Headers, Any]


@dataclass(frozen=True)
class Fault:
    """What is wrong with the provider: hooks that change what comes in and goes out, and words the provider knows."""

    fields: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
    answer: Callable[[str, dict[str, Any], Answer], Answer] = lambda path, fields, answer: answer
    chunk: Callable[[dict[str, Any], Any], list[Any]] = lambda fields, chunk: [chunk]
    words: frozenset[str] = frozenset()


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        self.status = status
        kind = "requests" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Provider:
    """The server's state; `fault` may be changed between requests."""

    fault: Fault = Fault()
    vision: bool = False
    remaining: int = 100_000
    limit: int = 100_000
    tokens: int = 1_000_000
    used: int = 0
    concurrent: int | None = None
    refused: bool = False
    waiting: int = 0
    made: int = 0
    cached: set[tuple[int, ...]] = field(default_factory=set)
    kept: dict[str, Any] = field(default_factory=dict)
    slots: asyncio.Semaphore | None = None

    def has(self, word: str) -> bool:
        return word in self.fault.words

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        pieces = []
        while True:
            message = await receive()
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(pieces)
        self.slots = self.slots or asyncio.Semaphore(SLOTS)
        path, headers = scope["path"], {name.decode(): value.decode() for name, value in scope["headers"]}
        fields: dict[str, Any] = {}
        try:
            public = path in PUBLIC or self.has("open")
            given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key")
            if given != KEY and not public:
                raise Refusal(401, "The key is not known here.", code="invalid_api_key")
            if len(body) > 8 * 1024 * 1024:
                raise Refusal(413, "The body is too large for this server.", code="request_too_large")
            if scope["method"] == "POST":
                fields = self._decoded(body)
                if path.startswith("/v1/") and path.removeprefix("/v1/") in ("chat/completions", "completions"):
                    await self._generate(scope, fields, receive, send)
                    return
            answer = await self._other(scope["method"], path, fields, headers)
        except Refusal as refusal:
            answer = (refusal.status, {"retry-after": "0.05"} if refusal.status == 429 else {}, refusal.body)
        await self._send(path, fields, answer, send)

    def _decoded(self, body: bytes) -> dict[str, Any]:
        def no_constants(name: str) -> None:
            raise ValueError(name)

        try:
            fields = json.loads(body, parse_constant=no_constants)
        except ValueError:
            raise Refusal(400, "The body is not valid JSON.") from None
        if not isinstance(fields, dict):
            raise Refusal(400, "The body is not a JSON object.")
        return fields

    async def _send(self, path: str, fields: dict[str, Any], answer: Answer, send: Any) -> None:
        self.made += 1
        status, headers, content = self.fault.answer(path, fields, answer)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        named = {"content-type": "application/json", "x-request-id": f"req_{self.made}", **headers}
        raw = [(name.encode(), value.encode()) for name, value in named.items() if value]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": data})

    # -- generation

    async def _generate(self, scope: Any, fields: dict[str, Any], receive: Any, send: Any) -> None:
        chat = scope["path"].endswith("/chat/completions")
        fields = self.fault.fields(dict(fields))
        self._check(fields, chat)
        self._admit(fields)
        kept = self.kept.get(named := dict(scope["headers"]).get(b"idempotency-key", b"").decode())
        if kept is not None:
            await self._send(scope["path"], fields, (200, {"idempotent-replayed": "true"}, kept), send)
            return
        self.waiting += 1
        if self.has("mixes") and self.waiting > 2:
            fields["logit_bias"] = {"1000": 100}
        try:
            assert self.slots is not None
            async with self.slots:
                if fields.get("stream"):
                    await self._streamed(scope["path"], fields, chat, receive, send)
                    return
                job = Job(self, fields, chat)
                body = await job.whole()
        finally:
            self.waiting -= 1
        self.used += job.prompt_count + job.completion
        if named:
            self.kept[named] = body
        await self._send(scope["path"], fields, (200, self._limits(), body), send)

    def _admit(self, fields: dict[str, Any]) -> None:
        """Refuse what exceeds a limit, with a Retry-After that is true."""
        if not self.has("no limit") and self.remaining <= 0:
            self.remaining = 1  # until then there is one again
            self.refused = True
            raise Refusal(429, "The limit of this key is reached.", code="rate_limit_exceeded")
        self.remaining -= not self.has("no limit")
        most = QUEUE if self.concurrent is None else self.concurrent
        if (self.waiting >= most and not self.has("no queue limit")) or (self.refused and self.has("never again")):
            self.refused = True
            raise Refusal(429, "Too many answers are waiting here.", code="overloaded")
        if fields.get("max_tokens", 0) >= self.tokens and not self.has("no limit"):
            raise Refusal(400, "That is more than the limit on tokens.", "max_tokens", "rate_limit_exceeded")

    def _limits(self) -> Headers:
        return {
            **({"x-ocserve-ignored": "user"} if self.has("ours") else {}),
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-limit-tokens": str(self.tokens),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-remaining-tokens": str(max(0, self.tokens - self.used)),
            **{f"x-ratelimit-reset-{unit}": "60s" for unit in ("requests", "tokens")},
        }

    async def _streamed(self, path: str, fields: dict[str, Any], chat: bool, receive: Any, send: Any) -> None:
        self.made += 1
        headers = {"content-type": "text/event-stream", "x-request-id": f"req_{self.made}", **self._limits()}
        _, headers, _ = self.fault.answer(path, fields, (200, headers, b""))
        raw = [(name.encode(), value.encode()) for name, value in headers.items() if value]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        gone = asyncio.create_task(_disconnected(receive))
        held: list[bytes] = []
        try:
            chunks = [chunk async for chunk in Job(self, fields, chat).stream(gone)] if self.has("late") else None
            source = _again(chunks) if chunks is not None else Job(self, fields, chat).stream(gone)
            async for chunk in source:
                for changed in self.fault.chunk(fields, chunk):
                    data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
                    frame = b"data: " + data + b"\n\n"
                    if self.has("breaks under load") and self.waiting > 4 and data == b"[DONE]":
                        continue
                    if self.has("late"):
                        held.append(frame)
                    else:
                        await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"".join(held)})
        finally:
            gone.cancel()

    def _check(self, fields: dict[str, Any], chat: bool) -> None:
        """Refuse what is wrong by name."""
        for name in ("model", "messages" if chat else "prompt"):
            if name not in fields:
                raise Refusal(400, f"'{name}' is missing here.", name, "missing_required_parameter")
        for name in fields.keys() - _TAKEN:
            if not self.has("swallows") and not (name == "user" and self.has("ours")):
                raise Refusal(400, f"'{name}' is not known here.", name, "unknown_parameter")
        if fields["model"] != MODEL:
            raise Refusal(404, "The model is not served here.", "model", "model_not_found")
        for table in (_RANGES, _INTEGERS):
            for name, (low, high) in table.items():
                value = fields.get(name)
                kinds = (int, float) if table is _RANGES else (int,)
                if value is not None and (not isinstance(value, kinds) or not low <= value <= high):
                    raise Refusal(400, f"'{name}' must be within {low} and {high}.", name)
        if not isinstance(fields.get("stop", ""), str | list):
            raise Refusal(400, "'stop' must be text or a list.", "stop")
        for name, kind in (("stream", bool), ("logit_bias", dict), ("tools", list)):
            if not isinstance(fields.get(name, kind()), kind):
                raise Refusal(400, f"'{name}' has the wrong type.", name)
        if chat:
            self._check_messages(fields["messages"])
            self._check_tools(fields)
        self._check_format(fields.get("response_format"))

    def _check_messages(self, messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "'messages' must be a list that is not empty.", "messages")
        for each in messages:
            if not isinstance(each, dict) or each.get("role") not in ("system", "user", "assistant", "tool"):
                raise Refusal(400, "A message has no known role.", "messages")
            content = each.get("content")
            if content is None and each.get("tool_calls"):
                continue
            if not isinstance(content, str | list):
                raise Refusal(400, "A message has no content.", "messages")
            for part in content if isinstance(content, list) else []:
                self._check_part(part)

    def _check_part(self, part: Any) -> None:
        if part.get("type") == "text":
            return
        if part.get("type") != "image_url" or not self.vision:
            raise Refusal(400, "A content part of this type is not taken.", "messages")
        match = re.fullmatch(r"data:image/(\w+);base64,([A-Za-z0-9+/=]+)", part["image_url"]["url"])
        if not match or not base64.b64decode(match[2]).startswith(_MAGIC.get(match[1], b"?")):
            raise Refusal(400, "An image cannot be read.", "messages")

    def _check_tools(self, fields: dict[str, Any]) -> None:
        names = []
        for tool in fields.get("tools") or []:
            if "function" not in tool:
                raise Refusal(400, "A tool has no function.", "tools")
            names.append(tool["function"]["name"])
        choice = fields.get("tool_choice", "auto")
        if isinstance(choice, str) and choice not in ("none", "auto", "required"):
            raise Refusal(400, "'tool_choice' is not known.", "tool_choice")
        if isinstance(choice, dict) and choice["function"]["name"] not in names:
            raise Refusal(400, "'tool_choice' names no tool.", "tool_choice")

    def _check_format(self, form: Any) -> None:
        if not form or form["type"] != "json_schema":
            return
        schema = (form.get("json_schema") or {}).get("schema")
        try:
            assert schema is not None
            toy_model.instance(schema, random.Random(0))
        except (AssertionError, KeyError, AttributeError, TypeError):
            raise Refusal(400, "The schema cannot be held.", "response_format") from None

    # -- everything else

    async def _other(self, method: str, path: str, fields: dict[str, Any], headers: Headers) -> Answer:
        from tests.audit import further_routes

        if method == "GET":
            found = further_routes.get(self, path)
        else:
            found = await further_routes.post(self, path, fields)
        if found is None:
            raise Refusal(404, "There is nothing at this address.", code="not_found")
        return found


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _again(chunks: list[Any]) -> Any:
    for chunk in chunks:
        yield chunk


class Job:
    """One request's generation, as a whole body or as chunks."""

    def __init__(self, provider: Provider, fields: dict[str, Any], chat: bool) -> None:
        self.provider, self.fields, self.chat = provider, fields, chat
        self.limit = fields.get("max_tokens") or fields.get("max_completion_tokens") or 16
        self.prompts = [toy_model.prompt_tokens(fields["messages"])] if chat else _prompts(fields["prompt"])
        self.images = sum(
            part.get("type") == "image_url"
            for each in (fields["messages"] if chat else [])
            for part in (each["content"] if isinstance(each["content"], list) else [])
        )
        extra = toy_model.encode(json.dumps(fields.get("tools"))) if fields.get("tools") else []
        self.prompts = [prompt + extra for prompt in self.prompts]
        self.prompt_count = sum(map(len, self.prompts)) + 64 * self.images
        if self.prompt_count + 1 > CONTEXT and not provider.has("cuts prompts"):
            raise Refusal(
                400,
                f"The maximum context length is {CONTEXT} tokens, but the messages have {self.prompt_count}.",
                "messages",
                "context_length_exceeded",
            )
        self.prompt_count = min(self.prompt_count, CONTEXT - 100)
        self.limit = min(self.limit, CONTEXT - self.prompt_count)
        self.completion = 0
        key = tuple(self.prompts[0])
        self.cached = self.prompt_count - 1 if key in provider.cached else 0
        provider.cached.add(key)
        self.choices = len(self.prompts) * (fields.get("n") or 1)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_count,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt_count + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "cost": self._cost(),
        }

    def _cost(self) -> float:
        """In dollars; computed in whole parts of 1e-8 of them, which every price is a multiple of."""
        parts = 100 + 3 * (self.prompt_count - self.cached) + self.cached + 6 * self.completion
        return parts / 10**8

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"cmpl-{self.provider.made}", "object": kind, "created": 1_790_000_000, "model": MODEL}

    async def whole(self) -> dict[str, Any]:
        choices = []
        for index in range(self.choices):
            text, items, calls, finish = "", [], [], "length"
            async for piece, item, call, end in self._pieces(index):
                text += piece
                items += [item] if item else []
                calls += [call] if call else []
                finish = end or finish
            logprobs = {"content": items} if self.fields.get("logprobs") and self.chat else None
            message = {"role": "assistant", "content": text or None, "refusal": None}
            if calls:
                message["tool_calls"] = calls
            part = {"message": message} if self.chat else {"text": self._echo(index) + text}
            choices.append({"index": index, **part, "logprobs": logprobs, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def _echo(self, index: int) -> str:
        if not self.fields.get("echo"):
            return ""
        prompt = self.prompts[index // (self.fields.get("n") or 1)]
        return b"".join(map(toy_model.piece, prompt)).decode()

    async def stream(self, gone: asyncio.Task[None]) -> Any:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = self._head(kind)

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None, item: Any = None) -> dict[str, Any]:
            part = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            logprobs = {"content": [item]} if item and self.fields.get("logprobs") else None
            return {**head, "choices": [{"index": index, **part, "logprobs": logprobs, "finish_reason": finish}]}

        for index in range(self.choices):
            if self.chat:
                yield chunk(index, {"role": "assistant", "content": ""})
            elif echo := self._echo(index):
                yield chunk(index, {"content": echo})
            finish, calls = "length", 0
            async for piece, item, call, end in self._pieces(index):
                if gone.done() and not self.provider.has("goes on"):
                    return
                finish = end or finish
                if call:
                    for delta in _call_deltas(call, calls):
                        yield chunk(index, {"tool_calls": [delta]})
                    calls += 1
                elif piece:
                    yield chunk(index, {"content": piece}, item=item)
            yield chunk(index, {}, finish)
        yield {**head, "choices": [], "usage": self.usage()}
        yield b"[DONE]"

    async def _pieces(self, index: int) -> Any:
        """(text, logprob item, call, finish reason) of each token, or of each call."""
        forced = self._forced()
        if isinstance(forced, list):
            for number, call in enumerate(forced):
                self.completion += 10
                yield "", None, call, "tool_calls" if number == len(forced) - 1 else None
            return
        if forced is not None:
            tokens = toy_model.encode(forced)
            whole = len(tokens) <= self.limit
            self.completion += min(len(tokens), self.limit)
            data = b"".join(map(toy_model.piece, tokens[: self.limit]))
            text = data.decode(errors="ignore")
            for at in range(0, len(text), 3):
                await asyncio.sleep(0)
                yield text[at : at + 3], None, None, None
            yield "", None, None, "stop" if whole else "length"
            return
        async for each in self._drawn(index):
            yield each

    def _forced(self) -> str | list[Any] | None:
        """What a schema or a tool choice leaves no choice about: a text, calls, or nothing."""
        given = self.fields
        source = random.Random(given.get("seed") or 0)
        form = given.get("response_format")
        if form and form["type"] == "json_object":
            return '{"ship": "sea"}'
        if form:
            return json.dumps(toy_model.instance(form["json_schema"]["schema"], source), ensure_ascii=False)
        choice = given.get("tool_choice", "auto")
        asked = toy_model.content(given["messages"][-1]) if self.chat else ""
        if not given.get("tools") or choice == "none" or (choice == "auto" and "weather" not in asked):
            return None
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in given["tools"]}
        names = [choice["function"]["name"]] if isinstance(choice, dict) else [next(iter(tools))]
        if "three calls" in asked and given.get("parallel_tool_calls", True):
            names = [*names, *tools]
        return [
            {
                "id": f"call_{self.provider.made}_{number}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(toy_model.instance(tools[name], source))},
            }
            for number, name in enumerate(names)
        ]

    async def _drawn(self, index: int) -> Any:
        stops = self.fields.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        drawing = toy_model.Generation(self.prompts[index // (self.fields.get("n") or 1)], self.fields, index)
        made: list[toy_model.Step] = []
        text = sent = ""
        for number in range(self.limit):
            # Time passes where somebody looks at the clock: in streams, and where answers have to wait for one another.
            if self.provider.has("goes on") or (
                number < 300 and (self.fields.get("stream") or self.provider.waiting > 8)
            ):
                await asyncio.sleep(0.001)
            elif number % 50 == 0:
                await asyncio.sleep(0)
            step = drawing.step() if number < 300 else made[number % 300]
            made.append(step)
            self.completion += 1
            text += toy_model.piece(step.token).decode()
            at = min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)
            if at is not None:
                yield text[len(sent) : at], None, None, "stop"
                return
            safe = len(text) - max((len(stop) - 1 for stop in stops), default=0)
            if safe > len(sent):
                yield text[len(sent) : safe], self._item(step), None, None
                sent = text[:safe]
        yield text[len(sent) :], None, None, "length"

    def _item(self, step: toy_model.Step) -> dict[str, Any] | None:
        if not self.fields.get("logprobs"):
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = toy_model.piece(token)
            return {"token": data.decode(), "logprob": min(logprob, 0.0), "bytes": list(data)}

        best = [entry(*each) for each in step.best[: self.fields.get("top_logprobs") or 0]]
        return {**entry(step.token, step.logprob), "top_logprobs": best}


def _prompts(prompt: Any) -> list[list[int]]:
    if isinstance(prompt, str):
        return [toy_model.encode(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return [toy_model.encode(each) if isinstance(each, str) else each for each in prompt]


def _call_deltas(call: dict[str, Any], index: int) -> list[dict[str, Any]]:
    arguments = call["function"]["arguments"]
    half = len(arguments) // 2
    first = {**call, "index": index, "function": {"name": call["function"]["name"], "arguments": ""}}
    return [
        first,
        *({"index": index, "function": {"arguments": each}} for each in (arguments[:half], arguments[half:])),
    ]


def packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


@contextmanager
def running(provider: Provider) -> Iterator[str]:
    """Serve on a free port; gives the base URL."""
    # Named as TCP, or asyncio would let every answer wait for the acknowledgement of its headers.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        settings = uvicorn.Config(
            provider, lifespan="off", log_level="error", access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(10)
