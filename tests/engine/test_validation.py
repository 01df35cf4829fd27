"""The check of finished objects against independent validators, at its bounds, and in the loop."""

from __future__ import annotations

import copy
import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import GENERIC
from ocserve.engine import judging, llama
from ocserve.engine.answers import Answer, AnswerPlan, Promises
from ocserve.engine.constraint import GrammarCompiler
from ocserve.engine.formats import pattern
from ocserve.engine.judging import Judge, Verdict
from ocserve.engine.validation import Check, Unchecked, Validator, validator
from ocserve.errors import InvalidRequest
from ocserve.generation import (
    ChatPrompt,
    Failed,
    Finished,
    GenerateRequest,
    JsonConstraint,
    Message,
    Sampling,
    Tool,
    ToolChoice,
)
from tests import tiny
from tests.engine.schedules import Engine
from tests.engine.test_constraint import Walker, answer, compiler_of
from tests.engine.test_schema_suites import Compiling, accepts, cases, compiling, corpus, expected_exceptions

MOST = 1_000_000
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
# As small a difference as there may be between what is promised and what a wrong mask lets through.
OTHER_PLACE = {**PLACE, "properties": {**PLACE["properties"], "city": {"enum": ["Rome", "Bern"]}}}  # type: ignore[dict-item]


def holds(schema: Any, text: str) -> bool | None:
    return Check(Validator(json.dumps(schema)), text).run(MOST)


@pytest.fixture(scope="module")
def by_bytes(tiny_model: Path) -> Compiling:
    return compiling(tiny_model)


# --- against others -------------------------------------------------------------------------------------------------


def test_instances_of_the_suite_are_valid_where_it_says_so(by_bytes: Compiling, full: bool) -> None:
    """But for what answers never have, or formats being asserted: the exceptions that are listed for the masks."""
    ran, wrong = 0, set()
    for case in cases(full):
        try:
            by_bytes.guide(case.schema)
        except InvalidRequest:
            continue
        for test in case.tests:
            ran += 1
            if holds(case.schema, json.dumps(test["data"])) != test["valid"]:
                wrong.add((case.file, case.name, test["description"]))
    assert ran > (2000 if full else 200)
    assert wrong == expected_exceptions(wrong)


