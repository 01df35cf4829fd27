"""What a tool format is: data that tells how a model of one family writes its calls.

A call reads `begin NAME middle ARGUMENTS end`; calls are joined by `between`, and `opening … close` surround them all.
Both the reader (`channels`) and the grammar (`grammar`) follow these texts, so a family is one value of `ToolFormat`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields

from ocserve.chat.marks import ID


@dataclass(frozen=True, slots=True)
class ArgumentSyntax:
    """Arguments one by one instead of as a JSON object: `before KEY middle VALUE after`.

    A value of type string is its bare text, any other is JSON.
    """

    before: str
    middle: str
    after: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written. White space in the texts is what the model learned; readers ignore it.

    `trigger` is where text turns into calls: the beginning of `opening + begin`, and enough to tell them from words.
    `ends`: the first one is written, all are read. `ID` in a text stands for an id in the form of `id_pattern`.
    `signature` are parts of the template's source by which the format is known where the template does not write calls,
    or, `rendered_otherwise`, not as the model does. With `whole_answer`, a call is all that there is in an answer.
    `prompted` is what the prompt already ends with. `say` surrounds words that are meant for the user. `other` is the
    form used for a schema whose arguments cannot be written one by one; it has the same trigger. Without `parallel`,
    its models make one call at a time.
    """

    name: str
    trigger: str
    begin: str
    middle: str
    ends: tuple[str, ...]
    opening: str = ""
    between: str = ""
    close: str = ""
    id_pattern: str = "[0-9]{1,3}"
    signature: tuple[str, ...] = ()
    rendered_otherwise: bool = False
    whole_answer: bool = False
    parallel: bool = True
    prompted: str = ""
    say: tuple[str, str] = ("", "")
    argument: ArgumentSyntax | None = None
    other: ToolFormat | None = None

    def __post_init__(self) -> None:
        assert (self.opening + self.begin).startswith(self.trigger)
        assert self.other is None or self.other.trigger == self.trigger

    @property
    def end(self) -> str:
        return self.ends[0]

    def texts(self) -> Iterator[str]:
        """Every text of the format that may hold a control token."""
        for part in (self, self.argument):
            for field in fields(part) if part is not None else ():
                value = getattr(part, field.name)
                if isinstance(value, str) and field.name not in ("name", "id_pattern"):
                    yield value
        yield from (*self.ends, *self.say)

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Calls (name, JSON text of the arguments) as the model would write them."""
        written = [
            self._write(name, arguments).replace(ID, str(index)) for index, (name, arguments) in enumerate(calls)
        ]
        return self.opening + self.between.join(written) + self.close

    def _write(self, name: str, arguments: str) -> str:
        body = arguments
        if self.argument is not None:
            each = self.argument
            body = "".join(
                each.before + key + each.middle + (value if isinstance(value, str) else json.dumps(value)) + each.after
                for key, value in json.loads(arguments).items()
            )
        return self.begin + name + self.middle + body + self.end
