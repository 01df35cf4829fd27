"""A loop on a real tiny model that a test turns by hand, so that a seed decides everything that happens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Literal

import numpy as np

from ocserve.engine import ahead, llama
from ocserve.engine.ahead import Teller
from ocserve.engine.answers import AnswerPlan
from ocserve.engine.attention import Attention
from ocserve.engine.composer import Composer
from ocserve.engine.constraint import Guide
from ocserve.engine.context import Context, Row
from ocserve.engine.emission import Emitter
from ocserve.engine.kv import KvMemory, Reuse
from ocserve.engine.loop import EngineLoop
from ocserve.engine.prediction import Prediction
from ocserve.engine.sampler import sampler_of
from ocserve.engine.seeing import Encodes
from ocserve.engine.slots import Group, Sequence, Shown
from ocserve.engine.speculation import PromptLookup, Speculator
from ocserve.engine.tiers.host import HostTier
from ocserve.engine.tiers.tiers import Tiers
from ocserve.engine.turns import Turns
from ocserve.engine.wire import Step
from ocserve.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Sampling,
    TextDelta,
    TokenLogprob,
    TokenPrompt,
)
from tests import tiny

IDENTITY = b"tiny"
NO_END = {0: -100.0, tiny.END_OF_TURN: -100.0}


class FixedCosts:
    """A machine that never changes: so many seconds a step and a row. Every so many steps teach something."""

    def __init__(self, step_s: float = 0.005, row_s: float = 0.0025, teaching: int = 1) -> None:
        self._step_s, self._row_s = step_s, row_s
        self._teaching, self._steps = teaching, 0
        self.now = 0.0

    def seconds(self, rows: int, cells: int = 0, *, prefill: bool = False) -> float:
        return self._step_s + rows * self._row_s

    def rows_within(self, seconds: float, *, rows: int, cells_per_row: int, most: int) -> int:
        return max(0, min(most, int((seconds - self._step_s) / self._row_s) - rows))

    def threads(self, rows: int, *, prefill: bool = False) -> int:
        return 1

    def teaches(self, rows: int, threads: int, seconds: float) -> bool:
        self._steps += 1
        return self._steps % self._teaching == 0

    def observe(self, rows: int, cells: int, threads: int, seconds: float) -> None:
        self.now += self.seconds(rows, cells)

    def clock(self) -> float:
        return self.now


class InPlace:
    """A teller without a thread."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    @property
    def drafts_wait(self) -> bool:
        return self._teller.drafts_wait

    @property
    def behind(self) -> bool:
        return False

    def tell(self, sequences: Ordered[Sequence], tokens: list[int]) -> None:
        self._teller._tell(ahead._Step(sequences, tokens))

    def settle(self) -> list[tuple[Sequence, FinishReason]]:
        return self._teller._settle().ended


class Engine:
    """One tiny model, its context and its loop."""

    def __init__(
        self,
        path: Path,
        *,
        pool_tokens: int = 512,
        parallel: int = 4,
        batch_tokens: int = 64,
        ids: int = 32,
        sharing: bool = True,
        full_window: bool = True,
        order: Literal["serial", "joint"] = "serial",
        park_bytes: int = 1 << 20,
        tiers: Tiers | None = None,
        costs: FixedCosts | None = None,
        fast_forward: bool = True,
        exact: bool = True,
        flash_attention: bool = False,
        most_idle: int | None = None,
        model: llama.Model | None = None,
        projector: Encodes | None = None,
    ) -> None:
        self.model = model or load(path)
        self.costs = costs or FixedCosts()
        outputs = min(parallel * 9, batch_tokens)
        self.context = Context(
            self.model,
            pool_tokens=pool_tokens,
            sequences=ids,
            batch_tokens=batch_tokens,
            threads=1,
            outputs=outputs,
            full_window=full_window,
            kv_type="f32" if exact else "f16",
            flash_attention=flash_attention,
        )
        self.reuse = Reuse.WHOLE_STATE if self.model.recurrent or self.model.window else Reuse.ANY_PREFIX
        self.tiers = tiers or Tiers(HostTier(1 << 22), None)
        self.kv = KvMemory(
            self.context,
            reuse=self.reuse,
            capacity=self.context.pool_tokens,
            tiers=self.tiers,
            identity=IDENTITY,
            window=self.model.window,
            recompute_s=lambda tokens, position: tokens * 0.0025,
            sharing=sharing,
            most_idle=None if most_idle is None else lambda begins: most_idle,
        )
        self.events: dict[str, list[GenerateEvent]] = defaultdict(list)
        self.loop = EngineLoop(
            self.context,
            self.kv,
            costs=self.costs,
            composer=Composer(
                self.costs,
                batch_tokens=batch_tokens,
                outputs=outputs,
                slots=parallel,
                attention=Attention(None if flash_attention else lambda: self.kv.cells),
                order=order,
                fast_forward=fast_forward,
            ),
            emitter=Emitter(self.model.vocab, Turns(), self._record),
            parallel=parallel,
            park_bytes=park_bytes,
            projector=projector,
            clock=self.costs.clock,
        )

    def tell_in_place(self) -> None:
        """Have steps ahead told on the loop's own thread, so that nothing depends on how threads take turns."""
        self.loop._ahead._teller = InPlace(self.loop._ahead._teller)  # type: ignore[assignment]

    def _record(self, step: Step) -> None:
        for request_id, event in step.events:
            self.events[request_id].append(event)

    def group(
        self,
        name: str,
        prompt: Ordered[int],
        max_tokens: int,
        *,
        salt: bytes = b"a",
        choices: int = 1,
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
        deadline_s: float = 1e9,
        speculates: bool = False,
        predicted: Ordered[int] = (),
        guide: Guide | None = None,
        plan: AnswerPlan | None = None,
        images: tuple[Shown, ...] = (),
        **asked: object,
    ) -> Group:
        """`asked` are further fields of the request."""
        sampling = sampling or Sampling(temperature=0.0, logit_bias=NO_END)
        request = GenerateRequest(
            request_id=name,
            model="m",
            prompt=TokenPrompt(tokens=tuple(prompt)),
            sampling=sampling,
            max_tokens=max_tokens,
            choices=choices,
            stop=stop,
            salt=salt,
            **asked,  # type: ignore[arg-type]
        )
        group = Group(request)
        for index in range(choices):
            Sequence(
                group,
                tuple(prompt),
                max_tokens=max_tokens,
                sampler=sampler_of(
                    self.model.vocab,
                    sampling,
                    seed=(sampling.seed or 1) + index,
                    window=512,
                    prompt=[token for token in prompt if token >= 0],
                ),
                deadline=self.costs.now + deadline_s,
                arrived=self.costs.now,
                guide=guide.copy() if guide is not None else None,
                plan=plan,
                speculator=_speculator(prompt, predicted) if speculates else None,
                images=images,
            )
        return group

    def submit(self, name: str, prompt: Ordered[int], max_tokens: int, **rest: object) -> Sequence:
        group = self.group(name, prompt, max_tokens, **rest)  # type: ignore[arg-type]
        self.loop.submit(group)
        return group.members[0]

    def run(self, turns: int = 100_000, *, goes_ahead: bool = False) -> None:
        """Turn until nothing is left to compute; `goes_ahead`: with steps that are not planned, as in a daemon."""
        while self.loop.turn(wait=False):
            if goes_ahead:
                self.loop.decode_on()
            turns -= 1
            assert turns, "the loop does not come to an end"

    def end(self, name: str) -> Finished | Failed | None:
        events = self.events[name]
        return events[-1] if events and isinstance(events[-1], Finished | Failed) else None

    def logprobs(self, name: str, index: int = 0) -> list[TokenLogprob]:
        deltas = [event for event in self.events[name] if isinstance(event, TextDelta) and event.index == index]
        return [logprob for delta in deltas for logprob in delta.logprobs]

    def text(self, name: str, index: int = 0) -> str:
        deltas = [event for event in self.events[name] if isinstance(event, TextDelta) and event.index == index]
        return "".join(delta.text for delta in deltas)


