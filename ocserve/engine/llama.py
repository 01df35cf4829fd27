"""llama.cpp, through the low-level bindings: the only module that imports `llama_cpp`.

ctypes checks neither ranges nor pointers, so every integer is checked here before it crosses, and every failure (return
code, NULL) becomes a `LlamaError` or a `DecodeStatus`. Calls release the GIL. One `Context` belongs to one thread.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from ocserve.generation import Sampling


def _bindings() -> Any:
    """The ctypes module of llama-cpp-python without its package.

    The package's `__init__` pulls in the high-level API and with it a pickling disk cache that has a known
    vulnerability; a bare module object in its place lets the one submodule be imported alone.
    """
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise LlamaError("llama-cpp-python is not installed")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


class LlamaError(Exception):
    """llama.cpp refused something; the text is ours or llama.cpp's load log, never a prompt."""


_api = _bindings()

_TOKEN_UNKNOWN, _TOKEN_CONTROL, _TOKEN_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
_TOKEN_LSTRIP, _TOKEN_RSTRIP = 1 << 7, 1 << 8
_DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")
_LOG_WARN, _LOG_ERROR = 3, 4  # enum ggml_log_level
_NO_TOKEN = -1
_GREEDY_BELOW = 1e-3  # dividing logits by less overflows; what is left of the distribution is its top token


class DecodeStatus(Enum):
    """Outcome of one `Context.decode`. After ABORTED and FATAL part of the batch may stay in memory."""

    OK = 0
    NO_SLOT = 1
    ABORTED = 2
    INVALID = -1
    FATAL = -2


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as ggml lists it; memory in bytes."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int


@dataclass(frozen=True, slots=True)
class VocabToken:
    """A token that is more than ordinary text, with the attributes that llama.cpp's tokenizer acts on."""

    id: int
    text: str
    kind: Literal["control", "unknown", "user_defined"]
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One token of a batch. `logits` asks for the distribution of the token that follows it."""

    token: int
    position: int
    sequence: int
    logits: bool


def version() -> str:
    """The version of the llama.cpp that is linked in."""
    return str(_api.llama_version().decode())


def system_info() -> str:
    """llama.cpp's own line of CPU and backend features."""
    return str(_api.llama_print_system_info().decode())


def supports_gpu_offload() -> bool:
    """Whether this build of llama.cpp can place layers on a GPU."""
    return bool(_api.llama_supports_gpu_offload())


def devices() -> tuple[DeviceInfo, ...]:
    """The devices ggml sees. llama-cpp-python does not wrap these functions, so their types are declared here."""
    from llama_cpp._ctypes_extensions import load_shared_library

    registry = load_shared_library("ggml", _api._base_path)
    base = load_shared_library("ggml-base", _api._base_path)
    count, get = registry.ggml_backend_dev_count, registry.ggml_backend_dev_get
    count.argtypes, count.restype = [], ctypes.c_size_t
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    name, description = base.ggml_backend_dev_name, base.ggml_backend_dev_description
    kind, memory = base.ggml_backend_dev_type, base.ggml_backend_dev_memory
    for text in (name, description):
        text.argtypes, text.restype = [ctypes.c_void_p], ctypes.c_char_p
    kind.argtypes, kind.restype = [ctypes.c_void_p], ctypes.c_int
    size_p = ctypes.POINTER(ctypes.c_size_t)
    memory.argtypes, memory.restype = [ctypes.c_void_p, size_p, size_p], None
    found = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        number = kind(device)
        found.append(
            DeviceInfo(
                name=name(device).decode(),
                description=description(device).decode(),
                kind=_DEVICE_KINDS[number] if 0 <= number < len(_DEVICE_KINDS) else "other",
                memory_free=free.value,
                memory_total=total.value,
            )
        )
    return tuple(found)


def _token_kind(attributes: int) -> Literal["control", "unknown", "user_defined"] | None:
    if attributes & _TOKEN_CONTROL:
        return "control"
    if attributes & _TOKEN_UNKNOWN:
        return "unknown"
    return "user_defined" if attributes & _TOKEN_USER_DEFINED else None


# Lives as long as the process: llama.cpp calls a hook whenever it likes, and a collected one is a crash.
_SILENT = _api.llama_log_callback(lambda level, text, data: None)


class LoadLog:
    """Keeps llama.cpp's warnings and errors while a model loads, and nothing afterwards.

    The hook is process-global in llama.cpp, so there is one object per process. `close` puts a silent hook in its
    place: from then on llama.cpp could only speak about requests.
    """

    LINES = 40

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._callback = _api.llama_log_callback(self._write)  # ctypes does not keep it alive, llama.cpp will call it
        _api.llama_log_set(self._callback, None)

    def _write(self, level: int, text: bytes, _: object) -> None:
        if level in (_LOG_WARN, _LOG_ERROR) and len(self.lines) < self.LINES:
            self.lines.append(text.decode(errors="replace").strip())

    def close(self) -> None:
        """Drop everything from now on; this object may go."""
        _api.llama_log_set(_SILENT, None)