def changed(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, left out or added."""
    value = copy.deepcopy(value)
    part, place = value, None
    for _ in range(rng.randint(0, 4)):
        if not isinstance(part, dict | list) or not part:
            break
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        part, place = part[key], (part, key)
    if isinstance(part, dict) and rng.random() < 0.5:
        if part and rng.random() < 0.5:
            del part[rng.choice(list(part))]
        else:
            part[rng.choice(("id", "zz"))] = rng.choice((1, "x", None))
        return value
    other = rng.choice((0, 1, -1, 1.5, True, None, "", "x" * 300, "a@b.c", [], {}, [1], {"a": 1}, "2020-01-01"))
    if place is None:
        return other
    place[0][place[1]] = other
    return value


@pytest.mark.timeout(900)
def test_answers_to_schemas_from_practice_are_valid_where_another_validator_says_so(
    by_bytes: Compiling, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Walks under the masks, all valid, and changed ones. The other one takes numbers for doubles, so none is large."""
    rng, walks, valid, invalid = random.Random(1), 0, 0, 0
    for row in corpus(full):
        try:
            guide = by_bytes.guide(row["schema"])
        except InvalidRequest:
            continue
        mine = Validator(json.dumps(row["schema"]))
        other = jsonschema_rs.validator_for(row["schema"], validate_formats=True)
        try:
            ids = answer(guide, by_bytes.vocab, Walker(by_bytes.vocab, 1, free=10), limit=1500)
        except AssertionError:
            continue  # the walk did not end
        text = b"".join(map(by_bytes.vocab.piece, ids)).decode()
        assert Check(mine, text).run(MOST), row["id"]
        walks += 1
        if re.search(r"[0-9]{15}|[eE][+-]?[0-9]{2}", text):
            continue
        assert other.is_valid(json.loads(text)), row["id"]
        for _ in range(6):
            instance = changed(json.loads(text), rng)
            is_valid = Check(mine, json.dumps(instance)).run(MOST)
            assert is_valid == other.is_valid(instance), (row["id"], instance)
            valid, invalid = valid + bool(is_valid), invalid + (not is_valid)
    with capsys.disabled():
        print(f"\n{walks} walks valid; changed: {valid} valid, {invalid} not, as the other one has it", flush=True)
    assert min(walks, valid, invalid) >= (2000 if full else 40)


def test_white_space_of_patterns_is_ecmascripts_to_masks_and_check(by_bytes: Compiling) -> None:
    """The byte order mark is, the next-line control is not."""
    for written, spaces in ((r"^\s$", True), (r"^[^\S]$", True), (r"^\S$", False), (r"^[^\s]$", False)):
        guide = by_bytes.guide({"type": "string", "pattern": written})
        for character, is_space in (("\ufeff", True), ("\u00a0", True), ("\u0085", False), ("a", False)):
            text = f'"{character}"'
            assert accepts(by_bytes, guide, text.encode()) == (is_space == spaces), (written, character)
            assert holds({"pattern": written}, text) == (is_space == spaces), (written, character)


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_a_chain_of_references_with_exponentially_many_ways_takes_milliseconds() -> None:
    links = {f"s{i}": {"oneOf": [{"allOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2}, {"const": i}]} for i in range(60)}
    schema = {"$defs": {**links, "s60": {"type": "string"}}, "$ref": "#/$defs/s0"}
    check = Check(Validator(json.dumps(schema)), '"x"')
    begun = time.thread_time()
    assert check.run(MOST) is True
    assert time.thread_time() - begun < 0.1
    assert check.spent < 1000


def test_a_pattern_that_backtracks_takes_linear_time() -> None:
    begun = time.thread_time()
    assert holds({"pattern": "^(a+)+$"}, json.dumps("a" * 50_000 + "!")) is False
    assert holds({"pattern": "^(a|a?)+$"}, json.dumps("a" * 50_000)) is True
    assert time.thread_time() - begun < 0.5


def test_a_check_goes_on_where_it_stopped_and_counts_its_steps() -> None:
    rows = json.dumps([{"a": [index]} for index in range(500)])
    schema = json.dumps({"items": {"properties": {"a": {"items": {"type": "integer"}}}}})
    whole, sliced = Check(Validator(schema), rows), Check(Validator(schema), rows)
    assert whole.run(MOST) is True
    turns = 0
    while (verdict := sliced.run(50)) is None:
        turns += 1
    assert verdict is True
    assert turns > 20
    assert sliced.spent == whole.spent < 5000


def test_nesting_is_bounded_by_the_parser_only() -> None:
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert holds(schema, "[" * 900 + "]" * 900) is True
    assert holds(schema, "[" * 899 + "1" + "]" * 899) is False
    with pytest.raises(Unchecked):
        holds(schema, "[" * 100_000 + "]" * 100_000)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer"}, ["1", "1.0", "1e999999999999999999999", "9" * 5000], ["1.5", "true", "1e-3"]),
        ({"type": "number", "maximum": 1e308}, ["-1e999", "1e-99999999999999999999"], ["1e999", "null"]),
        ({"multipleOf": 0.01}, ["4.35", "1e500", "0e-9"], ["4.351", "1e-999999999"]),
        ({"multipleOf": 3}, ["9007199254740993", "3e40"], ["9007199254740994", "1e40"]),
        ({"const": 1}, ["1", "1.0", "10e-1"], ["true", '"1"', "[1]"]),
        ({"const": [{"a": 1, "b": True}]}, ['[{"b":true,"a":1.0}]'], ['[{"b":1,"a":1}]', "[]"]),
        ({"enum": [False, None, "a"]}, ["false", "null", '"a"'], ["0", '""', "true"]),
        ({"maxLength": 1}, [r'"\ud83d\ude00"', '"😀"', r'"\u0000"'], ['"e\u0301"']),
        ({"properties": {"a": {"type": "integer"}}}, ['{"a":1,"a":2}'], ['{"a":"x","a":1}', '{"a":1,"a":"x"}']),
        ({"minProperties": 2}, ['{"a":1,"b":1}'], ['{"a":1,"a":1}']),
        ({"exclusiveMinimum": True, "minimum": 1}, ["2"], ["1"]),
        ({"anyOf": [{"$ref": "#"}, {"type": "string"}]}, ['"x"'], ["1"]),
        ({"$schema": DRAFT_7, "$defs": {"a": {}}, "$ref": "#/$defs/a", "maximum": 1}, ["5"], []),
        ({"$defs": {"a/ b": {"type": "null"}}, "$ref": "#/$defs/a~1%20b"}, ["null"], ["1"]),
        ({"pattern": r"^\S[^\s]\u0041[[]$"}, ['"abA["'], ['"a\u00a0A["', '"abA"']),
        ({"pattern": r"^\p{Uppercase_Letter}\p{Script=Greek}$"}, ['"Éα"'], ['"éα"', '"Éa"']),
        ({}, ["1", " [] "], ["", "NaN", "-Infinity", "{]", "1 2", '"\n"']),
        (False, [], ["1"]),
    ],
)  # fmt: skip
def test_values_are_those_of_json(schema: Any, valid: list[str], invalid: list[str]) -> None:
    assert [text[:30] for text in valid if not holds(schema, text)] == []
    assert [text[:30] for text in invalid if holds(schema, text)] == []


def test_patterns_that_re2_does_not_know_are_left_to_the_mask() -> None:
    assert pattern("a{1,2000}") is None
    assert holds({"pattern": "^a{1,2000}$"}, '"b"') is True


# --- in the loop ----------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(model: llama.Model) -> Engine:
    return Engine(Path(), model=model)


@pytest.fixture(scope="module")
def compiler(model: llama.Model) -> GrammarCompiler:
    return compiler_of(model.vocab)


def promising(schema: object) -> AnswerPlan:
    return AnswerPlan(promises=Promises(validator(json.dumps(schema)), {}))


def submit(engine: Engine, compiler: GrammarCompiler, name: str, promised: object, masked: object, **rest: Any) -> None:
    guide = compiler.guide(JsonConstraint(schema=json.dumps(masked)))
    sampling = Sampling(temperature=1.0, seed=7, logit_bias={tiny.byte_token(byte): 6.0 for byte in b'Ro"}'})
    engine.submit(name, (40, 50), 100, guide=guide, plan=promising(promised), sampling=sampling, **rest)


def wait(engine: Engine, name: str) -> Finished | Failed:
    deadline = time.monotonic() + 20
    while (end := engine.end(name)) is None:
        assert time.monotonic() < deadline
        engine.run()
        time.sleep(0.002)
    return end


@pytest.mark.parametrize("at_once", [16_384, 0])
def test_an_object_that_a_wrong_mask_let_through_fails_and_others_end(
    engine: Engine, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """In place, and on the thread."""
    monkeypatch.setattr(judging, "_AT_ONCE_CHARS", at_once)
    only_bern = {**OTHER_PLACE, "properties": {"city": {"const": "Bern"}, "days": {"const": 1}}}
    submit(engine, compiler, "wrong", PLACE, only_bern, choices=2)
    submit(engine, compiler, "right", OTHER_PLACE, only_bern)
    failed, finished = wait(engine, "wrong"), wait(engine, "right")
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.status) == ("engine_failed", 500)
    assert failed.error.message == "The finished object does not satisfy the schema."
    assert isinstance(finished, Finished)
    assert finished.reason == "stop"
    assert json.loads(engine.text("right")) == {"city": "Bern", "days": 1}
    assert sum(isinstance(event, Finished | Failed) for event in engine.events["wrong"]) == 1
    engine.loop.turn(wait=False)
    assert engine.loop.stats().invalid_objects == 1
    engine.kv.drop_kept()
    assert engine.kv.cells == 0


def test_a_request_that_is_cancelled_or_fails_before_the_verdict_ends_once(
    engine: Engine, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_AT_ONCE_CHARS", 0)
    verdict, gate = judging._verdict, threading.Event()
    monkeypatch.setattr(judging, "_verdict", lambda *given: gate.wait(20) and verdict(*given))
    submit(engine, compiler, "left", PLACE, PLACE)
    engine.run()
    assert engine.end("left") is None  # it waits, and nothing else does
    engine.submit("beside", (40,), 5)
    engine.run()
    assert isinstance(engine.end("beside"), Finished)
    engine.loop.cancel("left")
    engine.run()
    end = engine.end("left")
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    gate.set()
    submit(engine, compiler, "after", PLACE, PLACE)
    assert wait(engine, "after").reason == "stop"  # type: ignore[union-attr]
    assert sum(isinstance(event, Finished | Failed) for event in engine.events["left"]) == 1


def test_what_a_stop_string_or_the_length_cut_is_not_checked(engine: Engine, compiler: GrammarCompiler) -> None:
    submit(engine, compiler, "stopped", PLACE, OTHER_PLACE, stop=('"days',))
    guide = compiler.guide(JsonConstraint(schema=json.dumps(PLACE)))
    engine.submit("short", (40,), 3, guide=guide, plan=promising(PLACE), sampling=Sampling(temperature=1.0))
    engine.run()
    ends = [engine.end("stopped"), engine.end("short")]
    assert [(end.reason, end.stop_sequence) for end in ends if isinstance(end, Finished)] == [
        ("stop", '"days'),
        ("length", None),
    ]


def request(**rest: Any) -> GenerateRequest:
    tools = (Tool(name="go", parameters=json.dumps(PLACE)), Tool(name="now"))
    prompt = ChatPrompt(messages=(Message(role="user", content="?"),), tools=tools)
    return GenerateRequest(request_id="r", model="m", prompt=prompt, sampling=Sampling(), max_tokens=9, **rest)


def test_every_call_of_an_answer_is_checked_against_its_tool() -> None:
    promises = Promises.of(request())
    assert promises is not None
    speech = Speech.of(GENERIC, None, {}, frozenset({0}))
    plan = AnswerPlan(speech, tools={"go": frozenset(), "now": frozenset()}, promises=promises)
    answer = plan.open(())
    for name, arguments in (("go", '{"city": "Bern", "days": 1}'), ("now", "{}"), ("go", '{"city":"Oslo","days":2}')):
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'
        for byte in text.encode():
            answer.feed(5, bytes([byte]))
    answer.finish()
    assert [Check(promised, text).run(MOST) for promised, text in answer.objects()] == [False, True, True]


def test_what_is_promised_follows_from_the_request() -> None:
    chosen = Promises.of(request(tool_choice=ToolChoice(mode="required", names=("now",))))
    assert chosen is not None
    assert (chosen.value, set(chosen.calls)) == (None, {"now"})
    both = Promises.of(request(constraint=JsonConstraint(), tool_choice=ToolChoice(mode="none")))
    assert both is not None
    assert both.value is not None
    assert Check(both.value, "{}").run(MOST) is True
    assert Check(both.value, "[]").run(MOST) is False
    assert Promises.of(request(tool_choice=ToolChoice(mode="none"))) is None
    assert type(AnswerPlan().open(())) is Answer  # and nothing is kept of what it tells


class Pending:
    """An answer whose object takes long to be checked."""

    id, deadline = "one", 1e12

    def __init__(self) -> None:
        values = {"anyOf": [{"type": "object", "properties": {name: {"type": "null"}}} for name in "abcdefgh"]}
        self.answer = self
        self.checked = validator(json.dumps({"type": "array", "items": values}))

    def objects(self) -> list[tuple[Validator, str]]:
        return [(self.checked, "[" + ",".join(['{"a":1,"b":1,"h":1}'] * 30_000) + "]")]


def test_an_answer_that_nobody_waits_for_keeps_nobody_waiting() -> None:
    judge, asked = Judge(lambda verdict: None), Pending()
    assert judge.ask(asked) is None  # type: ignore[arg-type]
    judge.dismiss("one")
    judge._thread.submit(lambda: None).result(timeout=1)


def test_a_check_ends_with_its_answers_time() -> None:
    told: list[Verdict] = []
    judge, asked = Judge(told.append), Pending()
    asked.deadline = 0.0
    assert judge.ask(asked) is None  # type: ignore[arg-type]
    judge._thread.submit(lambda: None).result(timeout=1)
    assert told[0].fault == "The finished object could not be checked against the schema."
