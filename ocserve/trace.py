"""What is learnt of one HTTP request while it lives, for its settlement, its log line and the metrics."""

from __future__ import annotations

import time

from msgspec.structs import replace

from ocserve.accounts.billing import Bill
from ocserve.generation import (
    Answer,
    Encoded,
    Failed,
    Finished,
    GenerateEvent,
    ReasoningDelta,
    RequestRecord,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from ocserve.telemetry.pace import Pace


class Trace:
    """What is learnt of one HTTP request while it lives; `record` makes the immutable summary at its end."""

    def __init__(self, request_id: str, route: str) -> None:
        self.request_id = request_id
        self.route = route
        self.key_id = "-"
        self.model: str | None = None
        self.stream = False
        self.finish_reason: str | None = None
        self.error_code: str | None = None
        self.queue_ms: float | None = None
        self.limit: str | None = None
        self.traceparent: str | None = None
        self.pace = Pace()
        self.bill: Bill | None = None
        self.keepable = True  # whether what was told may be kept for a repeat
        self._answered = False
        self._arrived = time.monotonic()
        self._prompts: dict[int, Usage] = {}
        self._choices: dict[int, Usage] = {}

    @property
    def usage(self) -> Usage:
        """What the request has used so far: each of its prompts once, and the tokens of all its choices."""
        prompts, choices = self._prompts.values(), self._choices.values()
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            image_tokens=sum(usage.image_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in choices),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in choices),
            accepted_draft_tokens=sum(usage.accepted_draft_tokens for usage in choices),
            rejected_draft_tokens=sum(usage.rejected_draft_tokens for usage in choices),
            cost=self.bill.cost if self.bill else None,
        )

    def elapsed_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return (time.monotonic() - self._arrived) * 1000

    def observe(self, event: GenerateEvent, prompt: int = 0, first: int = 0) -> None:
        """Take from an event what the summary needs.

        `prompt` is which of the request's prompts it is about, `first` the number of that prompt's first choice.
        """
        match event:
            case Started(prompt_tokens=tokens, cached_tokens=cached):
                if self.queue_ms is None:
                    self.queue_ms = self.elapsed_ms()
                self._prompts[prompt] = Usage(prompt_tokens=tokens, cached_tokens=cached)
            case TextDelta() | ReasoningDelta() | ToolCallDelta():
                self.pace.took(event.index, event.tokens)
                # What was delivered counts even if the engine never gets to say its own total.
                so_far = self._choices.get(event.index, Usage())
                thought = event.tokens if isinstance(event, ReasoningDelta) else 0
                self._choices[event.index] = replace(
                    so_far,
                    completion_tokens=so_far.completion_tokens + event.tokens,
                    reasoning_tokens=so_far.reasoning_tokens + thought,
                )
            case Finished(reason=reason, usage=usage, index=index):
                self.finish_reason = reason  # of several choices, that of the one that ended last
                self._choices[index] = usage
                if usage.prompt_tokens:  # what was cached may become known only after the start
                    self._prompts[prompt] = usage
            case Failed(error=error, usage=usage):
                self.finish_reason, self.error_code = "error", error.code
                if usage.prompt_tokens:  # else the engine died and could not say what it had used
                    self._prompts[prompt] = usage
                    before = {index: told for index, told in self._choices.items() if index < first}
                    self._choices = {**before, first: usage}

    def told(self, answer: Answer) -> None:
        """Take from the answer to a question what the summary needs; text that was only tokenised is not used."""
        self._answered = True
        if not isinstance(answer, Encoded):
            self._prompts[0] = Usage(prompt_tokens=sum(answer.tokens))

    async def settle(self) -> None:
        """Have the request charged, once. Only then may anyone be told that it has ended."""
        if self.bill:
            whole = self._answered or self.finish_reason not in (None, "cancelled")
            await self.bill.settle(self.usage, whole=whole, failed=self.error_code is not None)

    def record(self, status: int) -> RequestRecord:
        """The summary; `status` is the HTTP status that was sent."""
        return RequestRecord(
            request_id=self.request_id,
            route=self.route,
            key_id=self.key_id,
            model=self.model,
            status=status,
            stream=self.stream,
            usage=self.usage,
            finish_reason=self.finish_reason,
            error_code=self.error_code,
            queue_ms=self.queue_ms,
            ttft_ms=self.pace.first_ms(self._arrived),
            total_ms=self.elapsed_ms(),
            limit=self.limit,
            token_gaps=tuple(self.pace.gaps),
            token_gaps_s=self.pace.gaps_s,
            traceparent=self.traceparent,
        )
