"""Special tokens in text: keeping them out of what a client wrote, finding them in what a template wrote.

A rendered prompt is one string in which the template's own control tokens and the client's words lie side by side. To
tell them apart, every special text that a client wrote is broken by a nonce, a private-use character that occurs
nowhere else, before the template sees it. What still reads as a special token after rendering is the template's own.

What is guaranteed, for every token that `SpecialTokens` guards:

1. No character of a client's string becomes part of a `Control`, if the template writes the string as it is, or with
   other case, or with other white space. This includes strings that only together with scaffolding or with each other
   spell a special token.
2. `encode` yields the id of a guarded token for `Control` segments only, whatever the vocabulary's merges are; only the
   unknown-token is also what a tokenizer itself says for a character that it does not have.
3. Text without special tokens is tokenised as if it were tokenised whole: nonces leave no trace in it.

A template that edits content in other ways (deleting letters inside it) could put a special token together; that is the
act of the model's own author. `ChatTemplate` compares with a second rendering where that can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ocserve.errors import InvalidRequest

Kind = Literal["control", "unknown", "user_defined"]

# C's isspace in the "C" locale, which is what llama.cpp's partition strips around some special tokens.
_C_SPACE = " \t\n\v\f\r"
_MARKUP = re.compile(r"<[^\s<>][^<>]*>|\[[^\s\[\]][^\[\]]*\]")
# Some vocabularies (Gemma's) carry HTML tags as user-defined tokens. They steer nothing, and text needs them.
_HTML = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|body|br|button|caption|code|dd|div|dl|dt|em|figure|footer|form|h[1-6]|head"
    r"|header|hr|html|i|img|input|kbd|label|li|main|mark|nav|ol|option|p|pre|q|s|samp|section|select|small|span|strike"
    r"|strong|sub|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|u|ul|var)/?>"
)
_PRIVATE_USE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One token of the vocabulary that is more than text.

    `control` and `unknown` are never produced from text unless special tokens are parsed; `user_defined` always are
    (use it too for an end-of-generation token that the vocabulary lists as a normal one).
    """

    text: str
    id: int
    kind: Kind = "control"
    lstrip: bool = False
    rstrip: bool = False

    @property
    def guarded(self) -> bool:
        """Whether a client's text may not spell this token.

        One character cannot be broken, and user-defined tokens that do not look like markup are ordinary text
        (runs of spaces, letters, line breaks).
        """
        if len(self.text) < 2:
            return False
        if self.kind != "user_defined":
            return True
        return bool(_MARKUP.fullmatch(self.text)) and not _HTML.fullmatch(self.text)


@dataclass(frozen=True, slots=True)
class Control:
    """The text of exactly one special token, written by the template."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text. `cuts` are the offsets where a client's special text can be broken into harmless pieces."""

    text: str
    cuts: tuple[int, ...] = ()

    def part(self, start: int, end: int) -> Text:
        """The text from `start` to `end`, with the cuts inside of it."""
        return Text(self.text[start:end], tuple(cut - start for cut in self.cuts if start < cut < end))


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text whose tokens are known already: words of the assistant, as they were sampled."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the prompt's next image stands."""

    text: str = "<__media__>"  # as llama.cpp writes such a place


Segment = Control | Text | Verbatim | Place


class SpecialTokens:
    """The guarded special tokens of one vocabulary. Give it every control, unknown, user-defined and end token."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        guarded = [token for token in tokens if token.guarded]
        # Longest first, in bytes: the order in which llama.cpp looks for them.
        self.tokens = tuple(sorted(guarded, key=lambda token: -len(token.text.encode())))
        self.ids = {token.text: token.id for token in reversed(self.tokens)}
        self.never_from_text = frozenset(token.id for token in self.tokens if token.kind != "unknown")
        folded = {_fold(token.text) for token in self.tokens} - {""}
        self._anywhere = re.compile(_any_of(folded))
        self._every_start = re.compile(f"(?={self._anywhere.pattern})")
        self._longest = max(map(len, folded), default=0)
        self._heads = frozenset(text[:end] for text in folded for end in range(1, len(text)))
        self._tails = frozenset(text[start:] for text in folded for start in range(1, len(text)))
        self._insides = "\0".join(text[1:-1] for text in folded)

    def starts(self, text: str) -> list[int]:
        """Offsets of characters that begin a guarded text, up to case and white space."""
        folded = _fold(text)
        if not self._anywhere.search(folded):
            return []
        origin = [index for index, char in enumerate(text) for _ in _fold(char)]
        # A character may fold to several; a match can begin at each of them.
        return sorted({origin[match.start()] for match in self._every_start.finditer(folded)})

    def could_complete(self, text: str) -> tuple[bool, bool]:
        """Whether text before, and text after, this one could complete a guarded text with it."""
        # Folding can drop white space, so a window of twice the longest text is not always enough at both ends of
        # a text full of spaces; the whole is folded then.
        head = _fold(text[: 4 * self._longest])
        tail = _fold(text[-4 * self._longest :]) if self._longest else ""
        if len(head) < self._longest or len(tail) < self._longest:
            head = tail = _fold(text)
        if not head:
            return False, False
        inside = len(head) < self._longest and head in self._insides
        lengths = range(1, min(self._longest, len(head)) + 1)
        before = inside or any(head[:length] in self._tails for length in lengths)
        after = inside or any(tail[-length:] in self._heads for length in range(1, min(self._longest, len(tail)) + 1))
        return before, after

    def partition(self, rendered: str, nonce: str | None = None) -> tuple[Segment, ...]:
        """Split a rendered prompt into the template's control tokens and the text between them.

        The same fragments as llama.cpp's own partition with special tokens parsed, its stripping of white space
        around some tokens included.
        """
        parts: list[str | SpecialToken] = [rendered] if rendered else []
        for token in self.tokens:
            if token.text in rendered:
                parts = [piece for part in parts for piece in _split(part, token)]
        segments = [
            Control(part.text) if isinstance(part, SpecialToken) else _without_nonce(part, nonce) for part in parts
        ]
        return tuple(segment for segment in segments if segment.text)

    def encode(
        self, segments: Iterable[Control | Text | Verbatim], tokenize: Callable[[str], Sequence[int]]
    ) -> list[int]:
        """Token ids of the segments. `tokenize` must add nothing and parse no special tokens."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Control):
                ids.append(self.ids[segment.text])
                continue
            found = segment.ids if isinstance(segment, Verbatim) else tokenize(segment.text)
            if isinstance(segment, Text) and segment.cuts and not self.never_from_text.isdisjoint(found):
                found = [token for piece in _pieces(segment) for token in tokenize(piece)]
            if not self.never_from_text.isdisjoint(found):
                raise InvalidRequest(
                    "The messages contain text that this model's vocabulary reads as a control token.", param="messages"
                )
            ids.extend(found)
        return ids