def _speculator(prompt: Ordered[int], predicted: Ordered[int]) -> Speculator:
    lookup = PromptLookup(prompt)
    return Speculator(Prediction(predicted, lookup) if predicted else lookup, clock=lambda: 0.0)


def load(path: Path) -> llama.Model:
    log = llama.LoadLog()
    model = llama.Model(str(path), gpu_layers=0, log=log)
    log.close()
    return model


class Oracle:
    """What a model says of a sequence alone: the same tokens, computed anew in one context without any sharing."""

    NEIGHBOUR = 100  # cells of another sequence, so that the cells lie elsewhere

    def __init__(
        self, model: llama.Model, *, exact: bool = True, pool_tokens: int = 1024, barred: Iterable[int] = tuple(NO_END)
    ) -> None:
        """`exact` is for F32 models; of others the noise may be any. Tokens that are `barred` were never served."""
        self._exact = exact
        self._barred = list(barred)
        self._context = Context(
            model,
            pool_tokens=pool_tokens,
            sequences=2,
            batch_tokens=64,
            threads=1,
            outputs=64,
            kv_type="f32" if exact else "f16",
            flash_attention=False,
        )

    def logits(self, tokens: Ordered[int], first: int, chunk: int, *, neighbour: bool = False) -> np.ndarray:
        """The distributions after the tokens from `first` on, computed in chunks of `chunk`."""
        self._context.forget(0)
        self._context.forget(1)
        if neighbour:
            for position in range(0, self.NEIGHBOUR, 50):
                self._context.decode([Row(40, position + index, 1, False) for index in range(50)])
        rows = []
        for start in range(0, len(tokens), chunk):
            part = range(start, min(start + chunk, len(tokens)))
            wanted = [position >= first for position in part]
            self._context.decode([Row(tokens[p], p, 0, want) for p, want in zip(part, wanted, strict=True)])
            rows += [np.array(self._context.logits(index)) for index, want in enumerate(wanted) if want]
        return np.array(rows)

    def check(self, sequence: Sequence) -> bool:
        """Every token that was served is the uncached run's best, up to the noise of computing it in another order.

        Returns whether they are all its very best.
        """
        if not sequence.generated:
            return True
        tokens = [*sequence.prompt, *sequence.generated]
        first = len(sequence.prompt) - 1
        logits = self.logits(tokens, first, 32)
        noise = float(np.abs(logits - self.logits(tokens, first, 7, neighbour=True)).max())
        if self._exact:
            assert noise < MOST_NOISE, f"the model itself is this sensitive: {noise}"
        logits[:, self._barred] = -np.inf
        gaps = [float(logits[i].max() - logits[i][token]) for i, token in enumerate(sequence.generated)]
        allowed = 4 * noise + NOISE_FLOOR if self._exact else 2 * max(noise, QUANTISED_NOISE)
        wrong = next((index for index, gap in enumerate(gaps) if gap > allowed), None)
        assert wrong is None, f"token {wrong} of {sequence.id}"
        return max(gaps) == 0


# Only the order of additions is left. A wrong or foreign cell moves the logits of these models by whole units.
NOISE_FLOOR, MOST_NOISE = 1e-4, 1e-3
# Quantised models round activations to eight bits, so the order of additions moves whole steps: SmolLM2 by up to 0.6,
# Gemma 3 270M by up to 0.9, whether or not a given re-chunking shows it.
QUANTISED_NOISE = 0.9
