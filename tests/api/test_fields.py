"""P7: every malformed body is a 400 that names the exact parameter. Generated from the parameter tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ocserve.api import json_body, openai_chat, openai_completions
from ocserve.errors import ApiError, InvalidRequest
from tests.api import mutations
from tests.api.mutations import Case
from tests.http.harness import CHAT, COMPLETION, MODEL


def models(name: str) -> Any:
    if MODEL.answers_to(name):
        return MODEL
    raise InvalidRequest("no such model", param="model", code="model_not_found")


PARSERS = {"/v1/chat/completions": openai_chat.parse, "/v1/completions": openai_completions.parse}
CASES = [
    *mutations.bodies("/v1/chat/completions", CHAT, mutations.CHAT),
    *mutations.bodies("/v1/completions", COMPLETION, mutations.COMPLETION),
    *mutations.message_cases("/v1/chat/completions"),
]


def refusal(case: Case) -> ApiError | None:
    try:
        json_body.check_shape(case.body, 64)
        PARSERS[case.path](case.body, models, refuse_unknown=True)
    except ApiError as error:
        return error
    return None


def test_the_oracle_has_every_parameter_of_the_tables() -> None:
    assert set(mutations.CHAT) == {field.name for field in openai_chat.PARAMETERS}
    assert set(mutations.COMPLETION) == {field.name for field in openai_completions.PARAMETERS}


def test_every_field_with_every_invalid_value_is_refused_by_name() -> None:
    wrong = []
    for case in CASES:
        error = refusal(case)
        if error is None:
            wrong.append((case.body[:120], "accepted"))
        elif error.info.status != 400 or not error.message or not error.code:
            wrong.append((case.body[:120], error.info))
        elif case.param is not ... and not (error.param or "").startswith(case.param):
            wrong.append((case.body[:120], error.param))
    per_field = {
        (case.path, case.param): sum(case.param == other.param and case.path == other.path for other in CASES)
        for case in CASES
        if case.param in mutations.CHAT or case.param in mutations.COMPLETION
    }
    print(f"{len(CASES)} cases over {len(per_field)} fields, {min(per_field.values())} or more by-value mutations each")
    assert not wrong, wrong[:10]
    assert len(CASES) >= 3000
    assert min(per_field.values()) >= 12


@pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_every_valid_value_of_the_pool_is_accepted(path: str, base: dict[str, Any]) -> None:
    oracle = mutations.CHAT if base is CHAT else mutations.COMPLETION
    accepted = 0
    for name, valid in oracle.items():
        for text in mutations.POOL:
            value = json.loads(text)
            if valid(value):
                error = refusal(Case(path, json.dumps({**base, name: value}).encode(), ...))
                assert error is None, (name, text, error)
                accepted += 1
    assert accepted > 150


@pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_null_means_absent_everywhere(path: str, base: dict[str, Any]) -> None:
    oracle = mutations.CHAT if base is CHAT else mutations.COMPLETION
    required = {"model", "messages", "prompt"}
    nulls = {name: None for name in oracle if name not in required}
    assert refusal(Case(path, json.dumps({**base, **nulls}).encode(), ...)) is None
    for name in required & set(base):
        error = refusal(Case(path, json.dumps({**base, name: None}).encode(), ...))
        assert error is not None
        assert (error.code, error.param) == ("missing_required_parameter", name)


def parse(**extra: Any) -> Any:
    return openai_chat.parse(json.dumps({**CHAT, **extra}).encode(), models, refuse_unknown=True)


def refused(**extra: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**extra)
    return caught.value


def test_a_range_error_reads_as_openai_writes_it() -> None:
    error = refused(temperature=200)
    assert error.message == (
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 200 instead."
    )
    assert (error.code, error.param) == ("decimal_above_max_value", "temperature")


def test_an_unknown_parameter_is_named_with_its_nearest_neighbour() -> None:
    error = refused(temprature=1)
    assert (error.code, error.param) == ("unknown_parameter", "temprature")
    assert "'temperature'" in error.message


def test_a_parameter_name_that_is_not_one_is_never_repeated() -> None:
    error = refused(**{"canary secret\n": 1})
    assert "canary" not in error.message
    assert error.param is None


def test_unknown_parameters_may_be_made_advisory() -> None:
    body = json.dumps({**CHAT, "frobnicate": 1}).encode()
    parsed = openai_chat.parse(body, models, refuse_unknown=False)
    assert parsed.ignored == ("frobnicate",)


def test_advisory_parameters_are_accepted_and_reported() -> None:
    parsed = parse(user="u", metadata={"a": "b"}, service_tier="auto", store=False)
    assert parsed.ignored == ("user", "metadata", "service_tier", "store")


def test_stop_strings_never_appear_in_messages() -> None:
    error = refused(stop=["canary" * 50])
    assert "canary" not in error.message
    assert error.param == "stop[0]"


def test_max_tokens_above_the_published_maximum_names_the_field_that_was_sent() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = refused(**{name: 4097})
        assert error.param == name
        assert "<= 4096" in error.message
    assert refused(max_tokens=5, max_completion_tokens=6).param == "max_tokens"
    assert parse(max_tokens=5, max_completion_tokens=5).request.max_tokens == 5
    assert parse().request.max_tokens == MODEL.default_output_tokens


def test_silent_sampling_fields_take_the_models_defaults() -> None:
    sampling = parse(top_p=0.5).request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.2, 40, 0.5)
    assert parse(temperature=0, top_k=0).request.sampling.temperature == 0
    assert parse(top_k=0).request.sampling.top_k == 0


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("tools", [{}], "[] or null"),
        ("tool_choice", "required", '"none" or "auto" or null'),
        ("store", True, "false or null"),
        ("audio", {}, "null"),
    ],
)
def test_what_is_not_supported_says_so_and_what_asks_for_nothing_in_json(
    name: str, value: object, accepted: str
) -> None:
    error = refused(**{name: value})
    assert error.message == f"'{name}' is not supported yet by this server. Accepted: {accepted}."
    assert (error.code, error.param) == ("unsupported_parameter", name)


def test_n_asks_for_choices_and_best_of_for_no_more_than_those() -> None:
    def completion(**extra: Any) -> Any:
        return openai_completions.parse(json.dumps({**COMPLETION, **extra}).encode(), models, refuse_unknown=True)

    assert parse().request.choices == 1
    assert parse(n=16).request.choices == 16
    assert refused(n=17).code == "integer_above_max_value"
    assert completion(n=3).request.choices == 3
    assert completion(n=3, best_of=3).request.choices == 3
    for extra in ({"best_of": 2}, {"n": 2, "best_of": 1}, {"n": 2, "best_of": 3}):
        with pytest.raises(InvalidRequest) as caught:
            completion(**extra)
        assert (caught.value.param, caught.value.code) == ("best_of", "unsupported_parameter")


def test_completion_prompts_are_text_or_tokens_and_only_one() -> None:
    def prompt(value: Any) -> Any:
        body = json.dumps({"model": "tiny", "prompt": value}).encode()
        return openai_completions.parse(body, models, refuse_unknown=True).request.prompt

    assert prompt("a").text == "a"
    assert prompt(["a"]).text == "a"
    assert prompt([1, 2]).tokens == (1, 2)
    assert prompt([[1, 2]]).tokens == (1, 2)
    for value, param in [
        (["a", "b"], "prompt"),
        ([[1], [2]], "prompt"),
        ([1, "a"], "prompt[1]"),
        ([[1, True]], "prompt[0][1]"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            prompt(value)
        assert caught.value.param == param
