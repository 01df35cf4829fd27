"""One request before the judge: its prompts before anything is computed, its answers before their end is told."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence

from ocserve.errors import ContentFiltered
from ocserve.generation import (
    Answer,
    EmbedRequest,
    Encoded,
    EncodeRequest,
    Prompt,
    Question,
    ScoreRequest,
    TokenPrompt,
)
from ocserve.policy.judge import Judge
from ocserve.policy.protocol import Asker
from ocserve.policy.review import Review

Tokenise = Callable[[Question], Awaitable[Answer]]


class Hearing:
    """`ask` is the engine's, which knows what token ids spell."""

    def __init__(self, judge: Judge, asker: Asker, ask: Tokenise) -> None:
        self._judge = judge
        self._asker = asker
        self._ask = ask

    async def prompts(self, prompts: Sequence[Prompt]) -> None:
        """Have each judged by itself; raises the first's `ContentFiltered` that is refused, and `PolicyUnavailable`."""
        if not self._judge.judges("prompt"):
            return
        questions = [self._asker.of_prompt(prompt, await self._spelt(prompt)) for prompt in prompts]
        checks = (
            self._judge.admit(question, f"prompt[{index}]" if len(prompts) > 1 else None)
            for index, question in enumerate(questions)
        )
        found = [error for error in await asyncio.gather(*checks, return_exceptions=True) if error is not None]
        for error in sorted(found, key=lambda error: not isinstance(error, ContentFiltered)):
            raise error

    async def inputs(self, question: EmbedRequest | ScoreRequest) -> None:
        """Have the texts that something is computed of judged, as one; raises as `prompts`."""
        if not self._judge.judges("prompt"):
            return
        inputs = question.inputs if isinstance(question, EmbedRequest) else ()
        spelt = [await self._spelt(each) for each in inputs if isinstance(each, TokenPrompt)]
        await self._judge.admit(self._asker.of_inputs(question, spelt))

    def review(self, choices: int, *, streamed: bool) -> Review | None:
        """What stands between the answers and their client, if they are judged."""
        if not self._judge.judges("answer"):
            return None
        return Review(self._judge, self._asker, choices, holds=self._judge.holds_streams or not streamed)

    async def _spelt(self, prompt: Prompt) -> str:
        """What a prompt of token ids spells; of any other nothing."""
        if not isinstance(prompt, TokenPrompt):
            return ""
        answer = await self._ask(
            EncodeRequest(request_id=secrets.token_hex(12), model=self._asker.model, prompt=prompt)
        )
        assert isinstance(answer, Encoded)
        return answer.text
