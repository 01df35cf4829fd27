"""From a specification to an engine that is ready to compute: the model, its memory, its costs and its loop."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from ocserve.chat.sandbox import TemplateUnusable
from ocserve.engine import encodings, llama, wire
from ocserve.engine.attention import Attention
from ocserve.engine.bindings import LlamaError
from ocserve.engine.composer import Composer
from ocserve.engine.constraint import GrammarCompiler
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.costs import CostModel
from ocserve.engine.drafting import DraftModel
from ocserve.engine.duty import Duty
from ocserve.engine.embedding_assembly import embedder
from ocserve.engine.embedding_context import Pooling, pooling_of
from ocserve.engine.emission import Emitter
from ocserve.engine.encodings import PlainTokenizer
from ocserve.engine.facts import layers_on_gpus, model_facts
from ocserve.engine.kv import KvMemory, Reuse
from ocserve.engine.loop import EngineLoop
from ocserve.engine.measure import stored_or_measured
from ocserve.engine.pictures import Pictures
from ocserve.engine.prepare import Preparer
from ocserve.engine.speculation import Drafter, PromptLookup
from ocserve.engine.tiers.disk import DiskTier
from ocserve.engine.tiers.host import HostTier
from ocserve.engine.tiers.tiers import Tiers
from ocserve.engine.tokens import PromptEncoder
from ocserve.engine.turns import Turns
from ocserve.engine.vision import Projector
from ocserve.machine import usable_cores

# How long the process outlives the front to store kept prefixes; the front waits a little longer before it kills.
STORING_S = 1.5
# Kept prefixes that the tiers have too may slow a step on the CPU by this much.
_PASSED_OVER = 0.025
# How long one thread computes in Python while another waits to, at a load.
_TURN_S = 1e-4


@dataclass(frozen=True, slots=True)
class Generator:
    """A loaded model that generates: the `Duty` of its process."""

    loop: EngineLoop
    preparer: Preparer
    tiers: Tiers | None
    pictures: Pictures | None
    facts: wire.EngineFacts

    def handle(self, message: wire.FrontMessage) -> None:
        """Pass a message on to the part that it is for."""
        match message:
            case wire.Prepare(request=request):
                self.preparer.submit(request)
            case wire.Ask(question=question):
                self.preparer.submit(question)
            case wire.Start(request_id=request_id):
                group = self.preparer.take(request_id)
                if group is not None:
                    self.loop.submit(group)
            case wire.Cancel(request_id=request_id):
                self.preparer.cancel(request_id)
                self.loop.cancel(request_id)
            case wire.Obey(images=images):
                if self.pictures is not None:
                    self.pictures.limits = images
            case wire.Load():
                raise wire.FrameError("a second load")

    def prepare(self) -> None:
        """Prepare requests for ever."""
        self.preparer.run()

    def compute(self) -> None:
        """Turn the loop until it is stopped, then store kept prefixes for a moment."""
        if self.loop.sight is not None:
            threading.Thread(target=self.loop.sight.run, daemon=True, name="images").start()
        self.loop.run()
        if self.tiers is not None:
            self.tiers.flush(STORING_S)

    def stop(self) -> None:
        """End the loop."""
        self.loop.stop()

    def heartbeat(self) -> wire.Heartbeat:
        """The loop's counters, and how long what is in work has been so."""
        started = self.loop.step_started
        age = time.monotonic() - started if started is not None else 0.0
        request_id, prepare_age = self.preparer.busy()
        return wire.Heartbeat(stats=self.loop.stats(), step_age_s=age, preparing=request_id, prepare_age_s=prepare_age)


def assemble(spec: wire.EngineSpec, send: Callable[[wire.EngineMessage], None]) -> Duty:
    """Load what `spec` names; raises `LlamaError` with what is wrong."""
    with _loading(), ThreadPoolExecutor(1, "encoding") as beside:
        return _assemble(spec, send, beside)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Python's part of a load, a million objects that stay, runs beside llama.cpp's and does not hold it up.

    llama.cpp tells its log thousands of lines while it loads, and each waits for its turn in Python.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        sys.setswitchinterval(usual)


