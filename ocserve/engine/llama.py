"""Models, vocabularies and devices as llama.cpp sees them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

from ocserve.engine.bindings import LlamaError, api, ggml_library
from ocserve.machine import Device

_TOKEN_UNKNOWN, _TOKEN_CONTROL, _TOKEN_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
_MARKED = _TOKEN_UNKNOWN | _TOKEN_CONTROL | _TOKEN_USER_DEFINED
_TOKEN_LSTRIP, _TOKEN_RSTRIP = 1 << 7, 1 << 8
_DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")
_LOG_WARN, _LOG_ERROR = 3, 4  # enum ggml_log_level
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class VocabToken:
    """A token that is more than ordinary text, with the attributes that llama.cpp's tokenizer acts on."""

    id: int
    text: str
    kind: Literal["control", "unknown", "user_defined"]
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True)
class FillTokens:
    """The vocabulary's own tokens for filling in the middle; the optional ones begin what is shown for context."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    file: int | None


def version() -> str:
    """The version of the llama.cpp that is linked in."""
    return str(api.llama_version().decode())


def build() -> str:
    """What saved states depend on: the version that is linked in and that of its format for them."""
    return f"{version()} state {api.LLAMA_STATE_SEQ_VERSION}"


def system_info() -> str:
    """llama.cpp's own line of CPU and backend features."""
    return str(api.llama_print_system_info().decode())


def supports_gpu_offload() -> bool:
    """Whether this build of llama.cpp can place layers on a GPU."""
    return bool(api.llama_supports_gpu_offload())


