"""llama-server's `/props`, and what its routes share: none needs a `model`; without one the default is meant."""

from __future__ import annotations

import msgspec

from ocserve.api import fields, offer
from ocserve.api.dialect import Models
from ocserve.api.fields import Field, Values
from ocserve.api.openai_wire import dumps
from ocserve.modelcard import ServedModel

DEFAULT = "default"
MODEL = Field("model", "effective", fields.string(256, empty=False))


def model_of(values: Values, models: Models) -> ServedModel:
    """The model that the request names, else the default one."""
    return models(values.get("model", str) or DEFAULT)


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """What `/props` tells that only an engine knows; empty until the model has been loaded once."""

    chat_template: str = ""
    bos: str = ""
    eos: str = ""


def _defaults(model: ServedModel) -> dict[str, object]:
    """What holds where a request is silent, by llama-server's names."""
    return {
        "n_predict": offer.default_max_tokens(model),
        **{name: offer.default(model, name) for name in ("temperature", "top_k", "top_p", "min_p")},
        "repeat_penalty": offer.default(model, "repetition_penalty"),
    }


def props(model: ServedModel, properties: Properties, build: str) -> bytes:
    """`GET /props`. The file's path is nobody's business: its place takes the model's name."""
    return dumps(
        {
            "default_generation_settings": {"n_ctx": model.context_length, "params": _defaults(model)},
            "total_slots": model.parallel,
            "model_alias": model.id,
            "model_path": model.id,
            "modalities": {"vision": "image" in model.input_modalities, "audio": False},
            "chat_template": properties.chat_template,
            "bos_token": properties.bos,
            "eos_token": properties.eos,
            "build_info": build,
        }
    )
