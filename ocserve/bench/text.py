"""Synthetic text: deterministic by seed, sized in tokens of the model that is measured.

Words are frequent short English ones, which nearly every vocabulary has as one token; what a token is worth is learnt
from the target's own usage, so that no tokenizer is needed here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name team minute idea kid body information back
parent face others level office door health person art war history party result change morning reason research
girl guy moment air teacher force education
"""
_WORDS = tuple(_TEXT.split())
_NAMES = ("total", "count", "value", "index", "result", "left", "right", "size", "name", "limit", "start", "item")


@dataclass(frozen=True, slots=True)
class Scale:
    """How words become tokens: `overhead` tokens of template around a prompt, `per_word` tokens for each word."""

    per_word: float = 1.0
    overhead: float = 0.0

    @classmethod
    def fitted(cls, few: tuple[int, int], many: tuple[int, int]) -> Scale:
        """The line through two measured prompts, each (words, tokens)."""
        per_word = (many[1] - few[1]) / (many[0] - few[0])
        if per_word <= 0:
            raise ValueError("more words did not make more tokens")
        return cls(per_word, few[1] - few[0] * per_word)


@dataclass(frozen=True, slots=True)
class Texts:
    """All texts of one pass. The same seed and label give the same text; other labels share no prefix worth caching."""

    seed: str
    scale: Scale = Scale()

    def words(self, label: str, count: int) -> str:
        """`count` words."""
        draw = random.Random(f"{self.seed}/{label}")  # noqa: S311 -- reproducible, not secret
        return " ".join(draw.choices(_WORDS, k=count))

    def prose(self, label: str, tokens: int) -> str:
        """Text of about `tokens` tokens."""
        return self.words(label, max(1, round(tokens / self.scale.per_word)))

    def code(self, label: str, tokens: int) -> str:
        """A Python-like function of about `tokens` tokens (a line counts as ten) and the wish to rename one name."""
        draw = random.Random(f"{self.seed}/{label}")  # noqa: S311 -- reproducible, not secret
        lines = [f"def {draw.choice(_WORDS)}_{draw.randrange(1000)}(start, limit):", "    total = 0"]
        lines += [
            f"    {draw.choice(_NAMES)} = {draw.choice(_NAMES)} + {draw.choice(_WORDS)} * {draw.randrange(100)}"
            for _ in range(max(1, round(tokens / 10) - 3))
        ]
        listing = "\n".join([*lines, "    return total"])
        return f"Repeat this code exactly, but rename `limit` to `end`.\n```python\n{listing}\n```"
