"""Constrained output: grammars (llguidance) of JSON, of calls and of clients' own, and a guide per sequence in one.

JSON values are compact JSON, without whitespace between tokens: small models given the choice ramble in it, and most of
what a schema forces would no longer be forced. Properties appear in the schema's order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ocserve.chat.grammar import AnswerGrammar, GrammarPart
from ocserve.engine import schema
from ocserve.engine.llama import Vocab
from ocserve.errors import InvalidRequest
from ocserve.generation import Constraint, GrammarConstraint, JsonConstraint

Logits = np.ndarray[Any, np.dtype[np.float32]]
Blocked = np.ndarray[Any, np.dtype[np.bool_]]

_LIMITS = LLParserLimits(
    initial_lexer_fuel=250_000,  # 5 ms
    step_lexer_fuel=200_000,  # 14 ms for one mask
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=500_000,
    verbose_errors=False,  # they hold the schema and the output
)
_ANY_OBJECT = '{"type":"object"}'
# Of one request, seconds of this thread's own time: below what the front takes for a hang even where both the parts
# alone and all of them together take it, on a machine that is several times slower or busy.
_MOST_COMPILING_S = 3.0
_KEPT_PARTS = 4096  # of what parts took alone; a number each
_KEPT_GRAMMARS = 32
_KEPT_BYTES = 256 * 1024  # of schema text; a compiled grammar takes up to 300 times as much
# Longer forced runs are found token by token under the mask: a tokenizer that recurses per character must not run on
# the stack of the loop's thread with text of any length.
_MOST_FORCED_BYTES = 4096


class GuideError(Exception):
    """The grammar cannot go on: a token that it does not allow, or a limit reached. Never holds text of a request."""


class Guide:
    """Where one sequence stands in its grammar. For one thread; masks are computed on another.

    `may_end`: the value is complete, so the end token is allowed. `finished`: nothing but the end may follow.
    """

    def __init__(self, matcher: LLMatcher, compute: ThreadPoolExecutor, *, vocabulary: int) -> None:
        self._matcher = matcher
        self._compute = compute
        self._vocabulary = vocabulary
        self._mask: Future[Blocked] | None = None
        self._forced: deque[int] = deque()
        self.finished = self.may_end = False
        self._look_ahead()

    def begin_mask(self) -> None:
        """Start to compute what may follow, on the mask thread. Returns at once; for right before a decode."""
        if self._mask is None and not self._forced:
            self._mask = self._compute.submit(_blocked, self._matcher, self._vocabulary)

    def apply(self, logits: Logits) -> None:
        """Set the logits (float32, one per token of the vocabulary) of what may not follow to -inf, in place.

        Waits for the mask, and begins it where `begin_mask` was not called. Raises `GuideError` where it cannot be
        computed within its limits.
        """
        if self._forced:
            token = self._forced[0]
            kept = logits[token]
            logits.fill(-np.inf)
            logits[token] = kept
            return
        self.begin_mask()
        assert self._mask is not None
        np.copyto(logits, np.float32(-np.inf), where=self._mask.result())

    def accept(self, token: int) -> None:
        """Go on by one token; raises `GuideError` for one that may not follow. The end token is one that may."""
        self._settle()
        if self._forced and self._forced.popleft() != token:
            raise GuideError("a token other than the forced one")
        if not self._matcher.consume_token(token) or self._matcher.is_error():
            raise GuideError("a token that the grammar does not allow")
        if not self._forced:
            self._look_ahead()

    def forced(self) -> list[int]:
        """The tokens that must follow now, in the tokenizer's own division; they are not sampled.

        Each must be accepted. A run is fixed when it is found and shrinks by what is accepted, so that the ids do not
        depend on how many are taken at once.
        """
        return list(self._forced)

    def copy(self) -> Guide:
        """An independent guide at the same place."""
        self._settle()
        other = Guide.__new__(Guide)
        other._matcher = self._matcher.deep_copy()
        other._compute, other._vocabulary, other._mask = self._compute, self._vocabulary, None
        other._forced = self._forced.copy()
        other.finished, other.may_end = self.finished, self.may_end
        return other

    def close(self) -> None:
        """Give up a mask that nobody waits for any more."""
        if self._mask is not None:
            self._mask.cancel()
            self._mask = None

    def _settle(self) -> None:
        """The matcher must not be touched while the mask thread uses it."""
        mask, self._mask = self._mask, None
        if mask is not None and not mask.cancel():
            mask.exception()

    def _look_ahead(self) -> None:
        self.finished = self._matcher.is_stopped()
        self.may_end = self.finished or self._matcher.is_accepting()
        if not self.may_end and 0 < len(self._matcher.compute_ff_bytes()) <= _MOST_FORCED_BYTES:
            self._forced.extend(self._matcher.compute_ff_tokens())
        if self._matcher.is_error():
            raise GuideError(f"the grammar stopped: {self._matcher.stop_reason()}")


def _blocked(matcher: LLMatcher, vocabulary: int) -> Blocked:
    """Which tokens may not follow. In its error state llguidance offers the end token, which must not pass."""
    allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise GuideError(f"the mask could not be computed: {matcher.stop_reason()}")
    return np.unpackbits(~allowed, bitorder="little", count=vocabulary).view(np.bool_)


class GrammarCompiler:
    """Compiles constraints for one vocabulary. For one thread; guides may then be used from others."""

    def __init__(self, vocab: Vocab, encode: Callable[[str], list[int]]) -> None:
        """`encode` tokenises plain text, without special tokens, as prompts are tokenised."""
        self._vocab = vocab
        self._encode = encode
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._took: OrderedDict[bytes, float] = OrderedDict()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="mask")

    def build(self) -> None:
        """Make the vocabulary's token trie, unless it exists.

        Takes 0.3 s for 49,000 tokens and 2.5 s for 262,000. llguidance holds the GIL for about half of it, during which
        nothing else in the process runs.
        """
        if self._tokenizer is None:
            vocabulary = _Vocabulary(self._vocab, self._encode)
            self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), self._vocab.size, vocabulary.ends)

    def guide(self, wanted: Constraint | AnswerGrammar) -> Guide:
        """A guide at the start of an answer; raises `InvalidRequest` for what cannot be held to.

        A grammar is compiled once per text: in milliseconds for usual ones, in under a second at the limits.
        """
        if not isinstance(wanted, AnswerGrammar):
            wanted = alone(wanted)
        try:
            return Guide(self._matcher(wanted).deep_copy(), self._compute, vocabulary=self._vocab.size)
        except GuideError:
            raise _refused(wanted.parts, "too complex") from None

    def _matcher(self, answer: AnswerGrammar) -> LLMatcher:
        """The compiled grammar, at its start; not to be moved."""
        grammar = _grammar(answer)
        digest = _digest(grammar)
        if digest in self._compiled:
            self._compiled.move_to_end(digest)
            return self._compiled[digest][0]
        if len(answer.parts) > 1:
            self._rehearse(answer.parts)
        matcher = self._compile(grammar)
        if matcher.is_error():
            raise _refused(answer.parts, matcher.get_error())
        self._compiled[digest] = matcher, len(grammar)
        while len(self._compiled) > _KEPT_GRAMMARS or sum(size for _, size in self._compiled.values()) > _KEPT_BYTES:
            self._compiled.popitem(last=False)
        return matcher

    def _rehearse(self, parts: Sequence[GrammarPart]) -> None:
        """Compile each part alone, once: so it is known which to refuse, and there are moments at which to stop."""
        spent = 0.0
        for part in parts:
            grammar = _grammar(alone(part.constraint))
            digest = _digest(grammar)
            if digest not in self._took:
                begun = time.thread_time()
                matcher = self._compile(grammar)
                if matcher.is_error():
                    raise _refused((part,), matcher.get_error())
                self._took[digest] = time.thread_time() - begun
                if len(self._took) > _KEPT_PARTS:
                    self._took.popitem(last=False)
            self._took.move_to_end(digest)
            spent += self._took[digest]
            if spent > _MOST_COMPILING_S:
                raise _too_complex_together()

    def _compile(self, grammar: str) -> LLMatcher:
        self.build()
        assert self._tokenizer is not None
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)


def alone(constraint: Constraint) -> AnswerGrammar:
    """The grammar of an answer that is nothing but a value."""
    return AnswerGrammar("", (GrammarPart("value", constraint),))


def _grammar(answer: AnswerGrammar) -> str:
    """In llguidance's own form: a list of grammars that refer to each other by name."""
    grammars: list[dict[str, object]] = [{"lark_grammar": answer.lark}] if answer.lark else []
    multiples = 0
    for part in answer.parts:
        compiled, states = _part_grammar(part)
        grammars.append({"name": part.name, **compiled})
        multiples += states
    if multiples > schema.MAX_MULTIPLES:
        raise _too_complex_together()
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _part_grammar(part: GrammarPart) -> tuple[dict[str, object], int]:
    """A part in the compiler's form, and how many states its `multipleOf` take."""
    constraint = part.constraint
    if isinstance(constraint, JsonConstraint):
        text = _ANY_OBJECT if constraint.schema is None else constraint.schema
        checked = schema.checked(text, _field(part))
        options = {"whitespace_flexible": False}
        return {"json_schema": {**json.loads(checked.text), schema.OPTIONS: options}}, checked.multiples
    if len(constraint.text.encode()) > schema.MAX_BYTES:
        raise InvalidRequest(f"The grammar is larger than {schema.MAX_BYTES} bytes.", param=_field(part))
    if constraint.syntax == "regex":
        return {"lark_grammar": "start: /" + constraint.text.replace("/", r"\/") + "/\n"}, 0
    if any(option in constraint.text for option in ("%llguidance", schema.OPTIONS)):
        raise InvalidRequest("The grammar sets options of its compiler, which are ours to set.", param=_field(part))
    return {"lark_grammar": constraint.text}, 0


