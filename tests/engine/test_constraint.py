"""Constrained decoding on real vocabularies: what the grammar lets through is JSON that the schema describes."""

from __future__ import annotations

import functools
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from ocserve.engine import llama
from ocserve.engine.constraint import GrammarCompiler, Guide, GuideError, alone
from ocserve.errors import InvalidRequest
from ocserve.generation import JsonConstraint
from tests import tiny

SCHEMAS = Path(__file__).parent.parent / "data" / "schemas"
WALKS: list[Any] = json.loads((SCHEMAS / "walks.json").read_text(encoding="utf-8"))
MEASURED = {
    name: json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8")) for name in ("short", "medium", "long")
}
FORMATS = jsonschema.FormatChecker()
Choose = Callable[[np.ndarray[Any, Any], int], int]


def load(path: Path) -> llama.Vocab:
    log = llama.LoadLog()
    model = llama.Model(str(path), gpu_layers=0, log=log)
    log.close()
    return model.vocab


def compiler_of(vocab: llama.Vocab) -> GrammarCompiler:
    return GrammarCompiler(vocab, lambda text: vocab.tokenize(text, parse_special=False))


@pytest.fixture(scope="module")
def vocab(smollm2: Path) -> llama.Vocab:
    return load(smollm2)


@pytest.fixture(scope="module")
def compiler(vocab: llama.Vocab) -> GrammarCompiler:
    compiler = compiler_of(vocab)
    compiler.build()
    return compiler


@pytest.fixture(scope="module")
def tiny_compiler(tiny_model: Path) -> GrammarCompiler:
    return compiler_of(load(tiny_model))


def guide(compiler: GrammarCompiler, schema: object) -> Guide:
    return compiler.guide(JsonConstraint(schema=json.dumps(schema)))


def allowed(guide: Guide, vocab: llama.Vocab) -> np.ndarray[Any, Any]:
    logits = np.zeros(vocab.size, np.float32)
    guide.apply(logits)
    return np.flatnonzero(logits == 0)


@functools.cache
def closing(vocab: llama.Vocab) -> np.ndarray[Any, Any]:
    """Tokens that bring a value to its end, the best first."""
    by_piece = {piece: token for token, piece in reversed(list(enumerate(vocab.pieces())))}
    ends = [token for token in range(vocab.size) if vocab.is_end(token)]
    pieces = (b'"', b"@", b"}", b"]", b"null", b"0")  # a quote first: brackets are letters within a string
    return np.array([*ends, *(by_piece[piece] for piece in pieces if piece in by_piece)])


class Walker:
    """Draws any allowed token at first, then mostly those that bring the value to its end."""

    def __init__(self, vocab: llama.Vocab, seed: int, free: int = 24) -> None:
        self._random = random.Random(seed)
        self._free = free
        self._closing = closing(vocab)

    def __call__(self, tokens: np.ndarray[Any, Any], step: int) -> int:
        if step >= self._free and self._random.random() < 0.8:
            usable = self._closing[np.isin(self._closing, tokens)]
            if usable.size:
                return int(usable[0])
        return int(tokens[self._random.randrange(tokens.size)])


def answer(guide: Guide, vocab: llama.Vocab, choose: Choose, *, bulk: bool = True, limit: int = 3000) -> list[int]:
    """The ids of one whole answer without its end token; `bulk` takes forced runs at once, else one per look."""
    ids: list[int] = []
    sampled = 0
    while len(ids) < limit:
        if guide.finished:
            return ids
        forced = guide.forced()
        if forced:
            taken = forced if bulk else forced[:1]
        else:
            taken = [choose(allowed(guide, vocab), sampled)]
            sampled += 1
            if vocab.is_end(taken[0]):
                assert guide.may_end
                guide.accept(taken[0])
                assert guide.finished
                return ids
        for token in taken:
            guide.accept(token)
        ids += taken
    raise AssertionError("the walk did not end")