def devices() -> tuple[Device, ...]:
    """The devices ggml sees. llama-cpp-python does not wrap these functions, so their types are declared here."""
    registry, base = ggml_library("ggml"), ggml_library("ggml-base")
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
            Device(
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
SILENT = api.llama_log_callback(lambda level, text, data: None)


class LoadLog:
    """Keeps llama.cpp's warnings and errors while a model loads, and nothing afterwards.

    The hook is process-global in llama.cpp, so there is one object per process. `close` puts a silent hook in its
    place: from then on llama.cpp could only speak about requests.
    """

    LINES = 40

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.callback = api.llama_log_callback(self._write)  # ctypes does not keep it alive, llama.cpp will call it
        api.llama_log_set(self.callback, None)

    def _write(self, level: int, text: bytes, _: object) -> None:
        if level in (_LOG_WARN, _LOG_ERROR) and len(self.lines) < self.LINES:
            self.lines.append(text.decode(errors="replace").strip())

    def close(self) -> None:
        """Drop everything from now on; this object may go."""
        api.llama_log_set(SILENT, None)


class Vocab:
    """The model's vocabulary and llama.cpp's tokenizer. Safe to use from several threads."""

    def __init__(self, model: ctypes.c_void_p) -> None:
        self._pointer = api.llama_model_get_vocab(model)
        self.size: int = api.llama_vocab_n_tokens(self._pointer)
        self.bos: int | None = self._token(api.llama_vocab_bos)
        self.eos: int | None = self._token(api.llama_vocab_eos)
        self.sep: int | None = self._token(api.llama_vocab_sep)
        self.add_bos = bool(api.llama_vocab_get_add_bos(self._pointer))
        self.add_eos = bool(api.llama_vocab_get_add_eos(self._pointer))
        self.add_sep = bool(api.llama_vocab_get_add_sep(self._pointer))
        self.fill = self._fill_tokens()
        self._pieces: dict[int, bytes] = {}
        self._marked: tuple[VocabToken, ...] | None = None
        self._ends: frozenset[int] | None = None

    def _token(self, read: Callable[[object], int]) -> int | None:
        token = read(self._pointer)
        return None if token == _NO_TOKEN else token

    def _fill_tokens(self) -> FillTokens | None:
        prefix, suffix, middle = map(
            self._token, (api.llama_vocab_fim_pre, api.llama_vocab_fim_suf, api.llama_vocab_fim_mid)
        )
        if prefix is None or suffix is None or middle is None:
            return None
        repository, file = self._token(api.llama_vocab_fim_rep), self._token(api.llama_vocab_fim_sep)
        return FillTokens(prefix, suffix, middle, repository, file)

    def _each(self, read: Callable[[object, int], Any]) -> Iterator[Any]:
        """What `read` says of each token, in order of their ids."""
        return map(read, repeat(self._pointer), range(self.size))

    def _check(self, token: int) -> None:
        if not 0 <= token < self.size:
            raise LlamaError(f"token id {token} is outside the vocabulary of {self.size}")

    def text(self, token: int | None) -> str:
        """The token's text as the vocabulary spells it; empty for None."""
        if token is None:
            return ""
        self._check(token)
        return str(api.llama_vocab_get_text(self._pointer, token).decode(errors="replace"))

    def is_end(self, token: int) -> bool:
        """Whether sampling this token ends a generation (end of sequence, end of turn …)."""
        self._check(token)
        if self._ends is not None:  # a call into llama.cpp hands the interpreter to another thread that waits for it
            return token in self._ends
        return bool(api.llama_vocab_is_eog(self._pointer, token))

    def marked(self) -> tuple[VocabToken, ...]:
        """All control, unknown, user-defined and end tokens. One pass over the vocabulary, the first time."""
        if self._marked is not None:
            return self._marked
        found, all_ends = [], set()
        kinds = zip(self._each(api.llama_vocab_get_attr), self._each(api.llama_vocab_is_eog), strict=True)
        for token, (attributes, ends) in enumerate(kinds):
            if not (attributes & _MARKED or ends):
                continue
            if ends:
                all_ends.add(token)
            # An end token that the vocabulary lists as a normal one is as good as user-defined.
            kind = _token_kind(attributes) or ("user_defined" if ends else None)
            if kind is not None and (text := self.text(token)):
                lstrip, rstrip = bool(attributes & _TOKEN_LSTRIP), bool(attributes & _TOKEN_RSTRIP)
                found.append(VocabToken(token, text, kind, lstrip, rstrip))
        self._marked, self._ends = tuple(found), frozenset(all_ends)
        return self._marked

    def tokenize(self, text: str, *, parse_special: bool, framed: bool = False) -> list[int]:
        """Token ids of `text`; `framed`: between the begin and end tokens that the vocabulary puts around an input."""
        data = text.encode()
        capacity = len(data) + 16
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            count = api.llama_tokenize(self._pointer, data, len(data), buffer, capacity, framed, parse_special)
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

    def spelled(self, token: int) -> bytes:
        """As `piece`, but control tokens as the vocabulary writes them."""
        return self.piece(token) or self._read_piece(token, special=True)

    def dry_sampler(self, multiplier: float, base: float, allowed: int, window: int, breakers: list[bytes]) -> object:
        """llama.cpp's DRY sampler, which looks its breakers up in the vocabulary."""
        array = (ctypes.c_char_p * len(breakers))(*breakers)
        return api.llama_sampler_init_dry(self._pointer, multiplier, base, allowed, window, array, len(breakers))

    def pieces(self) -> list[bytes]:
        """The bytes of every token, in order of their ids. Reads the whole vocabulary; nothing of it is kept."""
        return [self._read_piece(token) for token in range(self.size)]

    def longest_piece(self) -> int:
        """Bytes of the longest token: no text of n bytes has fewer than n divided by this many tokens."""
        return max(map(len, self._each(api.llama_vocab_get_text)))

    def _read_piece(self, token: int, *, special: bool = False) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(self._pointer, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


class Model:
    """A loaded model. It is never freed: the process ends instead."""

    def __init__(self, path: str, *, gpu_layers: int, log: LoadLog) -> None:
        """Load `path`. `gpu_layers` -1 is all of them where the build can offload."""
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = (999 if gpu_layers < 0 else gpu_layers) if supports_gpu_offload() else 0
        self.gpu_layers_asked: int = parameters.n_gpu_layers
        self.pointer = api.llama_model_load_from_file(path.encode(), parameters)
        if not self.pointer:
            raise LlamaError("llama.cpp could not load the model: " + " | ".join(log.lines[-6:]))
        self.vocab = Vocab(self.pointer)
        self.layers: int = api.llama_model_n_layer(self.pointer)
        self.trained_context: int = api.llama_model_n_ctx_train(self.pointer)
        self.parameters: int = api.llama_model_n_params(self.pointer)
        self.embedding_length: int = api.llama_model_n_embd_inp(self.pointer)  # of a row that stands for a token
        self.window: int = api.llama_model_n_swa(self.pointer)
        self.recurrent: bool = api.llama_model_is_recurrent(self.pointer)
        self.hybrid: bool = api.llama_model_is_hybrid(self.pointer)
        self.has_encoder: bool = api.llama_model_has_encoder(self.pointer)
        self.has_decoder: bool = api.llama_model_has_decoder(self.pointer)

    @property
    def row_in_cells(self) -> float:
        """How many cells' attention is as much arithmetic as the rest of a row: two operations for each weight that a
        row uses, four for each number of its queries."""
        kind = self.metadata("general.architecture") or ""

        def number(name: str, usual: int) -> int:
            return int(found) if (found := self.metadata(f"{kind}.{name}") or "").isdecimal() else usual

        heads = number("attention.head_count", 1)
        queries = heads * number("attention.key_length", self.embedding_length // max(1, heads))
        weights = self.parameters - self.vocab.size * self.embedding_length  # those of the vocabulary are looked up
        experts = number("expert_count", 0)
        used = number("expert_used_count", experts) / experts if experts else 1.0
        return max(1.0, weights * used / (2 * max(1, self.layers * queries)))

    @property
    def description(self) -> str:
        """llama.cpp's own words for architecture, size and quantisation."""
        buffer = ctypes.create_string_buffer(256)
        api.llama_model_desc(self.pointer, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def metadata(self, key: str) -> str | None:
        """A GGUF metadata value as text, None where it is absent."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode(errors="replace")
            size = length + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template from the file."""
        template = api.llama_model_chat_template(self.pointer, None)
        return template.decode(errors="replace") if template else None
