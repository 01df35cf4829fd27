"""Whatever a server may decode in a thread was resolved at its import."""

from __future__ import annotations

import ast

from tests.test_layers import FILES, name_of, nodes

# Commands and child processes that decode in one thread, and what they measure with.
_ALONE = ("audit/", "bench/", "cli/", "engine/tuning.py", "engine/ceiling.py")
_DECODES = ("msgspec.json.decode", "msgspec.toml.decode", "msgspec.convert")


def _decoded() -> set[str]:
    """The names of the types that are decoded into where there may be several threads."""
    calls = [
        node
        for path in FILES
        if not name_of(path).startswith(_ALONE)
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _DECODES
    ]
    kinds = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "type"]
    kinds += [call.args[1] for call in calls if len(call.args) > 1]
    return {kind.id for kind in kinds if isinstance(kind, ast.Name)}


def test_each_struct_that_a_server_decodes_is_resolved() -> None:
    classes = [node for path in FILES for node in nodes(path) if isinstance(node, ast.ClassDef)]
    resolved = {
        node.name for node in classes if any(ast.unparse(decorator) == "resolved" for decorator in node.decorator_list)
    }
    structs = _decoded() & {node.name for node in classes}
    assert structs >= {"Installed", "ModelCard", "_Document", "LlamaFacts"}  # it sees something
    assert structs - resolved == set()
    # `profile.py` hands the type on.
    assert resolved >= {"Profile", "Waiting"}
