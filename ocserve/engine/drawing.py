"""From the distributions of a computed batch to the next tokens of a sequence, drawn or forced."""

from __future__ import annotations

from ocserve.engine.composer import Chunk
from ocserve.engine.constraint import Guide
from ocserve.engine.context import Context
from ocserve.engine.counts import Counts
from ocserve.engine.emission import Emitter
from ocserve.engine.kv import KvMemory
from ocserve.engine.logprobs import Logits, RowLogprobs
from ocserve.engine.prefixes import Tokens, common_prefix
from ocserve.engine.sampler import BestToken, SamplerChain
from ocserve.engine.slots import Sequence
from ocserve.engine.speculation import verified
from ocserve.generation import FinishReason, TokenChance, TokenLogprob


class UnusableDistribution(Exception):
    """No token can be drawn from this distribution."""


class Drawing:
    """Draws behind the rows of the loop's batches, on the loop's thread."""

    def __init__(self, context: Context, kv: KvMemory, emitter: Emitter, counts: Counts) -> None:
        self._context = context
        self._kv = kv
        self._emitter = emitter
        self._counts = counts
        self._logprob: TokenLogprob | None = None  # of the token that was drawn last, if it is asked for

    def score(self, chunk: Chunk, row: int) -> None:
        """Read the log-probabilities of a prompt's tokens behind each of a computed chunk's rows, the first at `row`.

        Raises `UnusableDistribution`.
        """
        sequence, best = chunk.sequence, chunk.sequence.group.request.prompt_logprobs
        assert best is not None
        known, prompt = sequence.prompt_logprobs, sequence.prompt
        if not known:
            known.append(TokenLogprob(chosen=TokenChance(prompt[0], self._emitter.piece(prompt[0]), 0.0)))
        end = sequence.computed  # a sequence that was preempted computes what is known of again
        for position in range(max(end - chunk.count, len(known) - 1), min(end, len(prompt) - 1)):
            logprobs = RowLogprobs(self._usable(row + position - end + chunk.count), best, self._emitter.piece)
            known.append(logprobs.of(prompt[position + 1]))
        if not sequence.unscored:
            self._emitter.scored(sequence)

    def take(self, chunk: Chunk, row: int) -> FinishReason | None:
        """Sample behind the newest token and behind each draft that the sample before confirmed.

        Raises `UnusableDistribution` or `GuideError`.
        """
        sequence, known = chunk.sequence, chunk.sequence.length
        if not sequence.room:
            return "length"  # nothing but the prompt was asked for
        reason: FinishReason | None = None
        for token in verified(chunk.drafts, lambda draft: self._draw(sequence, row + draft)):
            reason = self._emitter.take(sequence, token, self._logprob)
            if reason is None and sequence.guide is not None:
                reason = self._follow(sequence, sequence.guide, token)
            if reason is None and (
                closing := sequence.answer.overdue(sequence.reasoning_tokens + len(sequence.unseen))
            ):
                reason = self._close_thought(sequence, closing)
                break  # drafts do not follow from here
            if reason is not None:
                break
        tokens = sequence.tokens(known, sequence.length)
        if chunk.drafts:
            self._keep(sequence, chunk.drafts, tokens)
        if sequence.speculator is not None:
            sequence.speculator.accept(tokens)
        return reason

    def _keep(self, sequence: Sequence, drafts: tuple[int, ...], tokens: Tokens) -> None:
        """The cells of drafts that turned out true stay, the others go."""
        accepted = common_prefix(drafts, tokens)
        self._kv.append(sequence, list(drafts[:accepted]))
        self._kv.cut(sequence)  # llama.cpp computed them all
        if sequence.speculator is None:
            return  # they were forced, not guessed
        sequence.drafted += len(drafts)
        sequence.accepted += accepted
        self._counts.drafted += len(drafts)
        self._counts.accepted += accepted

    def _draw(self, sequence: Sequence, row: int) -> int:
        best = sequence.group.request.logprobs
        if best is None:
            self._check(row)
            self._logprob = None
            return self._sampled(sequence, row)
        logprobs = RowLogprobs(self._usable(row), best, self._emitter.piece)  # before a mask is laid over them
        token = self._sampled(sequence, row)
        self._logprob = logprobs.of(token)
        return token

    def _usable(self, row: int) -> Logits:
        self._check(row)
        return self._context.logits(row)

    def _check(self, row: int) -> None:
        # NaN or all -inf would abort the process inside the sampler; it ends this sequence only.
        if not self._context.usable(row):
            raise UnusableDistribution("The model produced no usable distribution for this sequence.")

    def _sampled(self, sequence: Sequence, row: int) -> int:
        if sequence.guide is not None:
            if forced := sequence.guide.forced():  # asked for its distribution; as where it is not, nothing is drawn
                sequence.sampler.accept(forced[0])
                self._counts.forced += 1
                return forced[0]
            sequence.guide.apply(self._context.logits(row))
        assert isinstance(sequence.sampler, SamplerChain | BestToken)
        return sequence.sampler.sample(self._context, row)

    def _close_thought(self, sequence: Sequence, closing: tuple[int, ...]) -> FinishReason | None:
        """Append the tokens that end a thought; they have no log-probability, the model did not choose them."""
        for token in closing:
            reason = self._append(sequence, token)
            if reason is None and sequence.guide is not None:
                reason = self._follow(sequence, sequence.guide, token)
            if reason is not None:
                return reason
        return None

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        sequence.sampler.accept(token)
        self._counts.forced += 1
        return self._emitter.take(sequence, token)

    def _follow(self, sequence: Sequence, guide: Guide, token: int) -> FinishReason | None:
        """Tell the guide of a constrained sequence, and append what must follow.

        Where log-probabilities are wanted the distribution before each such token has to be computed first.
        """
        guide.accept(token)
        while not sequence.wants_logprobs and (forced := guide.forced()):
            for follower in forced:
                guide.accept(follower)
                reason = self._append(sequence, follower)
                if reason is not None:
                    return reason
        return "stop" if guide.finished else None
