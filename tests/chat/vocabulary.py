"""A real vocabulary through the binding's low-level API, as the engine sees it: tokens without weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from ocserve.chat.specials import Kind, SpecialToken, SpecialTokens
from ocserve.engine.bindings import api as llama_cpp


@llama_cpp.llama_log_callback
def _silence(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


class Vocabulary:
    """One vocab-only GGUF file."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.specials = SpecialTokens(self._special_tokens())

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def _special_tokens(self) -> list[SpecialToken]:
        found = []
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocab)):
            attributes = llama_cpp.llama_vocab_get_attr(self._vocab, token)
            kind: Kind | None = None
            if attributes & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL:
                kind = "control"
            elif attributes & llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN:
                kind = "unknown"
            elif attributes & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED or llama_cpp.llama_vocab_is_eog(
                self._vocab, token
            ):
                kind = "user_defined"
            if kind is not None:
                found.append(
                    SpecialToken(
                        text=llama_cpp.llama_vocab_get_text(self._vocab, token).decode(errors="replace"),
                        id=token,
                        kind=kind,
                        lstrip=bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP),
                        rstrip=bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP),
                    )
                )
        return found

    def tokenize(self, text: str, *, parse_special: bool = False) -> Sequence[int]:
        data = text.encode()
        size = len(data) + 8
        ids = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, False, parse_special)
        assert count >= 0
        return list(ids[:count])
