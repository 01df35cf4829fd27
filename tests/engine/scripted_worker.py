"""An engine process without a model: speaks the real wire, does what the prompt's text says.

`emit N`: N deltas, then `Finished`. `emit N crash`: N deltas, then abort. `crash-in-prepare`, `slow-crash-in-prepare`,
`slow-prepare`, `stuck-in-prepare`, `refuse`. Each delta is one word; a delta leaves every millisecond, with `every S`
every S seconds. Questions: a token for each word, or `crash`, `slow-crash`, `never` (until it is cancelled), `refuse`.
`load-fails` as the model path refuses the load.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ocserve.engine import wire
from ocserve.engine.process import confine, inherited_socket
from ocserve.errors import EngineFailed, InvalidRequest
from ocserve.generation import (
    Encoded,
    EncodeRequest,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Question,
    Started,
    TextDelta,
    TextPrompt,
    Usage,
)

FACTS = wire.EngineFacts(
    architecture="scripted",
    description="scripted",
    context=1000,
    trained_context=1000,
    parallel=8,
    pool_tokens=8000,
    vocabulary=100,
    parameters=1,
    threads_decode=1,
    threads_prefill=1,
    gpu_layers=0,
    devices=(),
    llama_cpp="none",
    has_chat_template=True,
    load_s=0.0,
)


class Script:
    def __init__(self, argument: str) -> None:
        self.socket = inherited_socket(argument)
        self.lock = threading.Lock()
        self.prepared: dict[str, GenerateRequest] = {}
        self.cancelled: set[str] = set()
        self.preparing: tuple[str, float] | None = None

    def send(self, message: wire.EngineMessage) -> None:
        with self.lock:
            self.socket.sendall(wire.encode(message))

    def run(self) -> None:
        frames = wire.Frames()
        while data := self.socket.recv(1 << 16):
            for body in frames.feed(data):
                self.handle(wire.decode_front(body))
        os._exit(0)

    def handle(self, message: wire.FrontMessage) -> None:
        match message:
            case wire.Load(spec=spec):
                if spec.path == "load-fails":
                    self.send(wire.LoadFailed(error=EngineFailed("no such model", code="model_load_failed").info))
                    os._exit(1)
                self.send(wire.Ready(facts=FACTS))
                threading.Thread(target=self.beat, daemon=True).start()
            case wire.Prepare(request=request):
                threading.Thread(target=self.prepare, args=(request,), daemon=True).start()
            case wire.Start(request_id=request_id):
                threading.Thread(target=self.generate, args=(self.prepared.pop(request_id),), daemon=True).start()
            case wire.Ask(question=question):
                threading.Thread(target=self.answer, args=(question,), daemon=True).start()
            case wire.Cancel(request_id=request_id):
                self.cancelled.add(request_id)

    def prepare(self, request: GenerateRequest) -> None:
        words = text_of(request)
        if words == ["slow-crash-in-prepare"]:
            time.sleep(0.3)
        if words[0].endswith("crash-in-prepare"):
            os.abort()
        if words == ["stop-in-prepare"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        if words[0] == "slow-prepare":
            time.sleep(0.2)
        if words == ["stuck-in-prepare"]:
            self.preparing = request.request_id, time.monotonic()
            time.sleep(1000)
        if words == ["refuse"]:
            error = InvalidRequest("refused as asked", param="prompt").info
            self.send(wire.Refused(request_id=request.request_id, error=error))
            return
        self.prepared[request.request_id] = request
        self.send(wire.Prepared(request_id=request.request_id, prompt_tokens=len(words), max_tokens=request.max_tokens))

    def answer(self, question: Question) -> None:
        """One token for each word of a text."""
        assert isinstance(question, EncodeRequest)
        words = text_of(question)
        if words == ["slow-crash"]:
            time.sleep(0.3)
        if words[0].endswith("crash"):
            os.abort()
        if words == ["never"]:
            while question.request_id not in self.cancelled:
                time.sleep(0.01)
        if words in (["never"], ["refuse"]):
            error = InvalidRequest("refused as asked", param="prompt").info
            self.send(wire.Refused(request_id=question.request_id, error=error))
            return
        answer = Encoded(count=len(words), tokens=tuple(range(len(words))))
        self.send(wire.Told(request_id=question.request_id, answer=answer))

    def generate(self, request: GenerateRequest) -> None:
        words = text_of(request)
        count = int(words[1])
        pause_s = float(words[words.index("every") + 1]) if "every" in words else 0.001
        choices = range(request.choices)
        self.emit(request, Started(prompt_tokens=len(words)))
        reason: FinishReason = "stop"
        made = 0
        for made in range(1, count + 1):  # noqa: B007
            if request.request_id in self.cancelled:
                reason = "cancelled"
                break
            self.emit(request, *(TextDelta(text="word ", tokens=1, index=index) for index in choices))
            time.sleep(pause_s)
        if "crash" in words:
            os.abort()
        usage = Usage(prompt_tokens=len(words), completion_tokens=made)
        for index in choices:
            self.emit(request, Finished(reason=reason, usage=usage, index=index))

    def emit(self, request: GenerateRequest, *events: GenerateEvent) -> None:
        self.send(wire.Step(events=tuple((request.request_id, event) for event in events)))

    def beat(self) -> None:
        while True:
            request_id, since = self.preparing or (None, time.monotonic())
            self.send(
                wire.Heartbeat(
                    stats=wire.EngineStats(steps=1),
                    step_age_s=0.0,
                    preparing=request_id,
                    prepare_age_s=time.monotonic() - since,
                )
            )
            time.sleep(0.1)


def text_of(request: GenerateRequest | EncodeRequest) -> list[str]:
    assert isinstance(request.prompt, TextPrompt)
    return request.prompt.text.split()


if __name__ == "__main__":
    confine(int(sys.argv[1]))
    Script(sys.argv[2]).run()
