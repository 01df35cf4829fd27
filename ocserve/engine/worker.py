"""The engine process: `python -m ocserve.engine.worker PARENT SOCKET`.

Loads the model that the first message names, warms it up, then runs three threads beside the decode loop: one reads the
socket, one prepares requests, one sends heartbeats. End-of-file on the socket ends the process at once, whatever it is
computing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from ocserve.chat.template import TemplateUnusable
from ocserve.engine import llama, wire
from ocserve.engine.bindings import LlamaError
from ocserve.engine.context import Context, DecodeStatus, Row
from ocserve.engine.loop import EngineBroken, EngineLoop
from ocserve.engine.prepare import Preparer
from ocserve.engine.process import confine, gpu_makers, inherited_socket, usable_cores
from ocserve.engine.threads import Kind, ThreadChooser
from ocserve.engine.tokens import PromptEncoder
from ocserve.errors import EngineFailed

HEARTBEAT_S = 1.0
EXIT_BROKEN = 70
_STACK_MEGABYTES = (1536, 512, 128, 16)
_MOST_DECODE_THREADS = 8  # decoding is bound by memory bandwidth; more threads only wait for each other


class Wire:
    """The engine's end of the socket. `send` may be called from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: wire.EngineMessage) -> None:
        """Send one frame; a front that is gone ends the process."""
        frame = wire.encode(message)
        try:
            with self._lock:
                self._socket.sendall(frame)
        except OSError:
            os._exit(0)

    def messages(self) -> Iterator[wire.FrontMessage]:
        """Messages from the front; ends the process at end-of-file."""
        frames = wire.Frames()
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            for body in frames.feed(data):
                yield wire.decode_front(body)


class Worker:
    """A loaded model with its loop and its preparer."""

    def __init__(self, spec: wire.EngineSpec, connection: Wire) -> None:
        begun = time.monotonic()
        self._connection = connection
        log = llama.LoadLog()
        model = llama.Model(spec.path, gpu_layers=spec.gpu_layers, log=log)
        if model.trained_context < 1:
            raise LlamaError("the model's header claims an impossible context length")
        context_tokens = min(spec.context, model.trained_context)
        pool_tokens = max(spec.pool_tokens, context_tokens)  # alone, any sequence must fit
        few, many = _threads(spec)
        context = Context(
            model,
            pool_tokens=pool_tokens,
            sequences=spec.parallel,
            batch_tokens=max(spec.batch_tokens, spec.parallel),
            threads=many,
        )
        _warm_up(context, model.vocab)
        log.close()
        encoder, problem = _encoder(model, spec, context_tokens)
        self._loop = EngineLoop(
            context,
            model.vocab,
            parallel=spec.parallel,
            batch_tokens=max(spec.batch_tokens, spec.parallel),
            threads=_chooser(spec, few, many),
            emit=connection.send,
        )
        self._preparer = Preparer(encoder, model.vocab, context=context_tokens, emit=connection.send)
        gpu_layers = min(model.gpu_layers_asked, model.layers + 1) if _gpu_visible() else 0
        self.facts = wire.EngineFacts(
            architecture=model.metadata("general.architecture") or "unknown",
            description=model.description,
            context=context_tokens,
            trained_context=model.trained_context,
            parallel=spec.parallel,
            pool_tokens=context.pool_tokens,
            vocabulary=model.vocab.size,
            parameters=model.parameters,
            threads_decode=few,
            threads_prefill=many,
            gpu_layers=gpu_layers,
            devices=_devices(),
            llama_cpp=llama.version(),
            has_chat_template=encoder.can_chat,
            chat_template_problem=problem,
            unused_gpus=gpu_makers() if spec.gpu_layers != 0 and gpu_layers == 0 else (),
            load_s=time.monotonic() - begun,
        )

    def run(self) -> NoReturn:
        """Start the threads and compute until the process ends."""
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()
        _start_with_deep_stack(self._preparer.run)
        try:
            self._loop.run()
        except EngineBroken as error:
            _die(f"engine broken: {error}")
        os._exit(EXIT_BROKEN)

    def _read(self) -> None:
        for message in self._connection.messages():
            match message:
                case wire.Prepare(request=request):
                    self._preparer.submit(request)
                case wire.Start(request_id=request_id):
                    sequence = self._preparer.take(request_id)
                    if sequence is not None:
                        self._loop.submit(sequence)
                case wire.Cancel(request_id=request_id):
                    self._preparer.cancel(request_id)
                    self._loop.cancel(request_id)
                case wire.Load():
                    _die("a second load")

    def _beat(self) -> None:
        while True:
            started = self._loop.step_started
            age = time.monotonic() - started if started is not None else 0.0
            request_id, prepare_age = self._preparer.busy()
            self._connection.send(
                wire.Heartbeat(
                    stats=self._loop.stats(), step_age_s=age, preparing=request_id, prepare_age_s=prepare_age
                )
            )
            time.sleep(HEARTBEAT_S)


