"""Sequences and their states: what one choice of a generation holds while it lives in the engine.

    WAITING ──admit──▶ PREFILL ──computed──▶ DECODE ──end──▶ ENDED
       ▲                  │                    │
       └────preempt───────┴────────────────────┘           (end is allowed from every state)

A preempted sequence gives back its KV cells and keeps its tokens, sampler and text stream, so that it later goes on
where it was: from its saved state if there was room for one, else after computing its tokens again. A sequence stores
facts; everything else is a property.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from ocserve.engine.answers import Answer, AnswerPlan
from ocserve.engine.constraint import Guide
from ocserve.engine.context import State
from ocserve.engine.speculation import Speculator
from ocserve.engine.vision import Tile
from ocserve.generation import GenerateRequest, TokenLogprob, Usage


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


class Move(Enum):
    ADMIT = "admit"
    COMPUTED = "computed"
    PREEMPT = "preempt"
    END = "end"


TRANSITIONS: dict[tuple[Phase, Move], Phase] = {
    (Phase.WAITING, Move.ADMIT): Phase.PREFILL,
    (Phase.PREFILL, Move.COMPUTED): Phase.DECODE,
    (Phase.PREFILL, Move.PREEMPT): Phase.WAITING,
    (Phase.DECODE, Move.PREEMPT): Phase.WAITING,
    (Phase.WAITING, Move.END): Phase.ENDED,
    (Phase.PREFILL, Move.END): Phase.ENDED,
    (Phase.DECODE, Move.END): Phase.ENDED,
}


class Sampler(Protocol):
    """Draws tokens for one sequence; owned by it and closed when it ends."""

    def accept(self, token: int) -> None:
        """A token was added without being drawn."""

    def close(self) -> None:
        """Free what it holds."""


class IllegalMove(Exception):
    """A transition that the table does not have; the sequence is unchanged."""


@dataclass(frozen=True, slots=True)
class Parked:
    """What a preempted sequence had computed: its first `length` tokens, in main memory."""

    state: State
    length: int


@dataclass(frozen=True, slots=True)
class Restoration:
    """Leading blocks of a prompt that are being brought back, by their keys in the tiers."""

    keys: list[bytes]


class Unseen(NamedTuple):
    """A sampled token that no delta has told of yet. `begin` is the character of the answer that it begins in."""

    begin: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A tile of an image in a prompt: it takes the positions from `begin` on."""

    begin: int
    tile: Tile

    @property
    def end(self) -> int:
        return self.begin + self.tile.tokens


@dataclass(eq=False, slots=True)
class Group:
    """The choices of one request: they share a prompt and end together when one of them fails."""

    request: GenerateRequest
    members: list[Sequence] = field(default_factory=list)
    started: bool = False  # whether the client has been told that it holds a slot
    cached_tokens: int | None = None  # of the prompt, not computed for this request; None until its first choice began

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def usage(self) -> Usage:
        """Of all choices together; the prompt counts once."""
        usages = [sequence.usage for sequence in self.members]
        return Usage(
            prompt_tokens=usages[0].prompt_tokens,
            cached_tokens=usages[0].cached_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
            image_tokens=usages[0].image_tokens,
            accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in usages),
            rejected_draft_tokens=sum(usage.rejected_draft_tokens for usage in usages),
        )


