"""The token ids of assistant turns, so that a conversation's next prompt begins with the very tokens that are cached.

A text can be divided into tokens in many ways, and what a model samples need not be how the tokenizer would divide it.
`Turns` keeps the ids that were sampled, `Quoter` puts them where the template writes such a turn into a later prompt.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ocserve.chat.specials import Control, Segment, Text, Verbatim
from ocserve.generation import Message

_KEY_BYTES = 16
_TOKEN_BYTES = 4


class Turns:
    """The least recently used turns go first. Called by the loop's thread and the preparing one.

    Texts are known by keyed digests only, and never across tenants.
    """

    def __init__(self, *, most_turns: int = 4096, most_bytes: int = 8 * 1024 * 1024) -> None:
        self._most_turns = most_turns
        self._most_bytes = most_bytes
        self._secret = secrets.token_bytes(_KEY_BYTES)
        self._lock = threading.Lock()
        self._turns: OrderedDict[bytes, array[int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, salt: bytes, text: str, ids: Sequence[int]) -> None:
        """`text` was generated for a tenant as `ids`."""
        key, turn = self._key(salt, text), array("i", ids)
        with self._lock:
            self._forget(key)
            self._turns[key] = turn
            self._bytes += len(turn) * _TOKEN_BYTES
            while len(self._turns) > self._most_turns or self._bytes > self._most_bytes:
                self._forget(next(iter(self._turns)))

    def recall(self, salt: bytes, text: str) -> tuple[int, ...] | None:
        """The ids as which `text` was last generated for this tenant, if that is still known."""
        key = self._key(salt, text)
        with self._lock:
            turn = self._turns.get(key)
            if turn is None:
                return None
            self._turns.move_to_end(key)
            return tuple(turn)

    def _forget(self, key: bytes) -> None:
        turn = self._turns.pop(key, None)
        if turn is not None:
            self._bytes -= len(turn) * _TOKEN_BYTES

    def _key(self, salt: bytes, text: str) -> bytes:
        framed = len(salt).to_bytes(8, "little") + salt + text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(framed, key=self._secret, digest_size=_KEY_BYTES).digest()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a template writes right before an assistant's words: a control token, text after it, or both."""

    control: Control | None
    text: str

    @classmethod
    def of(cls, one: Sequence[Segment], other: Sequence[Segment]) -> Opening | None:
        """What two prompts for an answer, to messages that end differently, end with; None if there is nothing."""
        if not one or not other:
            return None
        if isinstance(one[-1], Control):
            return cls(one[-1], "")
        before = one[-2] if len(one) > 1 else None
        if isinstance(before, Control) and one[-1].text == other[-1].text:
            return cls(before, one[-1].text)
        text = _common_end(one[-1].text, other[-1].text)
        return cls(None, text) if text else None

    def ends(self, segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
        """Where an assistant's words may begin: index of a segment and offset in its text, in order."""
        for index, segment in enumerate(segments):
            if not isinstance(segment, Text):
                continue
            if self.control is not None:
                if index > 0 and segments[index - 1] == self.control and segment.text.startswith(self.text):
                    yield index, len(self.text)
                continue
            found = segment.text.find(self.text)
            while found >= 0:
                yield index, found + len(self.text)
                found = segment.text.find(self.text, found + 1)


@dataclass(frozen=True, slots=True)
class Quoter:
    """Puts the tokens of remembered turns in place of their text.

    The prompt's text does not change, and its control tokens stay the template's own: tokens in `forbidden` are not
    taken. `apart` is whether the vocabulary tokenises the rest of a text as it is; some begin every text with a space.
    """

    opening: Opening
    piece: Callable[[int], bytes]
    forbidden: frozenset[int]
    apart: bool

    def quote(
        self,
        segments: Sequence[Segment],
        messages: Sequence[Message],
        recall: Callable[[str], tuple[int, ...] | None],
    ) -> list[Segment]:
        """The segments of a prompt made of `messages`, with former answers as they were sampled.

        A turn is found where an opening is followed by its content, as it is or trimmed. Of its tokens the first ones
        are taken that spell what the template wrote.
        """
        quoted: dict[int, list[tuple[int, Verbatim]]] = {}
        for message, index, start in self._turns(segments, messages):
            ids = recall(message.content)
            if ids is None:
                continue
            text = segments[index].text[start:]
            words = self._spelled(text, ids)
            if words.ids and (self.apart or len(words.text) == len(text)):
                quoted.setdefault(index, []).append((start, words))
        return [part for index, segment in enumerate(segments) for part in _parts(segment, quoted.get(index, []))]

    def _turns(self, segments: Sequence[Segment], messages: Sequence[Message]) -> Iterator[tuple[Message, int, int]]:
        """Each assistant's message with the segment and the offset where the template wrote it, in order."""
        places, done = self.opening.ends(segments), (0, 0)
        for message in messages:
            if message.role != "assistant" or not message.content.strip():
                continue
            forms = (message.content.rstrip(), message.content.strip())
            for index, start in places:
                if (index, start) >= done and segments[index].text.startswith(forms, start):
                    yield message, index, start
                    done = (index, start + len(forms[1]))
                    break

    def _spelled(self, text: str, ids: Sequence[int]) -> Verbatim:
        """The beginning of `text` that the first of `ids` spell, up to a border of both tokens and characters."""
        data = text.encode()
        taken = end = whole = 0
        for count, token in enumerate(ids, start=1):
            part = self.piece(token)
            if not part or token in self.forbidden or not data.startswith(part, end):
                break
            end += len(part)
            if end == len(data) or data[end] & 0xC0 != 0x80:  # not inside a character
                taken, whole = count, end
        return Verbatim(data[:whole].decode(), tuple(ids[:taken]))


def _parts(segment: Segment, quoted: Sequence[tuple[int, Verbatim]]) -> Iterator[Segment]:
    if not isinstance(segment, Text) or not quoted:
        yield segment
        return
    done = 0
    for start, words in quoted:
        if start > done:
            yield segment.part(done, start)
        yield words
        done = start + len(words.text)
    if done < len(segment.text):
        yield segment.part(done, len(segment.text))


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
