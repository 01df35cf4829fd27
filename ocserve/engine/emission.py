"""What a sampled token makes visible: text, the end of a choice, the events of a step."""

from __future__ import annotations

from collections.abc import Callable

from ocserve.engine.llama import Vocab
from ocserve.engine.slots import Group, Sequence
from ocserve.engine.turns import Turns
from ocserve.engine.wire import Step
from ocserve.errors import ApiError
from ocserve.generation import ChatPrompt, Failed, Finished, FinishReason, GenerateEvent, Started, TextDelta


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

    def started(self, sequence: Sequence) -> None:
        """The first choice of a request holds its slot."""
        group = sequence.group
        if not group.started:
            group.started = True
            event = Started(prompt_tokens=len(sequence.prompt), cached_tokens=group.cached_tokens or 0)
            self._events.append((group.id, event))

    def take(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Add a token of the answer, emit what became visible, and say whether and why it is the last."""
        sequence.generated.append(token)
        sequence.unseen += 1
        if self._vocab.is_end(token):
            return self._ending(sequence, sequence.text.finish(), "stop")
        text = sequence.text.feed(self._vocab.piece(token))
        if sequence.text.matched is not None:
            return self._ending(sequence, text, "stop")
        if not sequence.room:
            return self._ending(sequence, text + sequence.text.finish(), "length")
        self._text(sequence, text)
        return None

    def cut(self, sequence: Sequence) -> None:
        """The answer ends here although no token ended it: what was held back is part of it."""
        self._text(sequence, sequence.text.finish())

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

    def _ending(self, sequence: Sequence, text: str, reason: FinishReason) -> FinishReason:
        self._text(sequence, text)
        return reason

    def _text(self, sequence: Sequence, text: str) -> None:
        if not text:
            return
        tokens, sequence.unseen = sequence.unseen, 0
        last = self._events[-1] if self._events else None
        if last is not None and last[0] == sequence.id and isinstance(last[1], TextDelta):
            before = last[1]
            if before.index == sequence.index:
                text, tokens = before.text + text, before.tokens + tokens
                self._events.pop()
        self._events.append((sequence.id, TextDelta(text=text, tokens=tokens, index=sequence.index)))

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
