"""Small, and measured: what has to be read at once fits in one sitting."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ocserve"
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MODULE_LINES = 450
FUNCTION_LINES = 60

# "file.py:function" with the reason; short, and better empty.
LONGER_FUNCTIONS: frozenset[str] = frozenset()


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(text) for path, text in TEXTS.items()}


def test_modules_are_short() -> None:
    lengths = {name_of(path): len(text.splitlines()) for path, text in TEXTS.items()}
    assert {name: length for name, length in lengths.items() if length > MODULE_LINES} == {}


def test_functions_are_short() -> None:
    longer = {
        f"{name_of(path)}:{node.name}"
        for path, module in parsed().items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert longer <= LONGER_FUNCTIONS


def test_every_module_says_what_it_owns() -> None:
    silent = [path for path, module in parsed().items() if not ast.get_docstring(module)]
    assert [name_of(path) for path in silent if path.name != "__init__.py" or TEXTS[path].strip()] == []
