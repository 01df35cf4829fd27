"""Reading text that comes in pieces of any size: what was read so far never depends on where the pieces end.

The methods that end in `-> Reading[...]` are generators: they yield where they need more text, and go on when there is
some, or when it is known that no more will come.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from ocserve.chat.marks import ID

T = TypeVar("T")
Reading = Generator[None, None, T]

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class Reader:
    """A text, from its unread rest on. `final`: nothing will be added."""

    def __init__(self) -> None:
        self.rest = ""
        self.final = False

    def take(self, length: int) -> str:
        """Read so many characters of what is there."""
        text, self.rest = self.rest[:length], self.rest[length:]
        return text

    def literal(self, alternatives: Sequence[str]) -> Reading[tuple[int, str] | None]:
        """Read the longest of some texts, white space aside.

        Returns its index and the text as it was written; None if there is none of them, and nothing has been read.
        """
        texts = [_dense(text) for text in alternatives]
        states = {(index, 0) for index in range(len(texts))}
        matched: tuple[int, int] | None = None
        at = 0
        while True:
            for index, position in states:
                if position == len(texts[index]):
                    matched = index, at
            states = {(index, position) for index, position in states if position < len(texts[index])}
            while states and at == len(self.rest):
                if self.final:
                    states = set()
                    break
                yield
            if not states:
                break
            character = self.rest[at]
            at += 1
            if not character.isspace():
                states = {after for state in states for after in _step(texts, state, character)}
        if matched is None:
            return None
        return matched[0], self.take(matched[1])

    def drop_beginning_of(self, alternatives: Sequence[str]) -> None:
        """Forget the rest of a text that was cut within one of these."""
        if self.final and any(_dense(text).startswith(_dense(self.rest)) for text in alternatives):
            self.rest = ""

    def until(self, stops: str) -> Reading[str | None]:
        """Read up to white space or a character of `stops`, after leading white space; None if none comes."""
        yield from self.skip_space()
        at = 0
        while True:
            while at == len(self.rest):
                if self.final:
                    return None
                yield
            if self.rest[at] in stops or self.rest[at].isspace():
                return self.take(at)
            at += 1

    def skip_space(self) -> Reading[None]:
        """Read white space, and stop before what follows it."""
        while True:
            self.rest = self.rest.lstrip()
            if self.rest or self.final:
                return
            yield

    def find(self, marks: Sequence[str], *, cut: bool = False) -> tuple[int, str | None]:
        """Where in the unread text the first of the marks begins, and which; or from where on one may begin.

        `cut`: a mark may begin at the end even of a text that is over.
        """
        best, found = len(self.rest), ""
        for mark in marks:
            at = self.rest.find(mark)
            if at >= 0 and (at < best or (at == best and len(mark) > len(found))):
                best, found = at, mark
        if self.final and not cut:
            return best, found or None
        longest = max(map(len, marks), default=0)
        for at in range(max(0, len(self.rest) - longest + 1), best + (found != "")):
            tail = self.rest[at:]
            if any(len(mark) > len(tail) and mark.startswith(tail) for mark in marks):
                return at, None  # a longer mark may begin here
        return best, found or None


def _dense(text: str) -> str:
    return "".join(text.split())


def _step(texts: list[str], state: tuple[int, int], character: str) -> list[tuple[int, int]]:
    index, position = state
    expected = texts[index][position]
    if expected == ID:
        return [state, (index, position + 1)] if character in _ID_CHARACTERS else []
    return [(index, position + 1)] if character == expected else []


class JsonEnd:
    """Finds where a JSON object or array ends, character by character."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.complete = False

    @property
    def in_string(self) -> bool:
        """Whether what was fed ends within a string."""
        return self._in_string

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        for count, character in enumerate(text, start=1):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return count
        return len(text)
