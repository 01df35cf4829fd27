"""What a sampled token makes visible: text, the end of a choice, the events of a step."""

from __future__ import annotations

from collections.abc import Callable

from ocserve.engine.llama import Vocab
from ocserve.engine.slots import Group, Sequence, Unseen
from ocserve.engine.turns import Turns
from ocserve.engine.wire import Step
from ocserve.errors import ApiError
from ocserve.generation import (
    ChatPrompt,
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    PromptLogprobs,
    Started,
    TextDelta,
    TokenLogprob,
)


class Emitter:
    """Collects the events of a step and sends them as one frame."""

    def __init__(self, vocab: Vocab, turns: Turns, emit: Callable[[Step], None]) -> None:
        self._vocab = vocab
        self._turns = turns
        self._emit = emit
        self._events: list[tuple[str, GenerateEvent]] = []

    def flush(self) -> None:
        """Send what became visible, as one frame."""
        if self._events:
            events, self._events = self._events, []
            self._emit(Step(events=tuple(events)))

    def piece(self, token: int) -> bytes:
        """The bytes of a token, as clients are told of it."""
        return self._vocab.piece(token)

    def started(self, sequence: Sequence) -> None:
        """The first choice of a request holds its slot."""
        group = sequence.group
        if not group.started:
            group.started = True
            event = Started(prompt_tokens=len(sequence.prompt), cached_tokens=group.cached_tokens or 0)
            self._events.append((group.id, event))

    def scored(self, sequence: Sequence) -> None:
        """All that was asked of the prompt's tokens is known."""
        event = PromptLogprobs(tokens=tuple(sequence.prompt_logprobs), index=sequence.index)
        self._events.append((sequence.id, event))

    def take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None = None) -> FinishReason | None:
        """Add a token of the answer, emit what became visible, and say whether and why it is the last."""
        sequence.generated.append(token)
        if self._vocab.is_end(token):
            sequence.unseen.append(Unseen(0, None))
            self._last_text(sequence, sequence.text.finish())
            return "stop"
        piece = self._vocab.piece(token)
        sequence.unseen.append(Unseen(len(piece), logprob))
        text = sequence.text.feed(piece)
        if sequence.text.matched is not None:
            self._text(sequence, text)
            return "stop"
        if not sequence.room:
            self._last_text(sequence, text + sequence.text.finish())
            return "length"
        self._text(sequence, text)
        return None

    def cut(self, sequence: Sequence) -> None:
        """The answer ends here although no token ended it: what was held back is part of it."""
        self._last_text(sequence, sequence.text.finish())

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """The choice is complete."""
        if reason != "cancelled":
            self._remember(sequence)
        stop = sequence.text.matched if reason == "stop" else None
        event = Finished(reason=reason, usage=sequence.usage, stop_sequence=stop, index=sequence.index)
        self._events.append((sequence.id, event))

    def failed(self, group: Group, error: ApiError) -> None:
        """The request is over: one choice could not go on."""
        self._events.append((group.id, Failed(error=error.info, usage=group.usage)))

    def _last_text(self, sequence: Sequence, text: str) -> None:
        """Tokens that never became text are told of all the same where their log-probabilities are asked for."""
        if text or any(each.logprob is not None for each in sequence.unseen):
            self._delta(sequence, text)

    def _text(self, sequence: Sequence, text: str) -> None:
        if text:
            self._delta(sequence, text)

    def _delta(self, sequence: Sequence, text: str) -> None:
        seen = _seen(sequence.unseen, sequence.text.withheld_bytes)
        tokens, logprobs = len(seen), tuple(each.logprob for each in seen if each.logprob is not None)
        last = self._events[-1] if self._events else None
        if last is not None and last[0] == sequence.id and isinstance(last[1], TextDelta):
            before = last[1]
            if before.index == sequence.index:
                text, tokens, logprobs = before.text + text, before.tokens + tokens, before.logprobs + logprobs
                self._events.pop()
        delta = TextDelta(text=text, tokens=tokens, index=sequence.index, logprobs=logprobs)
        self._events.append((sequence.id, delta))

    def _remember(self, sequence: Sequence) -> None:
        """Keep the ids of an assistant turn for the prompts that quote it."""
        if not isinstance(sequence.group.request.prompt, ChatPrompt) or sequence.text.matched is not None:
            return
        ids = sequence.generated
        if ids and self._vocab.is_end(ids[-1]):
            ids = ids[:-1]
        try:
            text = b"".join(self._vocab.piece(token) for token in ids).decode()
        except UnicodeDecodeError:
            return  # cut in the middle of a character: the client got another text
        if text:
            self._turns.remember(sequence.tenant, text, ids)


def _seen(unseen: list[Unseen], withheld_bytes: int) -> list[Unseen]:
    """Take from the list those that do not lie wholly within the last bytes, which are not in the text yet."""
    count = len(unseen)
    while count and withheld_bytes > 0:
        withheld_bytes -= unseen[count - 1].size_bytes
        count -= withheld_bytes >= 0
    seen = unseen[:count]
    del unseen[:count]
    return seen