def _assemble(spec: wire.EngineSpec, send: Callable[[wire.EngineMessage], None], beside: Executor) -> Duty:
    begun = time.monotonic()
    encoding = beside.submit(encodings.build, Path(spec.path))
    log = llama.LoadLog()
    model = llama.Model(spec.path, gpu_layers=spec.gpu_layers, log=log)
    if model.trained_context < 1:
        raise LlamaError("the model's header claims an impossible context length")
    if pooling_of(model) is not Pooling.NONE:
        return embedder(spec, model, send, begun=begun, log=log)
    proving = beside.submit(encodings.prove, model.vocab, encoding.result)
    context_tokens = min(spec.context, model.trained_context)
    pool_tokens = max(spec.pool_tokens, context_tokens)  # alone, any sequence must fit
    context = _context(model, spec, pool_tokens)
    _warm_up(context, model.vocab)
    projector = _projector(spec, model, log)
    tokenizer = proving.result()  # whatever is timed has the machine to itself
    costs = CostModel(
        stored_or_measured(context, model.vocab, spec),
        most_rows=context.batch_tokens,
        decode_threads=spec.threads_decode,
        prefill_threads=spec.threads_prefill,
        dense=not spec.flash_attention,
        row_in_cells=model.row_in_cells,
    )
    log.close()
    turns = Turns()
    pictures = Pictures(projector, spec.images, most_whole=context.batch_tokens) if projector else None
    encoder, problem = _encoder(model, spec, context_tokens, turns, tokenizer, pictures)
    identity = _identity(spec)
    tiers = _tiers(spec, identity)

    def most_idle(begins: bool) -> int:
        return 0 if begins and not spec.flash_attention else costs.passed_over(_PASSED_OVER)

    kv = KvMemory(
        context,
        reuse=Reuse.WHOLE_STATE if model.recurrent or model.hybrid or model.window else Reuse.ANY_PREFIX,
        capacity=context.pool_tokens,
        tiers=tiers,
        identity=identity,
        recompute_s=lambda tokens, position: costs.seconds(tokens, tokens * (position + tokens // 2), prefill=True),
        window=model.window,
        sharing=spec.prefix_cache,
        most_idle=None if layers_on_gpus(model) else most_idle,
    )
    loop = _loop(spec, context, kv, costs, Emitter(model.vocab, turns, send), projector)
    preparer = Preparer(
        encoder,
        model.vocab,
        GrammarCompiler(model.vocab, encoder.plain),
        context=context_tokens,
        drafter=_speculation(spec, model, pool_tokens),
        emit=send,
    )
    facts = _facts(spec, model, context, costs, encoder, load_s=time.monotonic() - begun, problem=problem)
    return Generator(loop, preparer, tiers, pictures, facts)


def _projector(spec: wire.EngineSpec, model: llama.Model, log: llama.LoadLog) -> Projector | None:
    if spec.projector_path is None:
        return None
    threads = spec.threads_prefill or usable_cores()
    return Projector(spec.projector_path, model, threads=threads, use_gpu=spec.gpu_layers != 0, log=log)


def _loop(
    spec: wire.EngineSpec,
    context: Context,
    kv: KvMemory,
    costs: CostModel,
    emitter: Emitter,
    projector: Projector | None,
) -> EngineLoop:
    return EngineLoop(
        context,
        kv,
        costs=costs,
        composer=Composer(
            costs,
            batch_tokens=context.batch_tokens,
            outputs=context.outputs,
            slots=spec.parallel,
            attention=Attention(None if spec.flash_attention else lambda: kv.cells),
            order=spec.prefill_order,
            fast_forward=spec.fast_forward,
        ),
        emitter=emitter,
        parallel=spec.parallel,
        park_bytes=spec.host_cache_bytes // 2,
        projector=projector,
    )


def _speculation(
    spec: wire.EngineSpec, model: llama.Model, pool_tokens: int
) -> Callable[[tuple[int, ...]], Drafter] | None:
    """What makes a prompt's drafter; None where nothing is to be drafted or drafts could not be taken back."""
    if spec.speculation == "off" or model.recurrent or model.hybrid:
        return None
    if spec.draft_path is None:
        return PromptLookup
    log = llama.LoadLog()
    drafts = DraftModel(
        llama.Model(spec.draft_path, gpu_layers=spec.gpu_layers, log=log),
        model.vocab,
        pool_tokens=pool_tokens,
        sequences=spec.parallel,
        batch_tokens=max(spec.batch_tokens, spec.parallel),
        threads=usable_cores(),
        flash_attention=spec.flash_attention,
    )
    log.close()

    def drafter(prompt: tuple[int, ...]) -> Drafter:
        made: Drafter = drafts.open() or PromptLookup()
        made.extend(prompt)
        return made

    return drafter


def _context(model: llama.Model, spec: wire.EngineSpec, pool_tokens: int) -> Context:
    sequences = max(spec.sequences, spec.parallel + 2)  # one is for copying, one may be frozen
    return Context(
        model,
        pool_tokens=pool_tokens,
        sequences=sequences,
        batch_tokens=max(spec.batch_tokens, sequences),
        threads=usable_cores(),
        outputs=spec.outputs,
        kv_type=spec.kv_type,
        flash_attention=spec.flash_attention,
    )


def _identity(spec: wire.EngineSpec) -> bytes:
    """What stored prefixes are valid for: this file, build and layout of the cache."""
    parts = (spec.model_digest, llama.build(), spec.kv_type, str(spec.gpu_layers), str(spec.flash_attention))
    return "\n".join((*parts, spec.projector_digest) if spec.projector_path else parts).encode()


def _tiers(spec: wire.EngineSpec, identity: bytes) -> Tiers | None:
    disk = None
    if spec.cache_directory and spec.model_digest and spec.disk_cache_bytes:
        disk = DiskTier(Path(spec.cache_directory) / "prefixes", identity, spec.disk_cache_bytes, _say)
    if disk is None and not spec.host_cache_bytes:
        return None
    return Tiers(HostTier(spec.host_cache_bytes - spec.host_cache_bytes // 2), disk)  # the rest is for parked states


def _say(reason: str) -> None:
    """One line for the front's log."""
    sys.stderr.write(f"ocserve-engine: prefixes are not stored on disk any more: {reason}\n")
    sys.stderr.flush()


def _encoder(
    model: llama.Model,
    spec: wire.EngineSpec,
    context: int,
    turns: Turns,
    tokenizer: PlainTokenizer,
    pictures: Pictures | None,
) -> tuple[PromptEncoder, str | None]:
    """The encoder, and why the model cannot chat if its template is of no use; completions work all the same."""

    def encoder(template: str | None) -> PromptEncoder:
        return PromptEncoder(
            model.vocab, template, context=context, turns=turns, tokenizer=tokenizer, pictures=pictures
        )

    try:
        return encoder(spec.chat_template or model.chat_template), None
    except TemplateUnusable as error:
        return encoder(None), str(error)


def _warm_up(context: Context, vocab: llama.Vocab) -> None:
    """One real decode, so that a broken model is known before it is offered."""
    token = vocab.bos if vocab.bos is not None else 0
    status = context.decode([Row(token, 0, 0, True)])
    if status is DecodeStatus.OK:
        context.logits(0).max()
    context.forget(0)
    if status is not DecodeStatus.OK:
        raise LlamaError(f"the warm-up decode failed: {status.name}")


def _facts(
    spec: wire.EngineSpec,
    model: llama.Model,
    context: Context,
    costs: CostModel,
    encoder: PromptEncoder,
    *,
    load_s: float,
    problem: str | None,
) -> wire.EngineFacts:
    known = model_facts(
        spec,
        model,
        pool_tokens=context.pool_tokens,
        threads_decode=costs.usual_threads(1),
        threads_prefill=costs.usual_threads(context.batch_tokens, prefill=True),
        load_s=load_s,
    )
    return replace(
        known,
        tokenizer=encoder.plain.name,
        tokenizer_reason=encoder.plain.reason,
        has_chat_template=encoder.can_chat,
        images=encoder.can_chat and spec.projector_path is not None,
        chat_template=spec.chat_template or model.chat_template,
        fim=model.vocab.fill is not None,
        chat_template_problem=problem,
        tool_format=encoder.speech.tools.name if encoder.speech is not None else "",
        reasoning=encoder.speech is not None and encoder.speech.reasoning is not None,
    )
