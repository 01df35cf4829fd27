"""An engine that embeds or compares: its questions, the batches they are computed in, its answers.

Two threads work here. One turns questions into token ids; the other, the process's main one, computes. Batches are made
of the inputs of all questions, one of each in turn, so that a question of one text does not wait for one of two
thousand. Lengths of vectors, truncation and scores are float32 arithmetic on what llama.cpp gives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from ocserve.engine import wire
from ocserve.engine.context import DecodeStatus, Row
from ocserve.engine.duty import EngineBroken, cancelled
from ocserve.engine.embedding_context import Pooling, PoolingContext, Vector
from ocserve.engine.embedding_inputs import Ids, InputEncoder
from ocserve.errors import ApiError, EngineFailed, InvalidRequest
from ocserve.generation import (
    Answer,
    Embedded,
    EmbedRequest,
    EncodeRequest,
    Question,
    Scored,
    ScoreRequest,
)

Reply = Callable[[str, Answer | ApiError], None]
Computed = EmbedRequest | ScoreRequest
# Answers cross the wire in one frame; half of it is left to everything else.
_MOST_ANSWER_BYTES = wire.MAX_FRAME_BYTES // 2


@dataclass(eq=False, slots=True)
class Job:
    """A question's inputs and what has been computed of them."""

    question: Computed
    inputs: Sequence[Ids]
    started: int = 0  # inputs that are in a batch or have been
    outputs: dict[int, Vector] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.outputs) == len(self.inputs)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `begin` … `end` - 1 of one input of a job, in a batch."""

    job: Job
    index: int
    begin: int
    end: int

    @property
    def ends(self) -> bool:
        """Whether the input is complete with this part."""
        return self.end == len(self.job.inputs[self.index])


def compose(jobs: deque[Job], unfinished: Part | None, *, rows: int, inputs: int, splits: bool) -> list[Part]:
    """The next batch of at most `rows` tokens and `inputs` inputs; the jobs are turned so that each is first in turn.

    1. What the last batch began of an input goes on.
    2. Every job gives one input after another in turn, as long as they fit whole.
    3. Where inputs may be split, the first that does not fit gives what there is room for.
    """
    parts: list[Part] = []
    if unfinished is not None:  # 1
        job, index, begin = unfinished.job, unfinished.index, unfinished.end
        parts.append(Part(job, index, begin, min(begin + rows, len(job.inputs[index]))))
    room = rows - sum(part.end - part.begin for part in parts)
    waiting = deque(job for job in jobs if job.started < len(job.inputs))
    while waiting and room and len(parts) < inputs:  # 2
        job = waiting.popleft()
        size = len(job.inputs[job.started])
        if size > room and not splits:
            continue
        parts.append(Part(job, job.started, 0, min(size, room)))  # 3
        room -= min(size, room)
        job.started += 1
        if job.started < len(job.inputs):
            waiting.append(job)
    # Whose input began or ended has had its turn; a batch inside one input is nobody's.
    if len(parts) > (unfinished is not None):
        jobs.rotate(-1)
    elif unfinished is not None and parts[0].ends and unfinished.job in jobs:
        jobs.remove(unfinished.job)
        jobs.append(unfinished.job)
    return parts


class Embedder:
    """Owns questions from their arrival to their answer: the `Duty` of its process.

    Only `compute` and what it calls touch llama.cpp's context.
    """

    def __init__(
        self, context: PoolingContext, encoder: InputEncoder, *, facts: wire.EngineFacts, reply: Reply
    ) -> None:
        """`reply` may be called from both threads."""
        self.facts = facts
        self._context = context
        self._encoder = encoder
        self._reply = reply
        self._questions: SimpleQueue[Question] = SimpleQueue()
        self._arrivals: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._encoding: tuple[str, float] | None = None  # question in work and since when, monotonic seconds
        self._jobs: deque[Job] = deque()
        self._unfinished: tuple[Part, int] | None = None  # with its sequence
        self._stopped = False
        self._steps = self._tokens = self._running = 0
        self._step_started: float | None = None  # monotonic seconds; None between batches

    # --- any thread -------------------------------------------------------------------------------------------------

    def handle(self, message: wire.FrontMessage) -> None:
        """Take a question or its cancelling; what generates is refused."""
        match message:
            case wire.Ask(question=question):
                with self._lock:
                    self._wanted.add(question.request_id)
                self._questions.put(question)
            case wire.Cancel(request_id=request_id):
                with self._lock:
                    self._wanted.discard(request_id)
            case wire.Prepare(request=request):
                error = InvalidRequest("This model does not generate text.", param="model", code="model_not_capable")
                self._reply(request.request_id, error)
            case wire.Obey():
                pass  # it reads no images
            case wire.Load() | wire.Start():
                raise wire.FrameError("a message that has no place here")

    def stop(self) -> None:
        """Let `compute` return after the batch in work."""
        self._stopped = True
        self._arrivals.put(None)

    def heartbeat(self) -> wire.Heartbeat:
        """The counters, and how long what is in work has been so."""
        encoding, started, now = self._encoding, self._step_started, time.monotonic()
        return wire.Heartbeat(
            stats=self.stats(),
            step_age_s=now - started if started is not None else 0.0,
            preparing=encoding[0] if encoding else None,
            prepare_age_s=now - encoding[1] if encoding else 0.0,
        )

    def stats(self) -> wire.EngineStats:
        """Counters since load; a step is a batch, its sequences are inputs."""
        waiting = sum(len(job.inputs) - job.started for job in tuple(self._jobs))
        return wire.EngineStats(steps=self._steps, prefill_tokens=self._tokens, running=self._running, waiting=waiting)

    # --- the tokenising thread --------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Turn questions into jobs for ever; those about tokens are answered here."""
        while True:
            question = self._questions.get()
            self._encoding = question.request_id, time.monotonic()
            try:
                if not self._is_wanted(question.request_id):
                    self._answer(question, cancelled())
                elif isinstance(question, EncodeRequest):
                    self._answer(question, self._encoder.answer(question))
                elif question.count_only:
                    self._answer(question, counted(question, self._inputs(question)))
                else:
                    self._arrivals.put(Job(question, self._inputs(question)))
            except ApiError as error:
                self._answer(question, error)
            except Exception:  # noqa: BLE001  # whatever native code raised: this question, not the thread
                self._answer(question, EngineFailed("The input could not be prepared."))
            self._encoding = None

    def _inputs(self, question: Computed) -> list[Ids]:
        if isinstance(question, EmbedRequest):
            self._require(not self._scores, "compares documents with a query; it does not embed")
            most = _MOST_ANSWER_BYTES // (4 * self._context.dimensions)
            if len(question.inputs) > most:
                raise InvalidRequest(f"At most {most} inputs of this model fit in one answer.", param="input")
            alone = len(question.inputs) == 1
            return [
                self._encoder.encode(each, "input" if alone else f"input[{index}]")
                for index, each in enumerate(question.inputs)
            ]
        self._require(self._scores, "embeds; it does not compare documents with a query")
        query = self._encoder.query(question.query)
        return [
            self._encoder.pair(query, document, f"documents[{index}]")
            for index, document in enumerate(question.documents)
        ]

    @property
    def _scores(self) -> bool:
        return self._context.pooling is Pooling.RANK

    @staticmethod
    def _require(can: bool, what: str) -> None:
        if not can:
            raise InvalidRequest(f"This model {what}.", param="model", code="model_not_capable")

    def _is_wanted(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._wanted

    def _answer(self, question: Question, answer: Answer | ApiError) -> None:
        with self._lock:
            wanted = question.request_id in self._wanted
            self._wanted.discard(question.request_id)
        try:
            self._reply(question.request_id, answer if wanted else cancelled())
        except wire.FrameError:
            self._reply(question.request_id, InvalidRequest("The answer would be too large; ask for less at once."))

    # --- the computing thread ---------------------------------------------------------------------------------------

    def compute(self) -> None:
        """Compute until `stop`. Raises `EngineBroken`."""
        while True:
            self._take()
            if self._stopped:
                return
            self._drop()
            if self._jobs:
                self._step_started = time.monotonic()
                self._step()
                self._step_started = None

    def _take(self) -> None:
        """All jobs that have arrived; waits for one if there is nothing to do."""
        while not self._stopped and (not self._jobs or not self._arrivals.empty()):
            job = self._arrivals.get()
            if job is not None:
                self._jobs.append(job)

    def _drop(self) -> None:
        """Give up jobs that nobody waits for any more."""
        for job in tuple(self._jobs):
            if not self._is_wanted(job.question.request_id):
                self._jobs.remove(job)
                if self._unfinished is not None and self._unfinished[0].job is job:
                    self._context.forget(self._unfinished[1])
                    self._unfinished = None
                self._answer(job.question, cancelled())

    def _step(self) -> None:
        """Compute one batch and answer what it completes."""
        begun = self._unfinished
        parts = compose(
            self._jobs,
            begun[0] if begun else None,
            rows=self._context.batch_tokens,
            inputs=self._context.sequences,
            splits=self._context.splits,
        )
        # What goes on keeps its sequence; the others take the rest in order.
        free = [sequence for sequence in range(self._context.sequences) if begun is None or sequence != begun[1]]
        sequences = [begun[1], *free] if begun else free
        placed = list(zip(parts, sequences, strict=False))
        self._running = len(parts)
        rows = [
            Row(token, part.begin + offset, sequence, True)
            for part, sequence in placed
            for offset, token in enumerate(part.job.inputs[part.index][part.begin : part.end])
        ]
        status = self._context.compute(rows)
        if status is not DecodeStatus.OK:
            raise EngineBroken(f"a batch of {len(rows)} tokens ended with {status.name}")
        self._steps += 1
        self._tokens += len(rows)
        self._unfinished = None
        for part, sequence in placed:
            if part.ends:
                part.job.outputs[part.index] = self._context.vector(sequence)
                self._context.forget(sequence)
            else:
                self._unfinished = part, sequence
        for job in {id(part.job): part.job for part, _ in placed}.values():
            if job.done:
                self._jobs.remove(job)
                self._answer(job.question, self._result(job))
        self._running = 0

    def _result(self, job: Job) -> Answer | ApiError:
        vectors = [job.outputs[index] for index in range(len(job.inputs))]
        if not all(np.isfinite(vector).all() for vector in vectors):
            return EngineFailed("The model's output is not a number.")
        tokens = tuple(map(len, job.inputs))
        if isinstance(job.question, ScoreRequest):
            return Scored(scores=tuple(self._context.relevance(vector) for vector in vectors), tokens=tokens)
        made = (finished(vector, job.question) for vector in vectors)
        return Embedded(vectors=tuple(vector.astype("<f4").tobytes() for vector in made), tokens=tokens)


def counted(question: Computed, inputs: Sequence[Ids]) -> Answer:
    """How many tokens would be computed, of each input."""
    tokens = tuple(map(len, inputs))
    if isinstance(question, ScoreRequest):
        return Scored(scores=(), tokens=tokens)
    return Embedded(vectors=(), tokens=tokens)


def finished(vector: Vector, question: EmbedRequest) -> Vector:
    """The vector as it was asked for: its first `dimensions` numbers, of length 1 (a vector of zeros stays one)."""
    vector = vector[: question.dimensions]
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / length).astype(np.float32) if question.normalise and length else vector