def _field(part: GrammarPart) -> str:
    """Where the part stands in a request."""
    if part.tool is not None:
        return f"tools[{part.tool}].function.parameters"
    return schema.FIELD if isinstance(part.constraint, JsonConstraint) else "response_format.grammar"


def _digest(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest()


def _too_complex_together() -> InvalidRequest:
    return InvalidRequest("The schemas of the tools are too complex together.", param="tools")


def _refused(parts: Sequence[GrammarPart], error: str) -> InvalidRequest:
    """The refusal of a grammar of these parts, of which none is refused alone if they are several."""
    if len(parts) != 1:
        return _too_complex_together()
    (part,) = parts
    if isinstance(part.constraint, GrammarConstraint):
        reason = "is too complex" if schema.is_too_complex(error) else "cannot be compiled"
        return InvalidRequest(f"The grammar {reason}.", param=_field(part), code="invalid_grammar")
    return schema.refusal(error, _field(part))


class _Vocabulary:
    """A vocabulary in the form that llguidance reads: bytes of every token, and which are not text."""

    def __init__(self, vocab: Vocab, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        marked = {token.id for token in vocab.marked() if token.kind != "user_defined"}
        self.ends = [token for token in range(vocab.size) if vocab.is_end(token)]
        self.special_token_ids = sorted({*marked, *self.ends})
        tokens = list(vocab.pieces())
        for token in self.special_token_ids:  # their names: without them llguidance cannot tell one from another
            tokens[token] = vocab.text(token).encode()
        self.tokens: Sequence[bytes] = tokens
        self.eos_token_id = vocab.eos if vocab.eos is not None else self.ends[0]
        self.bos_token_id = vocab.bos

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text is tokenised, not bytes")  # llguidance asks once which of the two it is
        return self._encode(text)
