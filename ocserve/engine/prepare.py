"""Preparing requests beside the decode loop: render, tokenise, compile the constraint, check, build the samplers.

One thread takes requests in order and answers `Prepared` or `Refused`, and questions with `Told`; what was cancelled
meanwhile is refused, for the front to know that nothing works on it any more. What was prepared waits here until
`Start` or `Cancel`. The lock guards two small dictionaries, nothing is computed under it.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from queue import SimpleQueue

from ocserve.engine.answers import AnswerPlan, Promises
from ocserve.engine.constraint import GrammarCompiler, Guide
from ocserve.engine.duty import cancelled
from ocserve.engine.llama import Vocab
from ocserve.engine.prediction import Prediction
from ocserve.engine.sampler import DrySamplers, sampler_of
from ocserve.engine.slots import Group, Sequence
from ocserve.engine.speculation import Drafter, Speculator
from ocserve.engine.tokens import EncodedPrompt, PromptEncoder
from ocserve.engine.wire import Prepared, Refused, Told
from ocserve.errors import ApiError, EngineFailed, InvalidRequest
from ocserve.generation import EncodeRequest, GenerateRequest, Question

_SEED_BITS = 64
# The tokenizer of constraints is built before the first request, since that holds the GIL, unless it takes a second
# and a hundred megabytes: then only once somebody asks for a constraint.
_EARLY_GRAMMARS = 160_000
_PREDICTED_CHARS = 8  # for each token of the context
# Tokens and alternatives of a prompt, all in one message: some tens of megabytes.
_MOST_CHANCES = 1 << 18


class Preparer:
    """Owns requests between `Prepare` and `Start`. `submit`, `take` and `cancel` are called by the reader thread."""

    def __init__(
        self,
        encoder: PromptEncoder,
        vocab: Vocab,
        grammars: GrammarCompiler,
        *,
        context: int,
        drafter: Callable[[tuple[int, ...]], Drafter] | None,
        emit: Callable[[Prepared | Told | Refused], None],
    ) -> None:
        """`drafter` makes what drafts behind a prompt; None: nothing is drafted."""
        self._encoder = encoder
        self._vocab = vocab
        self._grammars = grammars
        self._dry = DrySamplers(vocab, context)
        self._context = context
        self._drafter = drafter
        self._emit = emit
        self._queue: SimpleQueue[GenerateRequest | Question] = SimpleQueue()
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._ready: dict[str, Group] = {}
        self._busy: tuple[str, float] | None = None  # request in work and when it was begun, monotonic seconds

    def submit(self, request: GenerateRequest | Question) -> None:
        """Prepare this request, or answer this question, after those before it."""
        with self._lock:
            self._wanted.add(request.request_id)
        self._queue.put(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request that has not been started."""
        with self._lock:
            self._wanted.discard(request_id)
            group = self._ready.pop(request_id, None)
        if group is not None:
            _close(group)

    def take(self, request_id: str) -> Group | None:
        """A prepared request as choices that can be scheduled from now on; None if it was cancelled."""
        with self._lock:
            group = self._ready.pop(request_id, None)
        if group is not None:
            now = time.monotonic()
            for sequence in group.members:
                sequence.arrived, sequence.deadline = now, now + group.request.deadline_s
        return group

    def busy(self) -> tuple[str | None, float]:
        """The request in work and for how many seconds; called by the heartbeat thread."""
        busy = self._busy
        return (None, 0.0) if busy is None else (busy[0], time.monotonic() - busy[1])

    def run(self) -> None:
        """Prepare for ever; the thread's target."""
        if self._vocab.size <= _EARLY_GRAMMARS:
            self._grammars.build()
        while True:
            request = self._queue.get()
            with self._lock:
                wanted = request.request_id in self._wanted
            if not wanted:
                self._refuse(request, cancelled())
            else:
                self._busy = request.request_id, time.monotonic()
                try:
                    self._prepare(request) if isinstance(request, GenerateRequest) else self._answer(request)
                except ApiError as error:
                    self._refuse(request, error)
                except Exception:  # noqa: BLE001  # whatever native code or a template raised: not the thread
                    self._refuse(request, EngineFailed("The prompt could not be prepared."))
                self._busy = None

    def _answer(self, question: Question) -> None:
        if not isinstance(question, EncodeRequest):
            raise InvalidRequest("This model generates text; it has no embeddings and no scores.", param="model")
        answer = self._encoder.answer(question)
        with self._lock:
            wanted = question.request_id in self._wanted
            self._wanted.discard(question.request_id)
        if not wanted:
            raise cancelled()
        self._emit(Told(request_id=question.request_id, answer=answer))

    def _prepare(self, request: GenerateRequest) -> None:
        ignored = self._encoder.unread(request)
        encoded = self._encoder.encode(request)
        prompt = encoded.ids
        if request.prompt_logprobs is not None and encoded.images:
            raise InvalidRequest("A prompt with images has no log-probabilities.", param="logprobs")
        if request.prompt_logprobs is not None and len(prompt) * (1 + request.prompt_logprobs) > _MOST_CHANCES:
            raise InvalidRequest(
                f"At most {_MOST_CHANCES} log-probabilities of a prompt are told at once; this one has {len(prompt)} "
                "tokens.",
                param="logprobs",
            )
        plan = self._encoder.plan(request, prompt)
        guide = None
        if plan.grammar is not None:
            guide = self._grammars.guide(plan.grammar)
            plan = replace(plan, promises=Promises.of(request))
        max_tokens = min(request.max_tokens, self._context - len(prompt))
        group = self._group(request, encoded, max_tokens, plan, guide)
        with self._lock:
            wanted = request.request_id in self._wanted
            self._wanted.discard(request.request_id)
            if wanted:
                self._ready[request.request_id] = group
        if not wanted:
            _close(group)
            raise cancelled()
        self._emit(
            Prepared(request_id=request.request_id, prompt_tokens=len(prompt), max_tokens=max_tokens, ignored=ignored)
        )

    def _group(
        self, request: GenerateRequest, prompt: EncodedPrompt, max_tokens: int, plan: AnswerPlan, guide: Guide | None
    ) -> Group:
        """All choices with what they draw from."""
        words = tuple(token for token in prompt.ids if token >= 0) if prompt.images else prompt.ids
        dry = self._dry.get(request.sampling)
        seed = request.sampling.seed
        first_seed = secrets.randbits(_SEED_BITS) if seed is None else seed
        group = Group(request)
        with ExitStack() as made:
            for index in range(request.choices):
                sampler = sampler_of(
                    self._vocab,
                    request.sampling,
                    seed=(first_seed + index) % (1 << _SEED_BITS),
                    window=self._context,
                    prompt=words,
                    dry=dry,
                )
                made.callback(sampler.close)
                followed = guide.copy() if guide is not None else None
                if followed is not None:
                    made.callback(followed.close)
                Sequence(
                    group,
                    prompt.ids,
                    max_tokens=max_tokens,
                    sampler=sampler,
                    deadline=math.inf,  # until it is taken
                    guide=followed,
                    speculator=self._drafts(request, words, made) if guide is None else None,
                    plan=plan,
                    images=prompt.images,
                )
            made.pop_all()  # the choices own it
        return group

    def _drafts(self, request: GenerateRequest, prompt: tuple[int, ...], made: ExitStack) -> Speculator | None:
        """What drafts for a choice. Not for one with a seed: when to draft follows from measured times, and a batch of
        another size may round otherwise, so that its answer would not be the same each time."""
        if self._drafter is None or request.sampling.seed is not None:
            return None
        # Of more characters than that, few could come true before the context ends.
        predicted = self._encoder.content((request.prediction or "")[: _PREDICTED_CHARS * self._context])
        drafter = self._drafter(prompt)
        made.callback(drafter.close)
        return Speculator(Prediction(tuple(predicted), drafter) if predicted else drafter)

    def _refuse(self, request: GenerateRequest | Question, error: ApiError) -> None:
        with self._lock:
            self._wanted.discard(request.request_id)
        self._emit(Refused(request_id=request.request_id, error=error.info))


def _close(group: Group) -> None:
    """Free what the choices of a request that does not run own outside of Python."""
    for sequence in group.members:
        sequence.close()
