"""The text of an answer, piece by piece, as thoughts, words and calls.

Nothing is held back longer than it is ambiguous, and what comes out does not depend on where the pieces end. Whatever
looks like a call and turns out to be none is given back as words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ocserve.chat.reader import JsonEnd, Reader, Reading
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import ArgumentSyntax, ToolFormat

Channel = Literal["content", "reasoning", "call"]
# Maps every surrogate to nothing: marks that stand where nobody expects them are not text.
_NO_MARKS: Mapping[int, None] = dict.fromkeys(range(0xD800, 0xE000))


@dataclass(frozen=True, slots=True)
class Part:
    """Some text of one channel; empty where only a mark was read. For a call, text is of its arguments' JSON.

    `end` is how many characters of the answer, marks and dropped white space included, are read by the end of it.
    `name` is given with the first part of call number `call`.
    """

    channel: Channel
    text: str
    end: int
    call: int = 0
    name: str | None = None


class _NotACall(Exception):
    """What was read as a call is not one."""


class Channels:
    """Reads one answer. `thinking`: the prompt ended within a thought."""

    def __init__(
        self, speech: Speech, *, tools: Mapping[str, frozenset[str]] | None = None, thinking: bool = False
    ) -> None:
        """`tools` are the names that may be called, with the arguments that are written as bare text where the format
        writes them one by one; without any, nothing is taken for a call."""
        self._form = speech.tools
        self._forms = [speech.tools, *([speech.tools.other] if speech.tools.other is not None else [])]
        self._reasoning = speech.reasoning
        self._tools = tools or {}
        self._reader = Reader()
        self._parts: list[Part] = []
        self._tentative = ""  # read as part of a call that has not been announced
        self._trim = False  # white space at the beginning of what follows is not text
        self._fed = 0  # characters
        self.thinking = thinking
        self.calls = 0  # how many have begun
        self._reader.rest = speech.tools.prompted
        self._reading = self._answer()
        next(self._reading)

    def feed(self, text: str) -> list[Part]:
        """What is certain now."""
        self._reader.rest += text
        self._fed += len(text)
        return self._advance()

    def finish(self) -> list[Part]:
        """The answer is over."""
        self._reader.final = True
        return self._advance()

    def _advance(self) -> list[Part]:
        next(self._reading, None)
        parts, self._parts = self._parts, []
        return parts

    def _emit(self, channel: Channel, text: str) -> None:
        text = text.translate(_NO_MARKS)
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            self._add(channel, text)

    def _mark(self, channel: Channel) -> None:
        """A mark was read that belongs to this channel."""
        self._add(channel, "")

    def _add(self, channel: Channel, text: str, name: str | None = None) -> None:
        end = self._fed - len(self._reader.rest)
        self._parts.append(Part(channel, text, end, self.calls - 1 if channel == "call" else 0, name))

    def _answer(self) -> Reading[None]:
        if self.thinking or (yield from self._thought_begins()):
            yield from self._thought()
        if self._tools and self._form.whole_answer:
            yield from self._call_or_words()
        while self._reader.rest or not self._reader.final:
            yield from self._words()
            if not self._reader.rest and not self._reader.final:
                yield

    # --- thoughts and words -----------------------------------------------------------------------------------------

    def _thought_begins(self) -> Reading[bool]:
        form = self._reasoning
        return form is not None and (yield from self._reader.literal([form.begin])) is not None

    def _thought(self) -> Reading[None]:
        assert self._reasoning is not None
        self.thinking = self._trim = True
        self._mark("reasoning")
        if (yield from self._text("reasoning", [self._reasoning.end])) is not None:
            self._mark("reasoning")
            self.thinking = False
            self._trim = True

    def _words(self) -> Reading[None]:
        """Text up to a thought, a call, or the end."""
        reasoning, form = self._reasoning, self._form
        trigger = form.trigger if self._tools and not form.whole_answer else ""
        begin = reasoning.begin if reasoning is not None and reasoning.repeats else ""
        silent = (*form.say, *(reasoning.silent if reasoning is not None else ()))
        mark = yield from self._text("content", [text for text in (trigger, begin, *silent) if text])
        if mark is None:
            return
        if mark == trigger:
            self._reader.rest = mark + self._reader.rest
            yield from self._call_or_words()
        elif mark == begin:
            yield from self._thought()
        else:
            self._mark("content")

    def _text(self, channel: Channel, marks: Sequence[str]) -> Reading[str | None]:
        """Emit text up to one of the marks and read that; None: the text is over. White space before it is dropped."""
        reader = self._reader
        while True:
            at, mark = reader.find(marks)
            if mark is not None:
                self._emit(channel, reader.take(at).rstrip())
                return reader.take(len(mark))
            if reader.final:
                self._emit(channel, reader.take(at))
                return None
            self._emit(channel, reader.take(len(reader.rest[:at].rstrip()) if marks else at))
            yield

    # --- calls ------------------------------------------------------------------------------------------------------

    def _call_or_words(self) -> Reading[None]:
        try:
            yield from self._call_list()
        except _NotACall:
            words, self._tentative = self._tentative, ""
            if not words and not self._form.whole_answer:
                words = self._reader.take(len(self._form.trigger))
            self._emit("content", words)
        else:
            self._trim = True

    def _call_list(self) -> Reading[None]:
        begins = [form.opening + form.begin for form in self._forms]
        before = self.calls
        while (begun := (yield from self._reader.literal(begins))) is not None:
            index, self._tentative = begun
            if index >= len(self._forms):
                return
            form = self._forms[index]
            if not (yield from self._call(form)):
                return
            begins = [form.between + each.begin for each in self._forms]
            if form.close.strip():
                begins.append(form.close)
            self._reader.drop_beginning_of(begins)
        if self.calls == before:
            raise _NotACall

    def _call(self, form: ToolFormat) -> Reading[bool]:
        """Read a call from its name on; whether it is complete. Raises `_NotACall` before it is announced."""
        reader = self._reader
        name = yield from reader.until(form.middle.strip()[:1] or "{")
        self._tentative += name or ""
        if name not in self._tools:
            raise _NotACall
        middle = yield from reader.literal([form.middle])
        if middle is None:
            raise _NotACall
        self._tentative += middle[1]
        if form.argument is None:
            yield from reader.skip_space()
            if not reader.rest.startswith("{"):
                raise _NotACall
        assert name is not None
        self.calls += 1
        self._add("call", "", name)
        self._tentative, self._trim = "", False
        if form.argument is not None:
            return (yield from self._tagged_arguments(form, form.argument, self._tools[name]))
        yield from self._json_arguments()
        return (yield from self._end(form.ends)) is not None

    def _end(self, ends: Sequence[str]) -> Reading[int | None]:
        end = yield from self._reader.literal(ends)
        if end is None:
            self._reader.drop_beginning_of(ends)
            return None
        self._mark("call")
        return end[0]

    def _json_arguments(self) -> Reading[None]:
        end = JsonEnd()
        while True:
            self._emit("call", self._reader.take(end.feed(self._reader.rest)))
            if end.complete or self._reader.final:
                return
            yield

    def _tagged_arguments(self, form: ToolFormat, each: ArgumentSyntax, bare: frozenset[str]) -> Reading[bool]:
        opened = False
        while True:
            found = yield from self._end([*form.ends, each.before])
            if found is None:
                return False
            if found < len(form.ends):
                self._emit("call", "}" if opened else "{}")
                return True
            key = yield from self._reader.until(each.middle.strip()[:1])
            if key is None or (yield from self._reader.literal([each.middle])) is None:
                return False
            if each.middle.endswith("\n"):
                yield from self._line_end()
            self._emit("call", (", " if opened else "{") + json.dumps(key, ensure_ascii=False) + ": ")
            opened = True
            if not (yield from self._value((each.after.rstrip(), each.after.strip()), bare=key in bare)):
                return False

    def _line_end(self) -> Reading[None]:
        """The line break that is part of a tag, if it is there."""
        while not self._reader.rest and not self._reader.final:
            yield
        if self._reader.rest.startswith("\n"):
            self._reader.take(1)

    def _value(self, closers: Sequence[str], *, bare: bool) -> Reading[bool]:
        """One argument's value, as JSON; whether it is complete. A closer within a string of it is part of that."""
        reader, collected, value = self._reader, "", JsonEnd()
        if bare:
            self._emit("call", '"')
        while True:
            at, closer = reader.find(closers, cut=True)
            text = reader.take(at)
            if bare:
                self._emit("call", json.dumps(text.translate(_NO_MARKS), ensure_ascii=False)[1:-1])
            else:
                collected += text
                value.feed(text)
            if closer is not None and not bare and value.in_string and collected.lstrip()[:1] in '"[{':
                collected += reader.take(1)
                value.feed(closer[:1])
                continue
            if closer is not None:
                reader.take(len(closer))
                self._emit("call", '"' if bare else _as_json(collected))
                return True
            if reader.final:
                reader.rest = ""
                return False
            yield


def _as_json(text: str) -> str:
    """The value as it was written if it is JSON, else as a string."""
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text.translate(_NO_MARKS), ensure_ascii=False)
    return text.strip()
