"""Messages between the front process and an engine process, and their framing.

A frame is a 4-byte big-endian length and one msgpack value, decoded into the structs below; never pickle. The front
sends `Load` first; the engine answers `Ready` or `LoadFailed`, then both talk freely. All text of a frame is bounded by
`MAX_FRAME_BYTES` in both directions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

from ocserve.config import Images
from ocserve.errors import ErrorInfo
from ocserve.generation import Answer, GenerateEvent, GenerateRequest, Question
from ocserve.machine import Device as Device

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process is told: the file, the sizes, the threads (None: the engine decides).

    `sequences` and `outputs` are the context's ids (running and kept sequences, one for copying) and rows with a
    distribution; 0 is as few as can be. `model_digest` names the file's content and is part of what a stored prefix or
    profile is valid for, like `projector_digest` for the projector of images. `cache_directory` None: nothing is stored
    on disk.
    """

    path: str
    context: int
    parallel: int
    pool_tokens: int
    gpu_layers: int
    require_gpu: bool
    threads_decode: int | None
    threads_prefill: int | None
    batch_tokens: int
    sequences: int = 0
    outputs: int = 0
    chat_template: str | None = None
    model_digest: str = ""
    kv_type: str = "f16"
    flash_attention: bool = True
    prefill_order: Literal["serial", "joint"] = "serial"
    prefix_cache: bool = True
    fast_forward: bool = True
    speculation: Literal["auto", "off"] = "auto"
    draft_path: str | None = None
    projector_path: str | None = None
    projector_digest: str = ""
    images: Images = Images()
    host_cache_bytes: int = 0
    disk_cache_bytes: int = 0
    cache_directory: str | None = None


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    spec: EngineSpec


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Render, tokenise and check; the answer is `Prepared` or `Refused`."""

    request: GenerateRequest


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Queue a prepared request for a slot."""

    request_id: str


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """Answer at once, without a slot; the answer is `Told` or `Refused`."""

    question: Question


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Forget a request or a question in whatever phase; a started one ends with `Finished(reason="cancelled")`.

    What has not been answered yet still is once nothing works on it any more, with `Refused` if with nothing else.
    """

    request_id: str


class Obey(msgspec.Struct, frozen=True, kw_only=True, tag="obey"):
    """Hold prompts that are prepared from now on to other limits."""

    images: Images


FrontMessage = Load | Prepare | Start | Ask | Cancel | Obey


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine knows of itself once it is ready.

    `chat_template` is the source of what it renders messages with, also where that is of no use; `bos` and `eos` are
    the texts of these tokens, empty where there are none; `fim`: whether it can fill in the middle.
    """

    architecture: str
    description: str
    context: int
    trained_context: int
    parallel: int
    pool_tokens: int
    vocabulary: int
    parameters: int
    threads_decode: int
    threads_prefill: int
    gpu_layers: int
    devices: tuple[Device, ...]
    llama_cpp: str
    has_chat_template: bool
    load_s: float
    chat_template: str | None = None
    chat_template_problem: str | None = None
    tool_format: str = ""  # how the model writes calls; empty if it cannot chat
    reasoning: bool = False  # whether it may think before it answers
    bos: str = ""
    eos: str = ""
    fim: bool = False
    images: bool = False  # whether prompts may have images
    tokenizer: Literal["tiktoken", "llama.cpp"] = "llama.cpp"
    tokenizer_reason: str | None = None  # why it is not the faster one
    dimensions: int = 0  # of an embedding model's vectors
    unused_gpus: tuple[str, ...] = ()  # makers of GPUs that are here while every layer is on the CPU unasked


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    facts: EngineFacts


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag="load_failed"):
    error: ErrorInfo


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    """`max_tokens` is the request's bound, lowered to what the context leaves after the prompt.

    `ignored` are the paths of message fields that the model's chat template passes over.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    ignored: tuple[str, ...] = ()


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="told"):
    """The answer to a question."""

    request_id: str
    answer: Answer


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """A request that cannot run, or a question that cannot be answered."""

    request_id: str
    error: ErrorInfo


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Everything that one step of the loop made visible: (request id, event) in order."""

    events: tuple[tuple[str, GenerateEvent], ...]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The loop's own counters since load. `steps_by_sequences[k]` counts steps in which k sequences decoded.

    `prefill_tokens` were computed; `resident_tokens`, `host_tokens` and `disk_tokens` of prompts were taken from the
    tiers instead. `cells_used` are distinct KV cells of running sequences and kept prefixes, `cells_kept` those that
    only kept prefixes hold. `forced_tokens` followed from a schema without sampling. Of
    `invalid_objects` the check found that they do not satisfy their schema, or could not tell.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    steps_by_sequences: tuple[int, ...] = ()
    running: int = 0
    waiting: int = 0
    cells_used: int = 0
    cells_total: int = 0
    preemptions: int = 0
    parked: int = 0
    resumed: int = 0
    cells_kept: int = 0
    evictions: int = 0
    resident_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    invalid_objects: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent about once a second by a thread of its own, so that a long step does not read as a hang.

    `step_age_s` is how long the current step has been running, 0 between steps; `prepare_age_s` likewise for the
    request that is being rendered and tokenised, `preparing`.
    """

    stats: EngineStats
    step_age_s: float
    preparing: str | None = None
    prepare_age_s: float = 0.0


EngineMessage = Ready | LoadFailed | Prepared | Told | Refused | Step | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_front_decoder: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
_engine_decoder: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)


class FrameError(Exception):
    """The peer sent something that is not a frame of this protocol."""


def encode(message: FrontMessage | EngineMessage) -> bytes:
    """One message as one frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a byte stream into frames: feed bytes in any pieces, iterate over complete bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body


def decode_front(body: bytes) -> FrontMessage:
    """A frame that the front process sent."""
    try:
        return _front_decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError("not a message of the front process") from error


def decode_engine(body: bytes) -> EngineMessage:
    """A frame that an engine process sent."""
    try:
        return _engine_decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError("not a message of an engine process") from error
