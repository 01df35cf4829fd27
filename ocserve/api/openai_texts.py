"""The answer side of OpenAI's text completions: chunks, whole answers, and log-probabilities aligned with the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ocserve.api.dialect import Frame, Reply
from ocserve.api.openai_wire import Answer, ReplyEncoder, choice, token_text
from ocserve.generation import Finished, GenerateEvent, PromptLogprobs, TextDelta, TokenLogprob


class _Listing:
    """The log-probabilities of one choice as text completions list them: four arrays, an entry for each token.

    `text_offset` is the number of characters of the choice's text that are complete before the token.
    """

    def __init__(self) -> None:
        self.told = 0  # tokens of the answer that are listed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, tokens: Sequence[TokenLogprob], unwritten: int) -> dict[str, object]:
        """Those of the prompt; nothing is known of its first token. `unwritten` bytes of it are not in the text."""
        listed = self._list(tokens, unwritten)
        for name in ("token_logprobs", "top_logprobs"):
            column = listed[name]
            assert isinstance(column, list)
            column[:1] = [None]
        return listed

    def follow(self, other: _Listing) -> None:
        """Begin behind the prompt that `other` has listed."""
        self._offset = other._offset
        self._decoder.setstate(other._decoder.getstate())

    def answer(self, tokens: Sequence[TokenLogprob]) -> dict[str, object]:
        """Those of the answer's next tokens."""
        self.told += len(tokens)
        return self._list(tokens, 0)

    def silent(self) -> dict[str, object]:
        """A token of which nothing is known and that has no text."""
        return {"tokens": [""], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [self._offset]}

    def _list(self, tokens: Sequence[TokenLogprob], unwritten: int) -> dict[str, object]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            piece = token.chosen.piece
            self._offset += len(self._decoder.decode(piece[unwritten:]))
            unwritten = max(0, unwritten - len(piece))
        return {
            "tokens": [token_text(token.chosen.piece) for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [_likeliest(token) for token in tokens],
            "text_offset": offsets,
        }


def _likeliest(token: TokenLogprob) -> dict[str, float]:
    """The alternatives with the token itself, which is always among them. Of two that read alike the first counts."""
    found: dict[str, float] = {}
    for chance in (*token.top, token.chosen):
        found.setdefault(token_text(chance.piece), chance.logprob)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


class CompletionEncoder(ReplyEncoder):
    """A text completion's reply: for each prompt the best `returned` of its choices, numbered on over all prompts.

    `prompts` are the prompts' texts, None for one of token ids, which is echoed as what its tokens say.
    """

    id_prefix = "cmpl"
    chunk_object = whole_object = "text_completion"

    def __init__(
        self,
        reply: Reply,
        *,
        fingerprint: str | None = None,
        service_tier: str | None = None,
        prompts: tuple[str | None, ...] = ("",),
        returned: int | None = None,
        echo: bool = False,
        logprobs: bool = False,
    ) -> None:
        super().__init__(reply, fingerprint=fingerprint, service_tier=service_tier)
        self._prompts = prompts
        self._generated = reply.choices // len(prompts)
        self._returned = self._generated if returned is None else returned
        self._echo = echo
        self._logprobs = logprobs
        self._scores = echo and logprobs
        self._listings = [_Listing() for _ in range(reply.choices)]

    def open(self) -> Sequence[Frame]:
        """Prompts that are echoed as they were sent."""
        if not self._echo or self._logprobs:
            return ()
        return [
            self._chunk({"text": text}, index)
            for index in range(self._reply.choices)
            if (text := self._prompts[index // self._generated])
        ]

    def _said(self, event: GenerateEvent) -> Sequence[Frame]:
        match event:
            case TextDelta(text=text, index=index, logprobs=logprobs) if text or (logprobs and self._logprobs):
                return (self._chunk({"text": text}, index, logprobs=self._listed(index, logprobs)),)
            case PromptLogprobs(index=first) if self._logprobs or self._prompts[first // self._generated] is None:
                text, listed = self._echoed(event, first)
                return [
                    self._chunk({"text": text}, index, logprobs=listed)
                    for index in range(first, first + self._generated)
                ]
            case _:
                return ()

    def _ended(self, finished: Finished) -> Sequence[Frame]:
        end = self._end(finished)
        return (self._chunk({"text": ""}, finished.index, reason=finished.reason, logprobs=end),)

    def _end(self, finished: Finished) -> dict[str, object] | None:
        """An entry for the token that ended a scored choice, if the engine told nothing of it: clients that score a
        prompt ask for one more token, and leave out the last entry."""
        listing = self._listings[finished.index]
        told = listing.told if self._scores else None
        ended = finished.reason == "stop" and finished.stop_sequence is None
        if told is None or not ended or told >= finished.usage.completion_tokens:
            return None
        return listing.silent()

    def _listed(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
        return self._listings[index].answer(logprobs) if self._logprobs else None

    def _echoed(self, prompt: PromptLogprobs, first: int) -> tuple[str, dict[str, object] | None]:
        """A prompt as text and what is listed of its tokens, for all of its choices, of which `first` is the first."""
        data = b"".join(token.chosen.piece for token in prompt.tokens)
        given = self._prompts[first // self._generated]
        # Tokens may say more than was sent: the mark of the beginning, a space that the vocabulary puts first.
        unwritten = 0 if given is None else max(0, len(data) - len(given.encode()))
        text = data.decode("utf-8", "replace") if given is None else given
        if not self._logprobs:
            return text, None
        listed = self._listings[first].prompt(prompt.tokens, unwritten)
        for index in range(first + 1, first + self._generated):
            self._listings[index].follow(self._listings[first])
        return text, listed

    def _whole(self, found: list[Answer]) -> list[dict[str, object]]:
        choices: list[dict[str, object]] = []
        for first in range(0, len(found), self._generated):
            prompt = found[first].prompt
            given: tuple[str, dict[str, object] | None] = "", None
            if self._echo:
                text = self._prompts[first // self._generated] or ""
                given = (text, None) if prompt is None else self._echoed(prompt, first)
            of_prompt = list(enumerate(found[first : first + self._generated], first))
            if self._generated > self._returned:
                of_prompt.sort(key=lambda numbered: -_mean_logprob(numbered[1]))
            for index, answer in of_prompt[: self._returned]:
                choices.append(self._choice(len(choices), index, answer, *given))
        return choices

    def _choice(
        self, number: int, index: int, answer: Answer, echoed: str, listed: dict[str, object] | None
    ) -> dict[str, object]:
        parts = [listed, self._listed(index, answer.logprobs), self._end(answer.finished)]
        text = echoed + answer.text
        return choice(number, {"text": text}, answer.finished.reason, _joined([part for part in parts if part]))


def _joined(parts: list[dict[str, object]]) -> dict[str, object] | None:
    """Several listings as one; None of none."""
    columns: dict[str, list[object]] = {}
    for part in parts:
        for name, column in part.items():
            assert isinstance(column, list)
            columns.setdefault(name, []).extend(column)
    return {**columns} if columns else None


def _mean_logprob(answer: Answer) -> float:
    """How likely an answer is for each of its tokens; an empty one says nothing for itself."""
    if not answer.logprobs:
        return float("-inf")
    return sum(token.chosen.logprob for token in answer.logprobs) / len(answer.logprobs)