class Guard:
    """Breaks the special texts in one request's strings. `broken` tells whether there were any."""

    def __init__(self, specials: SpecialTokens, strings: Sequence[str], foreign: str = "") -> None:
        """`foreign` is other text that the rendering may contain: the template itself."""
        self._specials = specials
        self.nonce, self.filler, self.end_mark, self.image_mark = _unused_characters(4, [*strings, foreign])
        self.broken = False

    def protect(self, text: str) -> str:
        """The text with a nonce inside each special text, and near its ends where it could complete one."""
        starts = self._specials.starts(text)
        if starts:
            self.broken = True
        return self._insert_nonces(text, text, [start + 1 for start in starts])

    def blank(self, text: str) -> str:
        """The text with every character that begins a special text replaced: it can spell none."""
        characters = list(text)
        for start in self._specials.starts(text):
            characters[start] = self.filler
        return self._insert_nonces(text, "".join(characters), [])

    def _insert_nonces(self, original: str, text: str, offsets: list[int]) -> str:
        before, after = self._specials.could_complete(original)
        # Inside of leading and trailing white space, so that templates that trim find it as it was.
        if before:
            offsets = [len(text) - len(text.lstrip()), *offsets]
        if after:
            offsets = [*offsets, len(text.rstrip())]
        if not offsets:
            return text
        edges = [0, *offsets, len(text)]
        return self.nonce.join(text[a:b] for a, b in pairwise(edges))


def placed(segments: Iterable[Segment], mark: str) -> Iterator[Segment]:
    """The segments with a `Place` for every `mark` in their text."""
    for segment in segments:
        if not isinstance(segment, Text) or mark not in segment.text:
            yield segment
            continue
        start = 0
        for end in (match.start() for match in re.finditer(re.escape(mark), segment.text)):
            if end > start:
                yield segment.part(start, end)
            yield Place()
            start = end + len(mark)
        if start < len(segment.text):
            yield segment.part(start, len(segment.text))


def _any_of(texts: Iterable[str]) -> str:
    """A pattern that matches where one of the texts begins; shared beginnings are tried once.

    Some vocabularies have hundreds of specials that begin alike, and text is full of that beginning.
    """
    by_first: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            return ""
        by_first.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in sorted(by_first.items())]
    if not branches:
        return "(?!)"
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _fold(text: str) -> str:
    # Upper case first: some letters (long s, dotless i, ligatures) reach ASCII only that way.
    return "".join(text.upper().casefold().split())


def _split(part: str | SpecialToken, token: SpecialToken) -> list[str | SpecialToken]:
    if isinstance(part, SpecialToken) or token.text not in part:
        return [part]
    pieces: list[str | SpecialToken] = []
    texts = part.split(token.text)
    for index, text in enumerate(texts):
        stripped = text
        if token.rstrip and index > 0:
            stripped = stripped.lstrip(_C_SPACE)
        if token.lstrip and index < len(texts) - 1:
            stripped = stripped.rstrip(_C_SPACE)
        if stripped:
            pieces.append(stripped)
        if index < len(texts) - 1:
            pieces.append(token)
    return pieces


def _without_nonce(text: str, nonce: str | None) -> Text:
    if nonce is None or nonce not in text:
        return Text(text)
    pieces = text.split(nonce)
    cuts: list[int] = []
    offset = 0
    for piece in pieces[:-1]:
        offset += len(piece)
        cuts.append(offset)
    whole = "".join(pieces)
    return Text(whole, tuple(sorted({cut for cut in cuts if 0 < cut < len(whole)})))


def _pieces(segment: Text) -> list[str]:
    edges = [0, *segment.cuts, len(segment.text)]
    return [segment.text[a:b] for a, b in pairwise(edges)]


def _unused_characters(count: int, strings: Sequence[str]) -> list[str]:
    found: list[str] = []
    for start, end in _PRIVATE_USE:
        for code in range(start, end):
            if not any(chr(code) in text for text in strings):
                found.append(chr(code))
                if len(found) == count:
                    return found
    # 137,000 different private-use characters in one request.
    raise InvalidRequest("The messages use every private-use character of Unicode.", param="messages")
