"""How Ollama's clients find models: which there are, which are loaded, how long a prompt may be, what each can do."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.api import fields, json_body, offer, ollama_request
from ocserve.api.dialect import Models
from ocserve.api.fields import Field
from ocserve.api.ollama_wire import dumps, error_body, timestamp
from ocserve.errors import InvalidRequest
from ocserve.modelcard import Capability, ServedModel

__all__ = ["SHOW", "error_body", "listing", "running", "show", "version"]

# The level of Ollama's interface that is spoken here: clients refuse a server that is too old for tools and thinking
# (VS Code one before 0.6.4).
_VERSION = "0.12.11"
_NEVER = "9999-12-31T23:59:59Z"
_CAPABILITIES: dict[Capability, str] = {
    "completion": "completion",
    "tools": "tools",
    "fim": "insert",
    "vision": "vision",
    "embedding": "embedding",
    "reasoning": "thinking",
}
SHOW: tuple[Field, ...] = (
    Field("model", "effective", ollama_request.MODEL),
    Field("name", "effective", ollama_request.MODEL),  # what `model` was called at first
    Field("verbose", "advisory", fields.boolean()),
    Field("system", "unsupported", ollama_request.TEXT, neutral=("",)),
    Field("template", "unsupported", ollama_request.TEXT, neutral=("",)),
    Field("options", "advisory", fields.pairs(64)),
)
_TABLE = fields.table(*SHOW)


def version() -> bytes:
    """`GET /api/version`."""
    return dumps({"version": _VERSION})


def listing(models: Iterable[ServedModel]) -> bytes:
    """`GET /api/tags`."""
    return dumps({"models": [{**_head(model), "modified_at": timestamp(model.created)} for model in models]})


def running(models: Iterable[tuple[ServedModel, bool]]) -> bytes:
    """`GET /api/ps`: the models in memory, each with whether that is a GPU's."""
    return dumps(
        {
            "models": [
                {
                    **_head(model),
                    "expires_at": _NEVER,
                    "size_vram": model.size_bytes if on_gpu else 0,
                    "context_length": model.context_length,
                }
                for model, on_gpu in models
            ]
        }
    )


def show(body: bytes, models: Models, *, refuse_unknown: bool) -> tuple[bytes, tuple[str, ...]]:
    """`POST /api/show`: the answer to the request in `body`, and the names of what was ignored."""
    values = fields.read(json_body.decode(body), _TABLE, refuse_unknown=refuse_unknown)
    name = values.get("model", str) or values.get("name", str)
    if name is None:
        raise fields.missing("model")
    if {values.get("model", str), values.get("name", str)} - {name, None}:
        raise InvalidRequest("'model' and 'name' are two names of one thing; their values differ.", param="name")
    return dumps(_shown(ollama_request.model_of(name, models))), values.ignored


def _head(model: ServedModel) -> dict[str, object]:
    return {
        "name": model.id,
        "model": model.id,
        "size": model.size_bytes,
        "digest": model.digest or "",
        "details": _details(model),
    }


def _details(model: ServedModel) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.card.family,
        "families": [model.card.family],
        "parameter_size": _parameter_size(model.card.parameters),
        "quantization_level": model.quantisation,
    }


def _parameter_size(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _shown(model: ServedModel) -> dict[str, object]:
    """Clients size their prompts by the context that is served, so that is the one told, not the trained one."""
    architecture = model.architecture or model.card.family
    return {
        "license": model.card.license,
        "modelfile": "",
        "parameters": _parameters(model),
        # Clients look for `.Suffix` to see whether the model fills in the middle.
        "template": "{{ .Prompt }}{{ .Suffix }}" if "fim" in model.capabilities else "{{ .Prompt }}",
        "details": _details(model),
        "model_info": {
            "general.architecture": architecture,
            "general.basename": model.card.title,
            "general.parameter_count": model.card.parameters,
            f"{architecture}.context_length": model.context_length,
        },
        "capabilities": [word for capability, word in _CAPABILITIES.items() if capability in model.capabilities],
        "modified_at": timestamp(model.created),
    }


def _parameters(model: ServedModel) -> str:
    """The options that hold where a request is silent, a line each."""
    words = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    defaults = {word: offer.default(model, name) for name, word in words.items()}
    lines = {
        "num_ctx": model.context_length,
        "num_predict": offer.default_max_tokens(model),
        **defaults,
        "repeat_penalty": offer.default(model, "repetition_penalty"),
    }
    return "\n".join(f"{name:<30} {value}" for name, value in lines.items())
