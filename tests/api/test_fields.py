"""P7: every malformed body is a 400 that names the exact parameter. Generated from the parameter tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from ocserve.api import fields, json_body, openai_chat, openai_completions
from ocserve.errors import ApiError, InvalidRequest
from ocserve.generation import FillPrompt, Sampling, TextPrompt, TokenPrompt
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


def about(error: ApiError, param: str) -> bool:
    """Whether the error names the parameter, or something inside it."""
    named = error.param or ""
    return named == param or named.startswith((f"{param}.", f"{param}["))


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
        elif case.param is not ... and not about(error, case.param):
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


CAPABLE = replace(
    MODEL, capabilities=(*MODEL.capabilities, "reasoning", "vision", "tools"), input_modalities=("text", "image")
)


def capable(case: Case) -> ApiError | None:
    """The refusal by a model that sees and reasons."""
    try:
        openai_chat.parse(case.body, lambda name: CAPABLE, refuse_unknown=True)
    except ApiError as error:
        return error
    return None


def test_every_field_of_every_object_inside_a_request_with_every_invalid_value_is_refused_by_its_path() -> None:
    counts: dict[str, int] = {}
    for table in mutations.TABLES:
        for where, case in mutations.nested(table, CHAT, valid=False):
            error = capable(case)
            assert error is not None, case.body
            assert error.status == 400
            assert about(error, where), (case.body, error.param)
            counts[where] = counts.get(where, 0) + 1
    print(f"{sum(counts.values())} cases over {len(counts)} nested fields, {min(counts.values())} or more each")
    assert len(counts) > 60
    assert min(counts.values()) >= 12


def test_every_valid_value_inside_an_object_is_accepted() -> None:
    accepted = 0
    for table in mutations.TABLES:
        for _, case in mutations.nested(table, CHAT, valid=True):
            error = capable(case)
            # Of two calls that name nothing, and of no call at all, other fields may complain.
            assert error is None, (case.body, error)
            accepted += 1
    assert accepted > 200


def test_the_nested_oracle_has_every_parameter_of_the_nested_tables() -> None:
    """Tables are found from the parameters themselves, so that one that is added is missed here."""
    known: dict[str, set[str]] = {}
    for table in mutations.TABLES:
        known.setdefault(table.path.replace("[0]", ""), set()).update(table.oracle)
    pending = [(field.name, field.of) for field in openai_chat.PARAMETERS if field.of]
    seen = 0
    while pending:
        path, table = pending.pop()
        assert known[path] == set(table), path
        seen += 1
        pending += [(f"{path}.{field.name}", field.of) for field in table.values() if field.of]
    assert seen >= 11


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
    parsed = parse(user="u", metadata={"a": "b"}, service_tier="auto", store=False, verbosity="low")
    assert parsed.ignored == ("user", "metadata", "store", "verbosity")


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
        ("functions", [{}], "[] or null"),
        ("function_call", {"name": "f"}, '"none" or "auto" or null'),
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


def completion(**extra: Any) -> Any:
    return openai_completions.parse(json.dumps({**COMPLETION, **extra}).encode(), models, refuse_unknown=True)


def completion_refused(**extra: Any) -> ApiError:
    with pytest.raises(InvalidRequest) as caught:
        completion(**extra)
    return caught.value


def test_n_asks_for_choices_and_best_of_for_more_to_choose_from() -> None:
    assert parse().request.choices == 1
    assert parse(n=16).request.choices == 16
    assert refused(n=17).code == "integer_above_max_value"
    assert completion(n=3).request.choices == 3
    assert completion(n=3, best_of=3).request.logprobs is None
    best = completion(n=2, best_of=5).request
    assert (best.choices, best.logprobs) == (5, 0)
    assert completion(best_of=5, logprobs=2).request.logprobs == 2
    assert completion_refused(n=2, best_of=1).param == "best_of"
    assert completion_refused(best_of=2, stream=True).param == "best_of"


def test_completion_prompts_are_texts_or_tokens() -> None:
    def prompts(value: Any) -> Any:
        return [request.prompt for request in completion(prompt=value).requests]

    assert prompts("a") == prompts(["a"]) == [TextPrompt(text="a")]
    assert prompts([1, 2]) == prompts([[1, 2]]) == [TokenPrompt(tokens=(1, 2))]
    assert prompts(["a", "", "b"]) == [TextPrompt(text="a"), TextPrompt(text=""), TextPrompt(text="b")]
    assert prompts([[1], [2, 3]]) == [TokenPrompt(tokens=(1,)), TokenPrompt(tokens=(2, 3))]
    for value, param in [
        (["a", 1], "prompt[1]"),
        (["a", None], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1, True]], "prompt[0][1]"),
        (["a"] * 257, "prompt"),
    ]:
        assert completion_refused(prompt=value).param == param


def test_a_suffix_makes_a_prompt_to_be_filled_in() -> None:
    assert completion(prompt="a", suffix="b").request.prompt == FillPrompt(prefix="a", suffix="b")
    assert completion(prompt="a", suffix="").request.prompt == TextPrompt(text="a")
    assert completion_refused(prompt=["a", "b"], suffix="c").param == "suffix"
    assert completion_refused(prompt=[1], suffix="c").param == "suffix"
    assert completion_refused(prompt="a", suffix="c", echo=True).param == "echo"


def test_echo_asks_for_the_chances_of_the_prompt_only_where_they_are_told() -> None:
    assert completion(echo=True).request.prompt_logprobs is None
    assert completion(logprobs=2).request.prompt_logprobs is None
    both = completion(echo=True, logprobs=2, max_tokens=0).request
    assert (both.prompt_logprobs, both.logprobs, both.max_tokens) == (2, 2, 0)
    assert completion(prompt=[1, 2], echo=True).request.prompt_logprobs == 0  # to know the text


def test_every_sampler_reaches_the_engine() -> None:
    given = {
        "top_a": 0.1,
        "typical_p": 0.9,
        "top_n_sigma": 1.5,
        "repeat_last_n": 64,
        "repetition_penalty": 1.1,
        "dynatemp_range": 0.5,
        "dynatemp_exponent": 2.0,
        "dry_multiplier": 0.8,
        "dry_base": 2.0,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": 100,
        "dry_sequence_breakers": ["\n", "x"],
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "mirostat": 2,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
    }
    assert parse(**given).request.sampling == Sampling(
        temperature=0.2,
        top_k=40,
        top_a=0.1,
        typical_p=0.9,
        top_n_sigma=1.5,
        penalty_window=64,
        repetition_penalty=1.1,
        dynamic_range=0.5,
        dynamic_exponent=2.0,
        dry_multiplier=0.8,
        dry_base=2.0,
        dry_allowed_length=3,
        dry_window=100,
        dry_breakers=("\n", "x"),
        xtc_probability=0.5,
        xtc_threshold=0.2,
        mirostat=2,
        mirostat_tau=4.0,
        mirostat_eta=0.2,
    )
    neutral = parse(repeat_last_n=-1, top_n_sigma=-1).request.sampling
    assert (neutral.penalty_window, neutral.top_n_sigma) == (None, 0)


def test_llama_servers_spelling_of_a_parameter_is_the_same_parameter() -> None:
    assert parse(repeat_penalty=1.3).request.sampling.repetition_penalty == 1.3
    assert refused(repeat_penalty=3).param == "repeat_penalty"
    assert refused(repeat_penalty=1.3, repetition_penalty=1.3).param == "repetition_penalty"


def test_lengths_are_counted_in_characters_as_the_reference_means_them() -> None:
    read = fields.string(3)
    assert read("🙂🙂🙂", "user") == "🙂🙂🙂"
    with pytest.raises(InvalidRequest, match="3 characters, but got 4"):
        read("🙂🙂🙂🙂", "user")
