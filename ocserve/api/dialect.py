"""What every dialect is: a pure codec between a vendor's wire format and the vocabulary.

A dialect is a module that has `parse`, `encoder` and `error_body`. It holds no state, awaits nothing and opens nothing;
the HTTP layer owns sockets, headers and SSE bytes, the service owns the request's life.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ocserve.errors import ErrorInfo
from ocserve.generation import GenerateEvent, GenerateRequest, Usage
from ocserve.modelcard import ServedModel

Models = Callable[[str], ServedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """How the frames of a stream become its bytes: each between `prefix` and `suffix`, `separator` between two of them.

    A frame's event name is a line of its own before the prefix. `keep_alive` is what a silent stream says.
    """

    media_type: str = "text/event-stream; charset=utf-8"
    opening: bytes = b""
    prefix: bytes = b"data: "
    suffix: bytes = b"\n\n"
    separator: bytes = b""
    closing: bytes = b""
    keep_alive: bytes = b": keep-alive\n\n"


SSE = Framing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A request understood. `ignored` names the parameters that were accepted and have no effect.

    `framing` is how a streamed answer is framed, `show_reasoning` whether the client wants to see the model think.
    `more` are further prompts of the same request, all of one model: their choices are numbered on from those of
    `request`. `encoder` makes the reply's encoder where it depends on more than `Reply` tells. `paths` are what the
    engine calls parts of a request and what this client called them, for refusals. `labels` are the fields of a turn
    that this client sent and the engine may have no use for, by the engine's names; None: the engine's paths are the
    client's. `include_usage` is None where the client did not say.
    """

    request: GenerateRequest
    model: ServedModel
    stream: bool
    ignored: tuple[str, ...] = ()
    include_usage: bool | None = None
    show_reasoning: bool = True
    framing: Framing = SSE
    more: tuple[GenerateRequest, ...] = ()
    encoder: Callable[[Reply], Encoder] | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] | None = None

    @property
    def requests(self) -> tuple[GenerateRequest, ...]:
        """Every prompt of the request, in order."""
        return self.request, *self.more

    def named(self, unread: Sequence[str]) -> tuple[str, ...]:
        """What the engine had no use for, in the client's words."""
        if self.labels is None:
            return tuple(unread)
        names = (self.labels.get(path.rpartition(".")[2]) for path in unread)
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an answer repeats: a bare id (each dialect adds its prefix), the model's id, the Unix time in seconds.

    `choices` is how many answers were asked for; events carry the index of theirs. `prompt` is the usage as it is known
    when the request holds its slot.
    """

    id: str
    model: str
    created: int
    choices: int = 1
    include_usage: bool | None = None
    show_reasoning: bool = True
    prompt: Usage = field(default_factory=Usage)

    def call_id(self, choice: int, call: int) -> str:
        """A tool call's id, without the dialect's prefix: the same in a stream and in a whole answer."""
        return f"{self.id}{choice:02d}{call:02d}"


@dataclass(frozen=True, slots=True)
class Frame:
    """One record of a stream; `event` is its name in the dialects that have one."""

    data: bytes
    event: str | None = None


class Encoder(Protocol):
    """One reply's encoder: events in, frames or one whole answer out."""

    def open(self) -> Sequence[Frame]:
        """What a stream says as soon as its headers are out."""

    def event(self, event: GenerateEvent) -> Sequence[Frame]:
        """What a stream says about `event`; nothing follows an error."""

    def close(self, usage: Usage) -> Sequence[Frame]:
        """How a stream ends once every choice has finished; `usage` is the request's, over all choices."""

    def complete(self, events: Sequence[GenerateEvent], usage: Usage) -> bytes:
        """The whole answer, from all events up to the `Finished` of each choice, and the request's usage."""


class Catalogue(Protocol):
    """A vendor's list of models."""

    def listing(self, models: Sequence[ServedModel]) -> bytes:
        """All of them."""

    def one(self, model: ServedModel) -> bytes:
        """One of them."""


class Dialect(Protocol):
    """A vendor's wire format. Modules fulfil it."""

    def parse(self, body: bytes, models: Models, *, refuse_unknown: bool) -> Parsed:
        """The request in `body`; raises `ApiError` with the exact path of what is wrong."""

    def encoder(self, reply: Reply) -> Encoder:
        """A fresh encoder for one reply."""

    def error_body(self, info: ErrorInfo) -> bytes:
        """The body of an error answer."""
