"""Marks: the texts with which a model structures its answer, apart from the same letters in its words.

Where a vocabulary has a control token for a mark (`[TOOL_CALLS]`), only that token is the mark; where it has none, the
spelled-out text is. Control tokens travel through text as lone surrogates: characters that decoded text cannot contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

_FIRST_SURROGATE = 0xD800
_MOST_MARKS = 0x800
# Stands in a format's text where the model writes an id; see `ToolFormat`.
ID = "\0"


class Marks:
    """The control tokens of one vocabulary that occur in some texts of formats."""

    def __init__(self, controls: Mapping[str, int], texts: Iterable[str], ends: frozenset[int] = frozenset()) -> None:
        """`controls` maps the text of every control token to its id; `ends` are those that end an answer."""
        self._ends = ends
        joined = "\n".join(texts)
        found = sorted((text for text in controls if len(text) > 1 and text in joined), key=lambda text: -len(text))
        self._texts = {chr(_FIRST_SURROGATE + index): text for index, text in enumerate(found[:_MOST_MARKS])}
        self._marks = {text: mark for mark, text in self._texts.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._ids = {mark: controls[text] for mark, text in self._texts.items()}
        self.by_id = {token: mark for mark, token in self._ids.items()}

    def marked(self, text: str) -> str:
        """A format's text with its control tokens as single characters."""
        return self._pattern.sub(lambda match: self._marks[match.group()], text)

    def plain(self, text: str) -> str:
        """The same text as it reads."""
        return "".join(self._texts.get(character, character) for character in text)

    def lark(self, text: str, id_pattern: str = "") -> list[str]:
        """A marked text as terms of a Lark grammar, in order: one that matches `id_pattern` where `ID` is.

        Tokens that end an answer are left out: they may follow whatever is complete.
        """
        parts: list[str] = []
        literal = ""
        for character in text:
            if character != ID and character not in self._ids:
                literal += character
                continue
            if literal:
                parts.append(json.dumps(literal, ensure_ascii=False))
                literal = ""
            if character == ID:
                parts.append(f"/{id_pattern}/")
            elif self._ids[character] not in self._ends:
                parts.append(f"<[{self._ids[character]}]>")
        if literal:
            parts.append(json.dumps(literal, ensure_ascii=False))
        return parts
