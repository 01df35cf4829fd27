"""Which model a name means, for whom: a model that a key may not use does not exist for it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ocserve.accounts.keys import Caller
from ocserve.accounts.offer import Offer
from ocserve.errors import InvalidRequest, ModelNotFound
from tests.http.harness import MODEL

OTHER = replace(MODEL, id="other", aliases=("tiny", "o"), capabilities=("embedding",))  # an alias never wins over an id


def offer(*models: str) -> Offer:
    return Offer(Caller("key", b"", anonymous=False, models=models), (MODEL, OTHER))


def refused(made: Offer, name: str) -> str:
    with pytest.raises(ModelNotFound) as refusal:
        made.model(name)
    assert refusal.value.param == "model"
    return refusal.value.message


def test_only_served_names_find_a_model() -> None:
    assert offer().model(MODEL.id) is MODEL
    message = refused(offer(), "secret-name")
    assert "secret-name" not in message
    assert "`default` always work" in message


def test_an_id_wins_over_another_models_alias() -> None:
    assert [offer().model(name).id for name in ("tiny", "default", "other", "o")] == ["tiny", "tiny", "other", "other"]
    assert [model.id for model in offer().models] == ["tiny", "other"]


@pytest.mark.parametrize("named", ["other", "o"])
def test_a_model_that_a_key_may_not_use_is_one_that_does_not_exist(named: str) -> None:
    made = offer(named)
    assert made.models == (OTHER,)
    assert made.model("o") is OTHER
    assert refused(made, "org/tiny:135m") == refused(made, "default") == refused(made, "nothing-of-this-name")
    assert "tiny" not in refused(made, "default")


def test_a_key_for_models_that_are_not_served_has_none() -> None:
    assert offer("gone").models == ()
    refused(offer("gone"), "default")


def test_who_wants_text_needs_a_model_that_generates() -> None:
    with pytest.raises(InvalidRequest, match="other does not generate"):
        offer().generator("other")
