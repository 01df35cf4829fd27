"""The ctypes module of llama-cpp-python: the only import of `llama_cpp`.

ctypes checks neither ranges nor pointers, so whoever calls through `api` checks every integer before it crosses and
turns every failure (return code, NULL) into a `LlamaError` or a status. Calls release the GIL.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


class LlamaError(Exception):
    """llama.cpp refused something; the text is ours or llama.cpp's load log, never a prompt."""


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


api = _bindings()


def load_mtmd() -> Any:
    """The ctypes module of libmtmd, which reads images; its library is loaded with it."""
    return importlib.import_module("llama_cpp.mtmd_cpp")


def ggml_library(name: str) -> Any:
    """One of ggml's own shared libraries (`ggml`, `ggml-base`), which llama-cpp-python does not wrap."""
    from llama_cpp._ctypes_extensions import load_shared_library

    return load_shared_library(name, api._base_path)
