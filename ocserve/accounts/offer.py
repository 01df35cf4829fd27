"""The models as one caller finds them: those that the key may use, and no trace of others."""

from __future__ import annotations

from ocserve.accounts.keys import Caller
from ocserve.errors import InvalidRequest, ModelNotFound
from ocserve.modelcard import ServedModel


class Offer:
    """What `caller` may use of the models served, of which the first is the default."""

    def __init__(self, caller: Caller, served: tuple[ServedModel, ...]) -> None:
        self.models = tuple(model for model in served if caller.may_use(model))
        self._has_default = bool(self.models) and self.models[0] is served[0]

    def model(self, name: str) -> ServedModel:
        """The model that answers to `name`; raises `ModelNotFound`."""
        named = next((model for model in self.models if model.id == name), None)  # before any alias
        found = named or next((model for model in self.models if model.answers_to(name)), None)
        if found is not None:
            return found
        always = f"; `{self.models[0].id}` and `default` always work" if self._has_default else ""
        raise ModelNotFound(
            "The model named in the request does not exist here, or this key may not use it. GET /v1/models lists what "
            f"it may use{always}.",
            param="model",
        )

    def generator(self, name: str) -> ServedModel:
        """As `model`; raises `InvalidRequest` for a model that does not generate."""
        model = self.model(name)
        if not {"chat", "completion"} & set(model.capabilities):
            raise InvalidRequest(
                f"The model {model.id} does not generate text. GET /v1/models lists what each model does.",
                param="model",
                code="model_not_capable",
            )
        return model
