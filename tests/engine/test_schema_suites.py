"""The JSON Schema test suite and a corpus of schemas from practice against what answers are held to.

The short form takes samples that are part of the tests; `--full` takes all of both where they are:
`OCSERVE_TEST_SCHEMAS` names a folder with `json-schema-test-suite` (its `draft7` and `draft2020-12`) and
`jsonschemabench` (lines of `{"id", "schema"}`).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from ocserve.engine.constraint import GrammarCompiler, Guide, GuideError
from ocserve.engine.llama import LoadLog, Model, Vocab
from ocserve.errors import InvalidRequest
from ocserve.generation import JsonConstraint

DATA = Path(__file__).parent.parent / "data" / "schemas"
EXCEPTIONS: list[dict[str, Any]] = json.loads((DATA / "exceptions.json").read_text(encoding="utf-8"))
DRAFTS = {"draft7": "http://json-schema.org/draft-07/schema#", "draft2020-12": None}
DRAFT = re.compile(r'"\$ref": "https?://json-schema.org/')
MOST_ORDERS = 200


@dataclass(frozen=True)
class Case:
    """A schema of the test suite with its instances."""

    file: str
    name: str
    schema: Any
    tests: list[dict[str, Any]]


def folder(full: bool) -> Path | None:
    """Where all of the data is; None for the samples."""
    named = os.environ.get("OCSERVE_TEST_SCHEMAS")
    if full and named is None:
        pytest.skip("--full takes all schemas: OCSERVE_TEST_SCHEMAS must name their folder")
    return Path(named) if full and named is not None else None


def lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as rows:
        return [json.loads(row) for row in rows]


def cases(full: bool) -> Iterator[Case]:
    root = folder(full)
    if root is None:
        rows = iter(lines(DATA / "suite.jsonl"))
    else:
        suite = root / "json-schema-test-suite"
        files = (file for draft in DRAFTS for file in sorted((suite / draft).rglob("*.json")))
        rows = (
            {"file": str(file.relative_to(suite)), "case": case}
            for file in files
            for case in json.loads(file.read_text(encoding="utf-8"))
        )
    for row in rows:
        case, dialect = row["case"], DRAFTS[row["file"].split("/")[0]]
        schema = case["schema"]
        if dialect is not None and isinstance(schema, dict):
            schema = {"$schema": dialect, **schema}  # which the suite says by the folder
        yield Case(row["file"], case["description"], schema, case["tests"])


def corpus(full: bool) -> list[dict[str, Any]]:
    root = folder(full)
    files = [DATA / "glaive.jsonl"] if root is None else sorted((root / "jsonschemabench").glob("*.jsonl"))
    return [row for file in files for row in lines(file)]


@dataclass(frozen=True)
class Compiling:
    vocab: Vocab
    compiler: GrammarCompiler
    by_byte: dict[bytes, int]  # the token of each byte, where there is one

    def guide(self, schema: Any) -> Guide:
        return self.compiler.guide(JsonConstraint(schema=json.dumps(schema)))

    def compiles_unbounded(self, schema: Any) -> bool:
        """Whether llguidance takes the schema as it is, with its own limits and none of ours."""
        matcher = LLMatcher(self.compiler._tokenizer, json.dumps({"grammars": [{"json_schema": schema}]}), log_level=0)
        return not matcher.is_error()


def compiling(path: Path) -> Compiling:
    log = LoadLog()
    vocab = Model(str(path), gpu_layers=0, log=log).vocab
    log.close()
    compiler = GrammarCompiler(vocab, lambda text: vocab.tokenize(text, parse_special=False))
    compiler.build()
    return Compiling(vocab, compiler, {piece: token for token, piece in enumerate(vocab.pieces()) if len(piece) == 1})


@pytest.fixture(scope="module")
def by_bytes(tiny_model: Path) -> Compiling:
    """With a vocabulary that has a token for each byte."""
    return compiling(tiny_model)


def orders(value: Any) -> Iterator[Any]:
    """The value with the properties of its objects in any order: answers have them in one, the schema's."""
    if isinstance(value, dict):
        parts = [list(itertools.islice(orders(each), 24)) for each in value.values()]
        for order in itertools.permutations(range(len(value))):
            for chosen in itertools.product(*(parts[index] for index in order)):
                yield {list(value)[index]: each for index, each in zip(order, chosen, strict=True)}
    elif isinstance(value, list):
        yield from map(list, itertools.product(*(itertools.islice(orders(each), 24) for each in value)))
    else:
        yield value


