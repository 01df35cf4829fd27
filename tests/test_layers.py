"""The tree is the architecture. Imports inside functions and under TYPE_CHECKING count, or the arrow is decoration."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ocserve"
FILES = sorted(PACKAGE.rglob("*.py"))

# DESIGN: which package may import which; "vocabulary" is what all speak.
VOCABULARY = {"decoding", "errors", "generation", "machine", "modelcard"}
MAY_IMPORT = {
    "decoding": set(),
    "errors": set(),
    "generation": {"errors"},
    "machine": {"decoding"},
    "modelcard": {"decoding"},
    "settings": {"kinds", "operating"},
    "kinds": set(),
    "operating": {"kinds"},
    "peer": set(),
    "doors": {"decoding", "errors"},
    "files": set(),
    "locks": set(),
    "config": VOCABULARY | {"files", "settings", "kinds", "operating"},
    "chat": VOCABULARY,
    "api": VOCABULARY,
    "telemetry": VOCABULARY | {"config", "files"},
    "catalog": VOCABULARY | {"config", "locks"},
    "accounts": VOCABULARY | {"config", "files", "locks"},
    "policy": VOCABULARY | {"config"},
    "pages": VOCABULARY | {"config", "doors", "files"},
    "engine": VOCABULARY | {"config", "chat"},
    "trace": VOCABULARY | {"accounts", "telemetry"},
    "telling": VOCABULARY | {"engine", "policy", "trace"},
    "service": VOCABULARY | {"config", "accounts", "doors", "engine", "policy", "telemetry", "telling", "trace"},
    "http": VOCABULARY | {"config", "doors", "service", "telling", "trace", "api", "accounts", "telemetry", "pages"},
    "headstart": VOCABULARY | {"config", "engine"},
    "serving": VOCABULARY | {"config", "accounts", "catalog", "engine", "http", "pages", "service", "telemetry"},
    "app": VOCABULARY
    | {
        "serving",
        "doors",
        "headstart",
        "config",
        "chat",
        "api",
        "telemetry",
        "catalog",
        "accounts",
        "pages",
        "policy",
        "engine",
        "service",
        "http",
    },
    "audit": VOCABULARY | {"config", "peer"},
    "bench": VOCABULARY | {"config", "peer"},
    "cli": VOCABULARY
    | {"peer", "files", "headstart", "app", "audit", "bench", "pages", "catalog", "accounts", "config", "telemetry"},
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
    "opentelemetry": ("telemetry/traces.py",),
}
BELOW_API = ("engine", "chat", "accounts", "policy", "telemetry", "catalog", "service.py", "generation.py", "errors.py")
VENDORS = re.compile(r"openai|anthropic|google", re.IGNORECASE)
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc", "shared", "stuff"}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Each file is parsed and walked once, and each rule below tells all that break it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(module: str) -> str | None:
    """The part of `ocserve.<part>…`; None for the package itself, which holds the version."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def place(path: Path, node: ast.AST) -> str:
    return f"{name_of(path)}:{getattr(node, 'lineno', 0)}"


@functools.cache
def imports(path: Path) -> list[str]:
    """Every module that is imported anywhere in the file, also by `import_module` with a literal."""
    found: list[str] = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "ocserve":
                found += [f"ocserve.{alias.name}" for alias in node.names if alias.name != "__version__"]
            else:
                found.append(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return found


def test_imports_follow_the_table() -> None:
    parts = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert {own for own in parts.values() if own != "__init__"} <= set(MAY_IMPORT), "a part is not one of the house"
    [top] = [path for path, own in parts.items() if own == "__init__"]
    assert set(imports(top)) <= {"__future__"}
    assert [
        f"{name_of(path)} imports {module}"
        for path, own in parts.items()
        if path != top
        for module in imports(path)
        if module.startswith("ocserve.") and (layer := layer_of(module)) != own and layer not in MAY_IMPORT[own]
    ] == []


def test_no_two_parts_import_one_another() -> None:
    edges = {
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), layer)
        for path in FILES
        for module in imports(path)
        if module.startswith("ocserve.") and (layer := layer_of(module))
    }
    assert [(one, other) for one, other in edges if one < other and (other, one) in edges] == []


def test_foreign_libraries_stay_in_their_homes() -> None:
    assert [
        f"{name_of(path)} imports {module}"
        for path in FILES
        for module in imports(path)
        if (homes := HOMES.get(module.split(".")[0])) is not None and not name_of(path).startswith(homes)
    ] == []


def test_only_config_reads_the_environment() -> None:
    reads = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    assert [
        place(path, node)
        for path in FILES
        for node in nodes(path)
        if (isinstance(node, ast.Attribute) and node.attr in reads and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {alias.name for alias in node.names} & reads)
        if name_of(path) != "config.py"
    ] == []


def test_there_is_no_global_state() -> None:
    assert [place(path, node) for path in FILES for node in nodes(path) if isinstance(node, ast.Global)] == []


def names(node: ast.AST) -> list[str | None]:
    """What the node calls something."""
    match node:
        case ast.Name():
            return [node.id]
        case ast.Attribute():
            return [node.attr]
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.arg() | ast.keyword():
            return [node.arg]
        case _:
            return []


def test_no_vendor_is_known_below_the_dialects() -> None:
    below = [path for path in FILES if name_of(path).startswith(BELOW_API)]
    assert [
        f"{place(path, node)} {name}"
        for path in below
        for node in nodes(path)
        for name in names(node)
        if name and VENDORS.search(name)
    ] == []
    assert [f"{name_of(path)} {module}" for path in below for module in imports(path) if VENDORS.search(module)] == []


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
