"""The tree is the architecture. Imports inside functions and under TYPE_CHECKING count, or the arrow is decoration."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ocserve"
FILES = sorted(PACKAGE.rglob("*.py"))

# DESIGN: which package may import which; "vocabulary" is what all speak.
VOCABULARY = {"errors", "generation", "machine", "modelcard"}
MAY_IMPORT = {
    "errors": set(),
    "generation": {"errors"},
    "machine": set(),
    "modelcard": set(),
    "settings": set(),
    "peer": set(),
    "locks": set(),
    "config": VOCABULARY | {"settings"},
    "chat": VOCABULARY,
    "api": VOCABULARY,
    "telemetry": VOCABULARY | {"config"},
    "catalog": VOCABULARY | {"config", "locks"},
    "accounts": VOCABULARY | {"config", "locks"},
    "pages": VOCABULARY | {"config"},
    "engine": VOCABULARY | {"config", "chat"},
    "service": VOCABULARY | {"config", "accounts", "engine", "telemetry"},
    "http": VOCABULARY | {"config", "service", "api", "accounts", "telemetry", "pages"},
    "headstart": VOCABULARY | {"config", "engine"},
    "app": VOCABULARY
    | {"headstart", "config", "chat", "api", "telemetry", "catalog", "accounts", "pages", "engine", "service", "http"},
    "audit": VOCABULARY | {"config", "peer"},
    "bench": VOCABULARY | {"config", "peer"},
    "cli": VOCABULARY
    | {"peer", "headstart", "app", "audit", "bench", "pages", "catalog", "accounts", "config", "telemetry"},
    "__main__": {"cli"},
}

# A foreign library lives behind one module or folder (a prefix of the path in the package).
HOMES = {
    "llama_cpp": ("engine/bindings.py",),
    "starlette": ("http/",),
    "uvicorn": ("http/",),
    "click": ("cli/",),
    "jinja2": ("chat/sandbox.py",),
    "apsw": ("accounts/",),
    "structlog": ("telemetry/",),
    "prometheus_client": ("telemetry/",),
    "huggingface_hub": ("catalog/",),
    "llguidance": ("engine/constraint.py",),
    "tiktoken": ("engine/encodings.py",),
    "PIL": ("engine/images.py",),
}
BELOW_API = ("engine", "chat", "accounts", "telemetry", "catalog", "service.py", "generation.py", "errors.py")
VENDORS = re.compile(r"openai|anthropic|google", re.IGNORECASE)
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc", "shared", "stuff"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(module: str) -> str | None:
    """The part of `ocserve.<part>…`; None for the package itself, which holds the version."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in the file, also by `import_module` with a literal."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "ocserve":
                yield from (f"ocserve.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_table(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not list(imports(path)) or set(imports(path)) == {"__future__"}
        return
    assert own in MAY_IMPORT, f"{own} is not a part of the house"
    for module in imports(path):
        if not module.startswith("ocserve."):
            continue
        layer = layer_of(module)
        assert layer == own or layer in MAY_IMPORT[own], f"{name_of(path)} imports {module}"


def test_no_two_parts_import_one_another() -> None:
    edges = {
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), layer)
        for path in FILES
        for module in imports(path)
        if module.startswith("ocserve.") and (layer := layer_of(module))
    }
    assert [(one, other) for one, other in edges if one < other and (other, one) in edges] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_foreign_libraries_stay_in_their_homes(path: Path) -> None:
    for module in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name_of(path).startswith(homes), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_config_reads_the_environment(path: Path) -> None:
    reads = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    found = [
        node.lineno
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and node.attr in reads and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {alias.name for alias in node.names} & reads)
    ]
    assert not found or name_of(path) == "config.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_there_is_no_global_state(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith(BELOW_API)], ids=name_of)
def test_no_vendor_is_known_below_the_dialects(path: Path) -> None:
    found = []
    for node in ast.walk(parsed(path)):
        names: list[str | None] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.arg | ast.keyword):
            names = [node.arg]
        found += [name for name in names if name and VENDORS.search(name)]
    found += [module for module in imports(path) if VENDORS.search(module)]
    assert found == []


def test_no_module_is_named_for_its_vagueness() -> None:
    assert [name_of(path) for path in FILES if path.stem.strip("_") in VAGUE or path.parent.name in VAGUE] == []


def test_the_front_process_never_loads_native_code() -> None:
    code = "import sys, ocserve.app; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_import_linter_holds_the_same_table() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