class Vocab:
    """The model's vocabulary and llama.cpp's tokenizer. Safe to use from several threads."""

    def __init__(self, model: ctypes.c_void_p) -> None:
        self._pointer = _api.llama_model_get_vocab(model)
        self.size: int = _api.llama_vocab_n_tokens(self._pointer)
        self.bos: int | None = self._token(_api.llama_vocab_bos)
        self.eos: int | None = self._token(_api.llama_vocab_eos)
        self.add_bos = bool(_api.llama_vocab_get_add_bos(self._pointer))
        self._pieces: dict[int, bytes] = {}

    def _token(self, read: Callable[[object], int]) -> int | None:
        token = read(self._pointer)
        return None if token == _NO_TOKEN else token

    def _check(self, token: int) -> None:
        if not 0 <= token < self.size:
            raise LlamaError(f"token id {token} is outside the vocabulary of {self.size}")

    def text(self, token: int | None) -> str:
        """The token's text as the vocabulary spells it; empty for None."""
        if token is None:
            return ""
        self._check(token)
        return str(_api.llama_vocab_get_text(self._pointer, token).decode(errors="replace"))

    def is_end(self, token: int) -> bool:
        """Whether sampling this token ends a generation (end of sequence, end of turn …)."""
        self._check(token)
        return bool(_api.llama_vocab_is_eog(self._pointer, token))

    def marked(self) -> tuple[VocabToken, ...]:
        """All control, unknown, user-defined and end tokens. One pass over the vocabulary, at load."""
        found = []
        for token in range(self.size):
            attributes = _api.llama_vocab_get_attr(self._pointer, token)
            kind = _token_kind(attributes)
            if kind is None and self.is_end(token):
                kind = "user_defined"  # an end token that the vocabulary lists as a normal one
            if kind is not None and (text := self.text(token)):
                lstrip, rstrip = bool(attributes & _TOKEN_LSTRIP), bool(attributes & _TOKEN_RSTRIP)
                found.append(VocabToken(token, text, kind, lstrip, rstrip))
        return tuple(found)

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids of `text`, without any added begin or end token."""
        data = text.encode()
        capacity = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            count = _api.llama_tokenize(self._pointer, data, len(data), buffer, capacity, False, parse_special)
            if count >= 0:
                return buffer[:count]
            if -count <= capacity:
                raise LlamaError("the tokenizer failed")
            capacity = -count

    def piece(self, token: int) -> bytes:
        """The bytes that this token adds to the text; empty for control tokens."""
        known = self._pieces.get(token)
        if known is None:
            self._check(token)
            known = self._pieces[token] = self._read_piece(token)
        return known

    def longest_piece(self) -> int:
        """Bytes of the longest token: no text of n bytes has fewer than n divided by this many tokens."""
        return max(len(_api.llama_vocab_get_text(self._pointer, token)) for token in range(self.size))

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = _api.llama_token_to_piece(self._pointer, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


class Model:
    """A loaded model. It is never freed: the process ends instead."""

    def __init__(self, path: str, *, gpu_layers: int, log: LoadLog) -> None:
        """Load `path`. `gpu_layers` -1 is all of them where the build can offload."""
        _api.llama_backend_init()
        parameters = _api.llama_model_default_params()
        parameters.n_gpu_layers = (999 if gpu_layers < 0 else gpu_layers) if supports_gpu_offload() else 0
        self.gpu_layers_asked: int = parameters.n_gpu_layers
        self.pointer = _api.llama_model_load_from_file(path.encode(), parameters)
        if not self.pointer:
            raise LlamaError("llama.cpp could not load the model: " + " | ".join(log.lines[-6:]))
        self.vocab = Vocab(self.pointer)
        self.layers: int = _api.llama_model_n_layer(self.pointer)
        self.trained_context: int = _api.llama_model_n_ctx_train(self.pointer)
        self.parameters: int = _api.llama_model_n_params(self.pointer)

    @property
    def description(self) -> str:
        """llama.cpp's own words for architecture, size and quantisation."""
        buffer = ctypes.create_string_buffer(256)
        _api.llama_model_desc(self.pointer, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def metadata(self, key: str) -> str | None:
        """A GGUF metadata value as text, None where it is absent."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = _api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode(errors="replace")
            size = length + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template from the file."""
        template = _api.llama_model_chat_template(self.pointer, None)
        return template.decode(errors="replace") if template else None


class Context:
    """Computes batches over a pool of KV cells that all sequences share (unified KV)."""

    def __init__(
        self,
        model: Model,
        *,
        pool_tokens: int,
        sequences: int,
        batch_tokens: int,
        threads: int,
        exact: bool = False,
    ) -> None:
        """`exact` computes attention in F32 with an F32 cache and without flash attention.

        It is for comparing schedules: with flash attention, one row alone and the same row in a batch differ by up to
        0.06 in the logits of a small F32 model; without, by less than 1e-5.
        """
        parameters = _api.llama_context_default_params()
        parameters.n_ctx = pool_tokens
        parameters.n_batch = batch_tokens
        parameters.n_ubatch = batch_tokens
        parameters.n_seq_max = sequences
        # One distribution per sequence and step; the default would reserve batch_tokens × vocabulary floats.
        parameters.n_outputs_max = sequences
        parameters.kv_unified = True
        parameters.swa_full = False  # nothing rolls back, so sliding-window layers keep only their window
        parameters.n_threads = parameters.n_threads_batch = threads
        if exact:
            parameters.type_k = parameters.type_v = _api.GGML_TYPE_F32
            parameters.flash_attn_type = _api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        self._pointer: ctypes.c_void_p = _api.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise LlamaError(f"llama.cpp could not create a context of {pool_tokens} tokens (not enough memory?)")
        self._memory = _api.llama_get_memory(self._pointer)
        if not self._memory or _api.llama_model_has_encoder(model.pointer):
            raise LlamaError("this model cannot generate text token by token (an embedding or encoder model)")
        self.pool_tokens: int = _api.llama_n_ctx(self._pointer)
        self._capacity = batch_tokens
        self._sequences = sequences
        self._batch = _api.llama_batch_init(batch_tokens, 0, 1)
        self._vocabulary = model.vocab.size
        self._threads = threads

    @property
    def pointer(self) -> ctypes.c_void_p:
        return self._pointer

    def use_threads(self, count: int) -> None:
        """Compute the next batches with `count` threads, whatever their size."""
        if count != self._threads:
            _api.llama_set_n_threads(self._pointer, count, count)
            self._threads = count

    def decode(self, rows: Sequence[Row]) -> DecodeStatus:
        """Compute one batch; distributions are then read by row index."""
        assert 0 < len(rows) <= self._capacity
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, row in enumerate(rows):
            assert 0 <= row.token < self._vocabulary
            assert 0 <= row.sequence < self._sequences
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.sequence
            batch.logits[index] = row.logits
        code = _api.llama_decode(self._pointer, batch)
        return DecodeStatus(code) if code >= -1 else DecodeStatus.FATAL

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The distribution that row `row` of the last batch asked for: a view of vocabulary-size floats."""
        pointer = _api.llama_get_logits_ith(self._pointer, row)
        if not pointer:
            raise LlamaError(f"row {row} asked for no distribution")
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def forget(self, sequence: int) -> None:
        """Free all cells of a sequence."""
        _api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def occupied(self, sequence: int) -> bool:
        """Whether the sequence holds any cell."""
        return bool(_api.llama_memory_seq_pos_max(self._memory, sequence) >= 0)


class SamplerChain:
    """llama.cpp's sampler chain for one sequence; `sample` also records the token for the penalties."""

    def __init__(self, vocab: Vocab, sampling: Sampling, *, seed: int, window: int, prompt: Iterable[int]) -> None:
        """`window` is how many tokens the penalties remember; `seed` is 64 bits, folded to llama.cpp's 32.

        The repetition penalty counts the prompt, frequency and presence penalties do not (see `Sampling`), hence two
        penalty samplers. The truncating samplers come before the temperature, in llama.cpp's usual order.
        """
        self._chain = _api.llama_sampler_chain_init(_api.llama_sampler_chain_default_params())
        if sampling.logit_bias:
            self._add(_logit_bias(vocab, sampling.logit_bias))
        if sampling.repetition_penalty != 1.0:
            repetition = _api.llama_sampler_init_penalties(vocab.size, window, sampling.repetition_penalty, 0.0, 0.0)
            for token in prompt:
                _api.llama_sampler_accept(repetition, token)
            self._add(repetition)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._add(
                _api.llama_sampler_init_penalties(
                    vocab.size, window, 1.0, sampling.frequency_penalty, sampling.presence_penalty
                )
            )
        if sampling.temperature < _GREEDY_BELOW:
            self._add(_api.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            self._add(_api.llama_sampler_init_top_k(min(sampling.top_k, vocab.size)))
        if sampling.top_p < 1:
            self._add(_api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(_api.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.temperature != 1:
            self._add(_api.llama_sampler_init_temp(sampling.temperature))
        self._add(_api.llama_sampler_init_dist(_fold(seed)))

    def _add(self, sampler: object) -> None:
        if not sampler:
            raise LlamaError("llama.cpp refused a sampler")
        _api.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, row: int) -> int:
        """Draw the token that follows row `row` of the last batch."""
        return int(_api.llama_sampler_sample(self._chain, context.pointer, row))

    def close(self) -> None:
        """Free the chain and its samplers; the object is unusable afterwards."""
        if self._chain:
            _api.llama_sampler_free(self._chain)
            self._chain = None


def _fold(seed: int) -> int:
    """64 bits to 32, avoiding llama.cpp's 0xFFFFFFFF, which means a random seed."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != 0xFFFFFFFF else 0x7FFFFFFF


def _logit_bias(vocab: Vocab, biases: dict[int, float]) -> object:
    array = (_api.llama_logit_bias * len(biases))()
    for slot, (token, bias) in zip(array, biases.items(), strict=True):
        slot.token, slot.bias = token, bias
    return _api.llama_sampler_init_logit_bias(vocab.size, len(biases), array)