def text_of(vocab: llama.Vocab, ids: list[int]) -> str:
    return b"".join(vocab.piece(token) for token in ids).decode()


def test_random_walks_through_any_schema_end_in_json_that_it_describes(
    compiler: GrammarCompiler, vocab: llama.Vocab, full: bool
) -> None:
    walks = 0
    for schema in (*WALKS, *MEASURED.values()):
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        for seed in range(50 if full else 5):
            text = text_of(vocab, answer(guide(compiler, schema), vocab, Walker(vocab, seed)))
            validator.validate(json.loads(text))
            walks += 1
    assert walks >= 200


def test_an_object_of_any_kind_is_an_object(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    for seed in range(10):
        value = json.loads(text_of(vocab, answer(compiler.guide(JsonConstraint()), vocab, Walker(vocab, seed))))
        assert isinstance(value, dict)


def test_forced_runs_are_the_same_however_they_are_taken(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    """At once, one by one, and in random pieces with copies of the guide in between: the same ids."""
    runs = 0
    for schema in (*WALKS, *MEASURED.values()):
        for seed in range(2):
            start = guide(compiler, schema)
            runs += len(start.forced()) > 1
            whole = answer(start.copy(), vocab, Walker(vocab, seed))
            single = answer(start.copy(), vocab, Walker(vocab, seed), bulk=False)
            assert whole == single

            pieces, rng, choose, sampled = [], random.Random(seed), Walker(vocab, seed), 0
            current = start
            while not current.finished:
                taken = current.forced()[: rng.randint(1, 5)] or [choose(allowed(current, vocab), sampled)]
                sampled += not current.forced()
                for token in taken:
                    current.accept(token)
                pieces += [token for token in taken if not vocab.is_end(token)]
                current = current.copy() if rng.random() < 0.3 else current
            assert pieces == whole
    assert runs > 10


def test_forced_runs_never_exclude_what_the_mask_alone_would_write(
    compiler: GrammarCompiler, vocab: llama.Vocab
) -> None:
    """A run spells exactly the bytes that any answer has there: each of its tokens is in the mask of its place."""
    for schema in (*WALKS, *MEASURED.values()):
        current = guide(compiler, schema)
        masked = compiler._matcher(alone(JsonConstraint(schema=json.dumps(schema)))).deep_copy()
        for token in current.forced():
            bits = np.unpackbits(np.frombuffer(masked.compute_bitmask(), np.uint8), bitorder="little")
            assert bits[token]
            assert masked.consume_token(token)


def test_the_long_schema_forces_long_runs_and_the_short_one_short_ones(
    compiler: GrammarCompiler, vocab: llama.Vocab
) -> None:
    shares, longest = {}, {}
    for name, schema in MEASURED.items():
        current, choose, runs, total, sampled = guide(compiler, schema), Walker(vocab, 1, free=0), [], 0, 0
        while not current.finished:
            taken = current.forced()
            if taken:
                runs.append(len(taken))
            else:
                taken = [choose(allowed(current, vocab), sampled)]
                sampled += 1
            for token in taken:
                current.accept(token)
            total += len(taken)
        shares[name], longest[name] = sum(runs) / total, max(runs)
    assert longest["short"] <= 4 < 8 < longest["long"]
    assert shares["long"] > 0.7


def test_the_end_is_allowed_exactly_when_the_value_is_complete(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    ends = {token for token in range(vocab.size) if vocab.is_end(token)}
    for schema in ({"type": "integer", "maximum": 5000, "minimum": 0}, MEASURED["short"], {"enum": ["a", "ab", 1, 12]}):
        current, choose, text = guide(compiler, schema), Walker(vocab, 3), b""
        while not current.finished:
            tokens = allowed(current, vocab)
            try:
                jsonschema.validate(json.loads(text), schema)
                complete = True
            except ValueError:
                complete = False
            assert current.may_end == complete
            assert set(tokens.tolist()) & ends == (ends if complete else set())
            token = choose(tokens, 0)
            current.accept(token)
            text += vocab.piece(token)
        assert set(allowed(current, vocab).tolist()) == ends


def test_a_token_that_may_not_follow_is_refused(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    (brace,) = vocab.tokenize("}", parse_special=False)
    with pytest.raises(GuideError):
        guide(compiler, {"type": "integer"}).accept(brace)
    forced = guide(compiler, MEASURED["long"])
    with pytest.raises(GuideError, match="forced"):
        forced.accept(brace)
    for end in (token for token in range(vocab.size) if vocab.is_end(token)):
        with pytest.raises(GuideError):
            guide(compiler, {"type": "string"}).accept(end)


def test_control_tokens_are_never_allowed_within_a_string(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    current = guide(compiler, {"type": "string"})
    (quote,) = vocab.tokenize('"', parse_special=False)
    current.accept(quote)
    control = {token.id for token in vocab.marked() if token.kind == "control"}
    tokens = allowed(current, vocab)
    assert len(tokens) > vocab.size // 2
    assert not control & set(tokens.tolist())


def test_a_copy_goes_its_own_way(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    one = guide(compiler, MEASURED["medium"])
    one.begin_mask()
    other = one.copy()
    before = allowed(other, vocab)
    answer(one, vocab, Walker(vocab, 1))
    assert one.finished
    assert not other.finished
    assert (allowed(other, vocab) == before).all()
    answer(other, vocab, Walker(vocab, 2))


def test_a_mask_that_exceeds_its_limits_is_an_error_and_never_no_constraint(tiny_compiler: GrammarCompiler) -> None:
    class Exhausted:
        """A matcher after its fuel: llguidance then offers the end token and sets its error state."""

        def compute_bitmask(self) -> bytes:
            return b"\x01" + bytes(63)

        def is_error(self) -> bool:
            return True

        def stop_reason(self) -> str:
            return "LexerTooComplex"

    current = guide(tiny_compiler, {"type": "integer"})
    current._matcher = Exhausted()  # type: ignore[assignment]
    logits = np.zeros(current._vocabulary, np.float32)
    with pytest.raises(GuideError, match="LexerTooComplex"):
        current.apply(logits)
    assert (logits == 0).all()


def test_masks_are_begun_without_waiting_and_settled_before_the_next_token(tiny_compiler: GrammarCompiler) -> None:
    release, started = threading.Event(), threading.Event()

    def busy() -> None:
        started.set()
        release.wait(10)

    current = guide(tiny_compiler, {"type": "array", "items": {"type": "integer"}})
    tiny_compiler._compute.submit(busy)
    assert started.wait(10)
    for token in current.forced():
        current.accept(token)
    begun = time.monotonic()
    current.begin_mask()
    current.begin_mask()
    assert time.monotonic() - begun < 5
    assert current._mask is not None
    assert not current._mask.done()
    release.set()
    logits = np.zeros(current._vocabulary, np.float32)
    current.apply(logits)
    assert 0 < (logits == 0).sum() < current._vocabulary
    current.accept(int(np.flatnonzero(logits == 0)[0]))
    current.begin_mask()
    current.close()


def test_guides_of_many_sequences_do_not_disturb_one_another(compiler: GrammarCompiler, vocab: llama.Vocab) -> None:
    schemas = [*MEASURED.values(), *WALKS[10:20]]
    alone = [answer(guide(compiler, schema), vocab, Walker(vocab, 5)) for schema in schemas]
    guides = [guide(compiler, schema) for schema in schemas]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda current: answer(current, vocab, Walker(vocab, 5)), guides))
    assert together == alone


def nested(levels: int) -> object:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, Any] = {
    "alternatives under a conjunction": {
        "allOf": [{"anyOf": [{"properties": {f"{p}{i}": {"const": 0}}} for p in "pq"]} for i in range(16)]
    },
    "doubling references": {
        "$ref": "#/$defs/a0",
        "$defs": {
            **{
                f"a{i}": {"prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "items": False, "minItems": 2}
                for i in range(30)
            },
            "a30": {"type": "integer"},
        },
    },
    "a reference to itself": {"$ref": "#"},
    "no end": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "deep": nested(31),
    "too deep": nested(70),
    "very deep": nested(300),
    "large enum": {"enum": [f"value-{i}-{i * 7919 % 10007}" for i in range(2500)]},
    "too large": {"enum": ["x" * 70_000]},
    "many properties": {"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(1500)}},
    "counting pattern": {"type": "string", "pattern": "^(a|b|ab)*c.{0,500}(x|y){0,400}(a+)+$"},
    "nested counts": {"type": "string", "pattern": "((((a{0,30}){0,30}){0,30}){0,30}){0,30}"},
    "exponential automaton": {"type": "string", "pattern": "^[ab]*a[ab]{18}$"},
    "overlapping patterns": {"patternProperties": {f"^.*{i}.*$": {"type": "integer"} for i in range(12)}},
    "conjunction of patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(5, 25)]},
    "long array": {"type": "array", "minItems": 100_000, "maxItems": 200_000},
    "long string": {"type": "string", "minLength": 100_000, "maxLength": 200_000},
    "large multiple": {"type": "integer", "multipleOf": 999_999_937},
    "coprime multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (10_007, 10_009, 10_037)]},
    "fine multiples": {"allOf": [{"type": "number", "multipleOf": n} for n in (0.00001, 0.7, 0.13)]},
    "large bounds": {"type": "integer", "minimum": 0, "maximum": 10**300},
    "small bounds": {"type": "number", "minimum": 1e-300, "maximum": 1e300},
    "long constant": {"const": "7" * 60_000},
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_schemas_are_refused_or_held_to_within_bounds(
    compiler: GrammarCompiler, vocab: llama.Vocab, schema: Any
) -> None:
    begun = time.process_time()  # of all threads; a busy machine does not count
    try:
        current = guide(compiler, schema)
    except InvalidRequest as error:
        refused: InvalidRequest | None = error
    else:
        refused = None
    assert time.process_time() - begun < 2
    if refused is not None:
        assert refused.param == "response_format.json_schema.schema"
        return
    choose = Walker(vocab, 1)
    begun = time.process_time()
    try:
        for step in range(30):
            if current.finished:
                break
            for token in current.forced() or [choose(allowed(current, vocab), step)]:
                current.accept(token)
    except GuideError:
        pass  # a stated limit was reached: the sequence ends in an error, nothing else does
    assert time.process_time() - begun < 4


def test_a_compiled_schema_is_kept_and_few_are(tiny_compiler: GrammarCompiler) -> None:
    guide(tiny_compiler, {"const": "first"})
    kept = tiny_compiler._compiled.copy()
    guide(tiny_compiler, {"const": "first"})
    assert tiny_compiler._compiled.keys() == kept.keys()
    for index in range(40):
        guide(tiny_compiler, {"const": index})
    assert len(tiny_compiler._compiled) == 32
    assert not kept.keys() & tiny_compiler._compiled.keys()
    for index in range(6):
        guide(tiny_compiler, {"const": str(index) * 60_000})
    assert sum(size for _, size in tiny_compiler._compiled.values()) <= 256 * 1024


@pytest.mark.parametrize("family", ["attention", "sliding", "recurrent"])
def test_a_vocabulary_of_single_bytes_writes_any_character(tmp_path: Path, family: tiny.Family) -> None:
    vocab = load(tiny.write(tmp_path / "tiny.gguf", family))
    compiler = compiler_of(vocab)
    for value in ("é😀", {"käse": [1, None]}):
        ids = answer(guide(compiler, {"const": value}), vocab, Walker(vocab, 0))
        assert json.loads(text_of(vocab, ids)) == value
