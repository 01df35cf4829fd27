"""What is known of how one model structures its answers: its thoughts, its words and its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

from ocserve.chat.marks import Marks
from ocserve.chat.reasoning import ReasoningFormat
from ocserve.chat.tool_formats import ArgumentSyntax, ToolFormat


@dataclass(frozen=True, slots=True)
class Speech:
    """`reasoning` is None for a model that does not think. All texts are in the form that `marks` gives them."""

    tools: ToolFormat
    reasoning: ReasoningFormat | None
    marks: Marks

    @classmethod
    def of(
        cls,
        tools: ToolFormat,
        reasoning: ReasoningFormat | None,
        controls: Mapping[str, int],
        ends: frozenset[int] = frozenset(),
    ) -> Speech:
        """`controls` maps the text of every control token of the vocabulary to its id; `ends` end an answer."""
        forms = [tools, *([tools.other] if tools.other is not None else [])]
        thoughts = (reasoning.begin, reasoning.end, *reasoning.silent) if reasoning is not None else ()
        marks = Marks(controls, chain(*(form.texts() for form in forms), thoughts), ends)
        return cls(_marked_tools(tools, marks), _marked_reasoning(reasoning, marks), marks)

    def continuing(self) -> Speech:
        """The same in a turn that the prompt has begun: it ends with words, not with what new turns begin with."""
        return replace(self, tools=replace(self.tools, prompted=""))


def _marked_reasoning(form: ReasoningFormat | None, marks: Marks) -> ReasoningFormat | None:
    if form is None:
        return None
    silent = tuple(map(marks.marked, form.silent))
    return replace(form, begin=marks.marked(form.begin), end=marks.marked(form.end), silent=silent)


def _marked_tools(form: ToolFormat, marks: Marks) -> ToolFormat:
    each = form.argument
    return replace(
        form,
        trigger=marks.marked(form.trigger),
        opening=marks.marked(form.opening),
        begin=marks.marked(form.begin),
        middle=marks.marked(form.middle),
        ends=tuple(map(marks.marked, form.ends)),
        between=marks.marked(form.between),
        close=marks.marked(form.close),
        prompted=marks.marked(form.prompted),
        say=(marks.marked(form.say[0]), marks.marked(form.say[1])),
        argument=each
        and ArgumentSyntax(marks.marked(each.before), marks.marked(each.middle), marks.marked(each.after)),
        other=form.other and _marked_tools(form.other, marks),
    )