def _threads(spec: wire.EngineSpec) -> tuple[int, int]:
    """Few and many threads: many is every core, few leaves one to the front process."""
    cores = usable_cores()
    few = spec.threads_decode or min(max(1, cores - 1), _MOST_DECODE_THREADS)
    return few, spec.threads_prefill or cores


def _chooser(spec: wire.EngineSpec, few: int, many: int) -> ThreadChooser:
    """A count that the operator has set is kept; what is left open is learnt."""
    fixed = {Kind.SINGLE} if spec.threads_decode else set()
    fixed |= {Kind.PREFILL} if spec.threads_prefill else set()
    return ThreadChooser(few=few, many=many, fixed=frozenset(fixed))


def _encoder(model: llama.Model, spec: wire.EngineSpec, context: int) -> tuple[PromptEncoder, str | None]:
    """The encoder, and why the model cannot chat if its template is of no use; completions work all the same."""
    template = spec.chat_template or model.chat_template
    try:
        return PromptEncoder(model.vocab, template, context=context), None
    except TemplateUnusable as error:
        return PromptEncoder(model.vocab, None, context=context), str(error)


def _warm_up(context: Context, vocab: llama.Vocab) -> None:
    """One real decode, so that `Ready` means that the model computes."""
    token = vocab.bos if vocab.bos is not None else 0
    status = context.decode([Row(token, 0, 0, True)])
    context.logits(0).max()
    context.forget(0)
    if status is not DecodeStatus.OK:
        raise LlamaError(f"the warm-up decode failed: {status.name}")


def _start_with_deep_stack(target: Callable[[], None]) -> None:
    """Start a thread whose stack holds what llama.cpp's pre-tokenizers put on it.

    Some of them run through `std::regex`, which recurses for every character: about 340 bytes each were seen, so that
    30 kB of digits overflowed the usual 8 MiB. The address space is only reserved; memory is used as far as needed.
    """
    for megabytes in _STACK_MEGABYTES:
        try:
            threading.stack_size(megabytes * 1024 * 1024)
            threading.Thread(target=target, daemon=True, name="prepare").start()
            return
        except (ValueError, RuntimeError):  # more than this system or its limits allow
            continue
    _die("no stack for the preparing thread")


def _devices() -> tuple[wire.Device, ...]:
    return tuple(
        wire.Device(
            name=device.name,
            description=device.description,
            kind=device.kind,
            memory_free=device.memory_free,
            memory_total=device.memory_total,
        )
        for device in llama.devices()
    )


def _gpu_visible() -> bool:
    return any(device.kind in ("gpu", "igpu") for device in llama.devices())


def _die(reason: str) -> NoReturn:
    """End with a line that the front logs; never with text from a request."""
    sys.stderr.write(f"ocserve-engine: {reason}\n")
    sys.stderr.flush()
    os._exit(EXIT_BROKEN)


def main(parent: str, argument: str) -> NoReturn:
    confine(int(parent))
    connection = Wire(inherited_socket(argument))
    first = next(connection.messages())
    if not isinstance(first, wire.Load):
        _die("the first message was not a load")
    try:
        worker = Worker(first.spec, connection)
        if first.spec.require_gpu and worker.facts.gpu_layers == 0:
            raise LlamaError("no layer could be placed on a GPU, and engine.require_gpu is set")
    except LlamaError as error:
        connection.send(wire.LoadFailed(error=EngineFailed(str(error), code="model_load_failed").info))
        os._exit(EXIT_BROKEN)
    connection.send(wire.Ready(facts=worker.facts))
    worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