class Sequence:
    """One choice: its tokens, how many of them are in KV memory, and what it samples and emits with."""

    def __init__(
        self,
        group: Group,
        prompt: tuple[int, ...],
        *,
        max_tokens: int,
        sampler: Sampler,
        deadline: float,
        arrived: float = 0.0,
        guide: Guide | None = None,
        speculator: Speculator | None = None,
        plan: AnswerPlan | None = None,
        images: tuple[Shown, ...] = (),
    ) -> None:
        """`deadline` and `arrived` are monotonic seconds. The sequence joins `group` as its next choice.

        `images` are those of the prompt, in order; in the place of their tokens `prompt` has numbers below 0.
        """
        self.group = group
        self.index = len(group.members)
        group.members.append(self)
        self.prompt = prompt
        self.prompt_ids = array("i", prompt)  # compared and cut without an object for each token
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.deadline = deadline
        self.arrived = arrived
        self.guide = guide
        self.speculator = speculator
        self.images = images
        self.answer: Answer = (plan or AnswerPlan()).open(group.request.stop)
        self.reasoning_tokens = 0
        self.generated: list[int] = []
        self.computed = 0  # tokens, from the start, whose KV cells exist
        self.slot: int | None = None
        self.attached = False  # whether it has taken what memory holds of its tokens …
        self.expected = 0  # … and how many of them it is expected to share until then
        self.restoring: Restoration | None = None
        self.parked: Parked | None = None
        self.stops: list[int] = []  # lengths, ascending, at which a chunk of its prompt must end
        self.phase = Phase.WAITING
        self.prompt_logprobs: list[TokenLogprob] = []  # of its first tokens, as far as they are known
        self.unseen: list[Unseen] = []  # sampled tokens whose text is still held back
        self.drafted = self.accepted = 0

    @property
    def id(self) -> str:
        return self.group.id

    @property
    def tenant(self) -> bytes:
        return self.group.request.salt

    @property
    def wants_logprobs(self) -> bool:
        """Whether the distribution before every token of the answer is asked for."""
        return self.group.request.logprobs is not None

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed: of one choice for all of its request."""
        wanted = self.group.request.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens known so far: prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Known tokens that still have to be computed."""
        return self.length - (self.computed or (self.parked.length if self.parked else 0))

    @property
    def next_image(self) -> Shown | None:
        """The first image that is not computed. One is computed as a whole, so `computed` is never inside."""
        return next((image for image in self.images if image.end > self.computed), None)

    @property
    def words_ahead(self) -> int:
        """Known tokens to compute before the next image, or before the end if there is none."""
        image = self.next_image
        return self.remaining if image is None else image.begin - self.computed

    def outside(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that does not end inside an image."""
        return next((image.begin for image in self.images if image.begin < length < image.end), length)

    @property
    def has_begun(self) -> bool:
        """Whether any of its tokens were taken from memory or computed."""
        return self.attached or bool(self.generated) or self.parked is not None

    @property
    def claim(self) -> int:
        """KV cells that its known tokens need beyond those that it holds."""
        return self.remaining if self.attached else self.length - self.expected

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.max_tokens - len(self.generated)

    @property
    def plain(self) -> bool:
        """Whether it decodes one token after another until one is the last, whatever text they make."""
        request = self.group.request
        return (
            self.phase is Phase.DECODE
            and self.remaining == 1
            and self.guide is None
            and request.logprobs is None
            and not (request.stop or self.stops or self.answer.limited)
            and (self.speculator is None or self.speculator.light)
        )

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.group.cached_tokens or 0,
            completion_tokens=len(self.generated),
            reasoning_tokens=self.reasoning_tokens,
            image_tokens=sum(image.tile.tokens for image in self.images),
            accepted_draft_tokens=self.accepted,
            rejected_draft_tokens=self.drafted - self.accepted,
        )

    def token(self, position: int) -> int:
        """The known token at `position`."""
        prompt = len(self.prompt)
        return self.prompt[position] if position < prompt else self.generated[position - prompt]

    def tokens(self, begin: int, end: int) -> array[int]:
        """The known tokens at positions begin … end - 1."""
        prompt = len(self.prompt)
        tokens = self.prompt_ids[begin:end]
        if end > prompt:
            tokens.extend(self.generated[max(begin - prompt, 0) : end - prompt])
        return tokens

    def note_cached(self) -> None:
        """How much of its prompt a request finds computed is what the first of its choices finds."""
        if self.group.cached_tokens is None:
            scored = self.group.request.prompt_logprobs is not None  # its first choice computes all of the prompt
            self.group.cached_tokens = 0 if scored else min(self.computed, len(self.prompt))

    def move(self, move: Move) -> None:
        """Take a transition; raises `IllegalMove` and changes nothing if there is none."""
        target = TRANSITIONS.get((self.phase, move))
        if target is None:
            raise IllegalMove(f"{move.value} from {self.phase.value}")
        self.phase = target
        if target in (Phase.WAITING, Phase.ENDED):
            self.computed = 0
            self.slot = None
            self.attached = False
            self.restoring = None
            self.stops = []

    def close(self) -> None:
        """Free what the sequence owns outside of Python."""
        self.sampler.close()
        if self.guide is not None:
            self.guide.close()
        if self.speculator is not None:
            self.speculator.close()
