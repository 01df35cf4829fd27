"""What a sampled token makes visible: text, the end of a choice, the events of a step."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ocserve.chat.channels import Part
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
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

Delta = TextDelta | ReasoningDelta | ToolCallDelta


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

    def ends(self, token: int) -> bool:
        """Whether this token ends an answer."""
        return self._vocab.is_end(token)

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
        answer = sequence.answer
        if self.ends(token):
            sequence.unseen.append(Unseen(answer.decoded, None))
            self.cut(sequence)
            return "stop"
        sequence.unseen.append(Unseen(answer.decoded, logprob))
        self._show(sequence, answer.feed(token, self._vocab.piece(token)))
        if answer.matched is not None:
            return "stop"
        if not sequence.room:
            self.cut(sequence)
            return "length"
        return None

    def cut(self, sequence: Sequence) -> None:
        """The answer ends here: what was held back is part of it.

        Tokens that never became text are told of all the same where their log-probabilities are asked for.
        """
        self._show(sequence, sequence.answer.finish())
        if not sequence.answer.only_words or sequence.answer.matched is not None:
            return
        unseen, sequence.unseen = sequence.unseen, []
        logprobs = tuple(each.logprob for each in unseen if each.logprob is not None)
        if logprobs:
            self._append(sequence, TextDelta(text="", tokens=len(unseen), index=sequence.index, logprobs=logprobs))

    def rest(self, sequence: Sequence) -> None:
        """Show what was held back; the choice is not complete before `finished`."""
        self._show(sequence, sequence.answer.finish())

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """The choice is complete."""
        if reason != "cancelled":
            self.rest(sequence)
            self._remember(sequence)
        stop = sequence.answer.matched if reason == "stop" else None
        if reason == "stop" and sequence.answer.calls:
            reason = "tool_calls"
        usage = sequence.usage if sequence.group.started else Usage()  # a prompt that was never begun was not used
        event = Finished(reason=reason, usage=usage, stop_sequence=stop, index=sequence.index)
        self._events.append((sequence.id, event))

    def failed(self, group: Group, error: ApiError) -> None:
        """The request is over: one choice could not go on."""
        self._events.append((group.id, Failed(error=error.info, usage=group.usage if group.started else Usage())))

    def _show(self, sequence: Sequence, parts: list[Part]) -> None:
        """Tell of parts. A token belongs to the part that it begins in; those of marks are told to nobody."""
        for part in parts:
            seen = _seen(sequence.unseen, part.end)
            if part.channel == "reasoning":
                sequence.reasoning_tokens += len(seen)
            if not part.text and part.name is None:
                continue
            logprobs = tuple(each.logprob for each in seen if each.logprob is not None)
            index, tokens = sequence.index, len(seen)
            if part.channel == "content":
                event: Delta = TextDelta(text=part.text, tokens=tokens, index=index, logprobs=logprobs)
            elif part.channel == "reasoning":
                event = ReasoningDelta(text=part.text, tokens=tokens, index=index, logprobs=logprobs)
            else:
                event = ToolCallDelta(
                    call=part.call,
                    name=part.name,
                    arguments=part.text,
                    tokens=tokens,
                    index=index,
                    logprobs=logprobs,
                )
            self._append(sequence, event)

    def _append(self, sequence: Sequence, event: Delta) -> None:
        """Add an event, together with the one before where they are of the same text."""
        if self._events and self._events[-1][0] == sequence.id:
            joined = _joined(self._events[-1][1], event)
            if joined is not None:
                event = joined
                self._events.pop()
        self._events.append((sequence.id, event))

    def _remember(self, sequence: Sequence) -> None:
        """Keep the ids of an assistant turn for the prompts that quote it."""
        answer = sequence.answer
        if not isinstance(sequence.group.request.prompt, ChatPrompt) or answer.matched is not None:
            return
        if not answer.only_words:
            return  # a later prompt has such a turn in the template's words
        ids = sequence.generated
        if ids and self.ends(ids[-1]):
            ids = ids[:-1]
        try:
            text = b"".join(self._vocab.piece(token) for token in ids).decode()
        except UnicodeDecodeError:
            return  # cut in the middle of a character: the client got another text
        if text:
            self._turns.remember(sequence.tenant, text, ids)


def _joined(before: GenerateEvent, event: Delta) -> Delta | None:
    """Two deltas of the same text as one; None if they are of different ones."""
    if isinstance(before, Started | PromptLogprobs | Finished | Failed) or before.index != event.index:
        return None
    tokens, logprobs = before.tokens + event.tokens, before.logprobs + event.logprobs
    if isinstance(before, ToolCallDelta):
        if not isinstance(event, ToolCallDelta) or event.name is not None or event.call != before.call:
            return None
        arguments = before.arguments + event.arguments
        return msgspec.structs.replace(before, arguments=arguments, tokens=tokens, logprobs=logprobs)
    if isinstance(event, ToolCallDelta) or type(before) is not type(event):
        return None
    return msgspec.structs.replace(event, text=before.text + event.text, tokens=tokens, logprobs=logprobs)


def _seen(unseen: list[Unseen], end: int) -> list[Unseen]:
    """Take from the list the tokens that begin before this character of the answer."""
    count = next((index for index, token in enumerate(unseen) if token.begin >= end), len(unseen))
    seen = unseen[:count]
    del unseen[:count]
    return seen
