"""What is audited: one model of a server, what its listing says of it, and what the audit has measured so far."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ocserve import peer
from ocserve.audit.published import ACCEPT, PATHS, Page
from ocserve.audit.server import Reply, Server, Stream, dig
from ocserve.audit.verdict import Fault, Refused, Unproven, clean

# Long enough to go on for a hundred tokens, short enough that caching does not move a quantised model's sums.
STORY = "Tell a long story about a lighthouse keeper and his daughter."
LIST = "List many random words, one after another:"
SHORT = "Say hello."


def counting(start: int) -> str:
    """A prompt whose greedy answer has no close calls, so that also a quantised model gives it again and again."""
    return f"Continue: {', '.join(map(str, range(start, start + 6)))},"


_CONTEXT = (("context_length",), ("max_model_len",), ("context_window",), ("max_context_length",), ("meta", "n_ctx"))
_OUTPUT = (("max_output_tokens",), ("max_output_length",), ("max_completion_tokens",), ("max_tokens",))


def _first(entry: Mapping[str, Any], paths: tuple[tuple[str, ...], ...]) -> int | None:
    found = (dig(entry, *path) for path in paths)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


@dataclass(slots=True)
class Subject:
    """A model on a server. `entry` is what the listing says of it.

    `suppress` are token ids that end its answers, `pages` the operator's published pages by kind. `figures` are
    measurements by name (units in the names), filled by probes and read by what is drafted. `is_ours` says that the
    server is an ocserve, of which more is known than can be asked.
    """

    server: Server
    model: str
    entry: Mapping[str, Any]
    suppress: tuple[int, ...] = ()
    quick: bool = False
    pages: Mapping[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    is_ours: bool = False
    _documents: dict[str, Any] = field(default_factory=dict)
    _published: dict[str, tuple[Page, ...]] = field(default_factory=dict)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, as listed under any of the usual names."""
        return _first(self.entry, _CONTEXT)

    @property
    def max_output_tokens(self) -> int | None:
        """The largest answer, as listed."""
        return _first(self.entry, _OUTPUT)

    def takes(self, modality: str) -> bool:
        """Whether the listing names an input modality."""
        places = (dig(self.entry, "input_modalities"), dig(self.entry, "architecture", "input_modalities"))
        return any(modality in place for place in places if isinstance(place, list))

    def fields(self, content: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """A chat request. None among the given fields leaves that field out."""
        base = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 32}
        return {name: value for name, value in {**base, **given}.items() if value is not None}

    async def chat(self, content: Any = STORY, **given: Any) -> Reply:
        """A whole chat answer; raises `Fault`."""
        return await self.server.post("/chat/completions", self.fields(content, given))

    async def chat_stream(self, content: Any = STORY, *, leave_after: int | None = None, **given: Any) -> Stream:
        """A streamed chat answer with usage; raises `Fault`."""
        asked = self.fields(content, {"stream_options": {"include_usage": True}, **given})
        return await self.server.stream("/chat/completions", asked, leave_after=leave_after)

    async def complete(self, prompt: Any = STORY, **given: Any) -> Reply:
        """A whole text completion; raises `Fault`."""
        return await self.server.post("/completions", self._completion(prompt, given))

    async def complete_stream(self, prompt: Any = STORY, **given: Any) -> Stream:
        """A streamed text completion with usage; raises `Fault`."""
        asked = self._completion(prompt, {"stream_options": {"include_usage": True}, **given})
        return await self.server.stream("/completions", asked)

    def _completion(self, prompt: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        fields = {"model": self.model, "prompt": prompt, "max_tokens": 16, **given}
        return {name: value for name, value in fields.items() if value is not None}

    async def refused(self, content: Any = SHORT, **given: Any) -> Reply:
        """The answer to a chat request that should be refused, whatever its status; raises `Fault` without one."""
        return await self.server.send("POST", "/chat/completions", self.fields(content, given))

    async def document(self, path: str) -> Any:
        """A JSON document at the server's root, read once; None if there is none."""
        if path not in self._documents:
            reply = await self.server.send("GET", path, at_root=True)
            self._documents[path] = reply.json if reply.status == 200 else None
        return self._documents[path]

    async def published(self, kind: str) -> tuple[Page, ...]:
        """The operator's page of a kind, or what is found at the usual paths; none there is no error.

        Read once, and as anybody reads it; limits as the audit's key has them. Raises `Fault` for a named page that is
        not there.
        """
        if kind not in self._published:
            named = self.pages.get(kind)
            places = [named] if named is not None else [self.server.root + path for path in PATHS[kind]]
            found = []
            for address in places:
                try:
                    text = await self._page(address, ours=kind == "limits" and named is None)
                except Fault:
                    if named is not None:
                        raise
                    continue
                found.append(Page.of(clean(peer.without_userinfo(address), 120), text))
            self._published[kind] = tuple(found)
        return self._published[kind]

    async def _page(self, address: str, *, ours: bool) -> str:
        if not ours:
            return await self.server.page(address, ACCEPT)
        path = address.removeprefix(self.server.root)
        return (await self.server.send("GET", path, at_root=True, headers=ACCEPT)).ok().body.decode(errors="replace")

    async def tokens(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text` by the server's tokenizer; `special` adds the model's own first token.

        Speaks llama-server's route and vLLM's. Raises `Unproven` where the server has neither.
        """
        content = {"content": text, "add_special": special, "parse_special": True}  # llama-server
        prompt = {"prompt": text, "add_special_tokens": special}  # vLLM
        for fields in (content, {"model": self.model, **content}, {"model": self.model, **prompt}):
            reply = await self.server.send("POST", "/tokenize", fields, at_root=True)
            found = dig(reply.json, "tokens") if reply.status == 200 else None
            if isinstance(found, list) and all(isinstance(token, int) for token in found):
                return found
        raise Unproven("the server has no /tokenize route that says token ids")

    async def rendered(self, messages: list[dict[str, str]]) -> str:
        """The conversation as the model reads it. Raises `Unproven` without `/apply-template`."""
        for fields in ({"messages": messages}, {"model": self.model, "messages": messages}):
            reply = await self.server.send("POST", "/apply-template", fields, at_root=True)
            found = dig(reply.json, "prompt") if reply.status == 200 else None
            if isinstance(found, str):
                return found
        raise Unproven("the server has no /apply-template route that says the rendered prompt")


async def supported(asked: Awaitable[Reply]) -> Reply:
    """The answer to a request for an optional feature; a refusal says that the feature is not there."""
    try:
        return await asked
    except Refused as refused:
        raise Fault(f"not supported: {refused}") from None


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to a server. `run` returns its evidence, or raises `Fault`, `Unsaid` or `Unproven`."""

    id: str
    run: Callable[[Subject], Awaitable[str]]

    @property
    def about(self) -> str:
        """One line on what it does."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


def named(*functions: Callable[[Subject], Awaitable[str]]) -> tuple[Probe, ...]:
    """Probes whose ids are their functions' names with hyphens."""
    return tuple(Probe(function.__name__.replace("_", "-"), function) for function in functions)
