"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections import deque


class StopStrings:
    """Lets a text through up to its first stop string, the same whatever the borders between its pieces are.

    The text ends where a stop string is complete for the first time: after "\\n" where "\\n" and "\\n\\n" are given, so
    that the generation can end at that very token. Where several are complete at the same character, the longest
    counts. The stop string is not part of the text; `matched` names it, and nothing comes out from then on. What may
    still become a stop string is held back, and nothing else is.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._automaton = _Automaton(stop) if stop else None
        self._state = 0
        self._held = ""
        self._cut = ""  # the stop string and what came with it
        self.matched: str | None = None

    @property
    def withheld(self) -> int:
        """How many of the last characters did not come out: held back so far, or the stop string on."""
        return len(self._held) + len(self._cut)

    def release(self) -> str:
        """What is held back: the text ends here, or something else comes before it goes on."""
        self._state = 0
        held, self._held = self._held, ""
        return held

    def advance(self, text: str) -> str:
        """The text that is certain now."""
        if self.matched is not None:
            return ""
        if self._automaton is None or not text:
            return text
        state = self._state
        for index, char in enumerate(text):
            state = self._automaton.step(state, char)
            match = self._automaton.matches[state]
            if match is not None:
                self.matched = match
                known = self._held + text
                visible = len(self._held) + index + 1 - len(match)
                self._held, self._cut = "", known[visible:]
                return known[:visible]
        self._state = state
        known = self._held + text
        certain = len(known) - self._automaton.depths[state]
        self._held = known[certain:]
        return known[:certain]


class _Automaton:
    """Aho and Corasick's: a state is the longest end of the text so far that begins a stop string.

    `depths` are the lengths of those ends, `matches` the longest stop string that ends there. A step costs amortised
    constant time, so a stream costs time in proportion to its new text only.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        assert all(words), "a stop string is never empty"
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for word in words:
            self._add(word)
        self._link()

    def step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)

    def _add(self, word: str) -> None:
        state = 0
        for depth, char in enumerate(word, start=1):
            following = self._next[state].get(char)
            if following is None:
                following = len(self._next)
                self._next[state][char] = following
                self._next.append({})
                self._fallback.append(0)
                self.depths.append(depth)
                self.matches.append(None)
            state = following
        self.matches[state] = word

    def _link(self) -> None:
        # Breadth first: the fallback of a state is shorter, so it is linked already.
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, following in self._next[state].items():
                self._fallback[following] = self.step(self._fallback[state], char)
                if self.matches[following] is None:
                    self.matches[following] = self.matches[self._fallback[following]]
                waiting.append(following)