def accepts(compiled: Compiling, start: Guide, text: bytes) -> bool:
    """Whether the masks let this be written, byte by byte, and the answer end behind it."""
    vocab, guide = compiled.vocab, start.copy()
    logits = np.empty(vocab.size, np.float32)
    try:
        while text:
            forced = guide.forced()
            taken = forced or [compiled.by_byte[text[:1]]]
            written = b"".join(vocab.piece(token) for token in taken)
            if not text.startswith(written):
                return False
            logits.fill(0)
            guide.apply(logits)
            if logits[taken[0]] != 0:
                with pytest.raises(GuideError):
                    guide.accept(taken[0])
                return False
            for token in taken:
                guide.accept(token)
            text = text[len(written) :]
        return guide.may_end
    finally:
        guide.close()


def accepted(compiled: Compiling, start: Guide, instance: Any) -> bool:
    return any(
        accepts(compiled, start, json.dumps(each, ensure_ascii=False, separators=(",", ":")).encode())
        for each in itertools.islice(orders(instance), MOST_ORDERS)
    )


def check_refusal(compiled: Compiling, schema: Any, error: InvalidRequest) -> None:
    """It names a keyword that is in the schema, or says that nothing satisfies it, and llguidance refuses it too.

    The one exception is what llguidance would take and not hold to: the least number of properties of any names.

    llguidance has the drafts' own schemas, so that the keyword may be in the one that `$ref` refers to.
    """
    assert (error.status, error.param) == (400, "response_format.json_schema.schema")
    keywords = [word for word in re.findall(r"'([^']*)'", error.message) if word != error.param]
    document = json.dumps(schema)
    named = any(f'"{keyword}"' in document for keyword in keywords) or (keywords and DRAFT.search(document))
    assert named or "no value" in error.message, error.message
    unsound = "'minProperties' is supported up to" in error.message
    assert unsound or not compiled.compiles_unbounded(schema), error.message


def expected_exceptions(ran: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    listed = {
        (file, case, test)
        for group in EXCEPTIONS
        for file, named in group["instances"].items()
        for case, tests in named.items()
        for test in tests
    }
    return listed & ran


@pytest.mark.timeout(600)
def test_masks_accept_the_valid_instances_of_the_suite_and_no_others(
    by_bytes: Compiling, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter()
    ran, exceptions = set(), set()
    for case in cases(full):
        counts["schemas"] += 1
        try:
            start = by_bytes.guide(case.schema)
        except InvalidRequest as error:
            counts["refused schemas"] += 1
            check_refusal(by_bytes, case.schema, error)
            if "no value" in error.message:
                assert not any(test["valid"] for test in case.tests), case
            continue
        for test in case.tests:
            place = (case.file, case.name, test["description"])
            ran.add(place)
            was_accepted = accepted(by_bytes, start, test["data"])
            counts[f"{'valid' if test['valid'] else 'invalid'} {'accepted' if was_accepted else 'refused'}"] += 1
            if was_accepted != test["valid"]:
                exceptions.add(place)
    with capsys.disabled():
        print(f"\n{dict(counts)}, {len(exceptions)} listed exceptions", flush=True)
    assert counts["valid accepted"] > 10 * counts["valid refused"]
    assert exceptions == expected_exceptions(ran)


@pytest.mark.timeout(600)
def test_schemas_from_practice_compile_in_milliseconds_or_are_refused_by_keyword(
    smollm2: Path, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled, took, refusals = compiling(smollm2), [], Counter[str]()
    rows = corpus(full)
    for row in rows:
        begun = time.thread_time()  # of this thread; a busy machine does not count
        try:
            compiled.guide(row["schema"])
        except InvalidRequest as error:
            refusals[error.message.partition(": ")[2]] += 1
            check_refusal(compiled, row["schema"], error)
        else:
            took.append(time.thread_time() - begun)
    p50, p95, p99, worst = (1000 * float(np.quantile(took, share)) for share in (0.5, 0.95, 0.99, 1))
    with capsys.disabled():
        print(
            f"\n{len(took)} of {len(rows)} schemas accepted; compiled in ms of CPU: p50 {p50:.1f}, p95 {p95:.1f}, "
            f"p99 {p99:.1f}, most {worst:.1f}; refused: {dict(refusals.most_common())}",
            flush=True,
        )
    assert len(took) >= (0.93 if full else 0.83) * len(rows)
    assert worst < 2000
