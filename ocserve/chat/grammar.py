"""The grammar of an answer, for llguidance: thoughts first, then words, calls or a value, as the request wants.

Words are unconstrained up to the mark that begins a call; from there on only a call of a given tool with arguments that
its schema allows can be written. Client's schemas and grammars are parts of their own, so that each can be checked, and
blamed, by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ocserve.chat.arguments import Argument, arguments_schema, separate
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import ArgumentSyntax, ToolFormat
from ocserve.generation import Constraint, JsonConstraint, Tool, ToolChoice

# Of one answer: small models that may go on sometimes never stop.
MOST_CALLS = 32
_SPACE = r"/[ \n]{1,4}/"


@dataclass(frozen=True, slots=True)
class GrammarPart:
    """What `@name` in the grammar means. `tool`: the index of the tool whose arguments it is of, None for the value."""

    name: str
    constraint: Constraint
    tool: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """A Lark grammar and the parts that it refers to."""

    lark: str
    parts: tuple[GrammarPart, ...]


def offered(tools: Sequence[Tool], choice: ToolChoice) -> tuple[tuple[int, Tool], ...]:
    """The tools that may be called, with their index."""
    if choice.mode == "none":
        return ()
    return tuple((index, tool) for index, tool in enumerate(tools) if not choice.names or tool.name in choice.names)


def answer_grammar(
    speech: Speech, tools: Sequence[Tool], choice: ToolChoice, constraint: Constraint | None, *, thinking: bool = False
) -> AnswerGrammar | None:
    """None where nothing is constrained. `thinking`: the prompt ends within a thought."""
    callable_tools = offered(tools, choice)
    if not callable_tools and constraint is None:
        return None
    writer = _Writer(speech, callable_tools, choice)
    return writer.answer(constraint, thinking=thinking)


class _Writer:
    """Writes one grammar. Methods return an expression and note the rules that it needs."""

    def __init__(self, speech: Speech, tools: Sequence[tuple[int, Tool]], choice: ToolChoice) -> None:
        self._reasoning = speech.reasoning
        self._marks = speech.marks
        self._form = speech.tools
        self._tools = tools
        self._choice = choice
        self._rules: dict[str, str] = {"TEXT": r"/(?s:.*)/"}
        self._parts: list[GrammarPart] = []

    def answer(self, constraint: Constraint | None, *, thinking: bool) -> AnswerGrammar:
        free = constraint is None and self._choice.mode == "auto"
        thought = self._thought(thinking=thinking, free=free)
        bodies = []
        if free:
            bodies = self._calls_or_words(self._words(thinking=thinking))
        elif self._tools:
            bodies.append(self._only_calls())
        if constraint is not None and (not self._tools or self._choice.mode == "auto"):
            self._parts.append(GrammarPart("value", constraint))
            begin, end = self._form.say
            bodies.append(f"{self._prompted(begin)} @value {self._literal(end)}")
        rules = {"start": f"{thought} ({' | '.join(bodies)})", **self._rules}
        return AnswerGrammar("".join(f"{name}: {body}\n" for name, body in rules.items()), tuple(self._parts))

    def _literal(self, text: str) -> str:
        return " ".join(self._marks.lark(text, self._form.id_pattern))

    def _prompted(self, text: str) -> str:
        """A text that an answer begins with, without what the prompt ends with."""
        return self._literal(text.removeprefix(self._form.prompted))

    def _rule(self, name: str, body: str) -> str:
        self._rules[name] = body
        return name.partition("[")[0]

    def _up_to(self, name: str, mark: str, text: str = "TEXT") -> str:
        """Any text and the first occurrence of the mark."""
        first, *others = self._marks.lark(mark)
        rule = self._rule(name if first.startswith("<") else f"{name}[lazy]", f"{text} {first}")
        return " ".join((rule, *others))

    # --- thoughts and words -----------------------------------------------------------------------------------------

    def _thought(self, *, thinking: bool, free: bool) -> str:
        if self._reasoning is None:
            return ""
        thought = self._up_to("thought", self._reasoning.end)
        if not free:
            thought = f"{thought} ({self._rule('SPACE', _SPACE)})?"
        return thought if thinking else f"({self._literal(self._reasoning.begin)} {thought})?"

    def _words(self, *, thinking: bool) -> str:
        """Any text; where a thought may come instead and begins with a text, any that does not begin so."""
        if thinking or self._reasoning is None or self._literal(self._reasoning.begin).startswith("<"):
            return "TEXT"
        return self._rule("WORDS", rf"/(?s:.*)/ & ~/\s*{_regex(self._reasoning.begin)}(?s:.*)/")

    def _calls_or_words(self, words: str) -> list[str]:
        form = self._form
        if form.whole_answer:
            return self._whole_answer(words)
        calls = self._calls()
        lead = self._up_to("lead", form.trigger, words)
        begin, end = map(self._literal, form.say)
        if form.prompted:  # the prompt has begun either words or a call
            begin = self._prompted(form.say[0])
            return [f"{begin} {lead} {calls}", f"{self._prompted(form.trigger)} {calls}", f"{begin} {words} {end}"]
        begin, end = f"({begin})?" if begin else "", f"({end})?" if end else ""
        return [f"{begin} {lead} {calls}", f"{begin} {words} {end}"]

    def _whole_answer(self, words: str) -> list[str]:
        """Words are whatever does not begin like a call of one of the tools."""
        form = self._form
        spaced = r"\s*" + r"\s*".join(_regex(character) for character in form.begin if not character.isspace())
        names = "|".join(_regex(tool.name) for _, tool in self._tools)
        free = self._rule("FREE", rf'{self._rules[words]} & ~/{spaced}({names})"(?s:.*)/')
        calls = []
        for index, tool in self._tools:
            head = self._rule(f"HEAD{index}", f"/{spaced}{_regex(tool.name)}/")
            arguments = self._json_arguments(index, tool)
            calls.append(f"{head} {self._literal(form.middle)} {arguments} {self._literal(form.end + form.close)}")
        return [free, *calls]

    # --- calls ------------------------------------------------------------------------------------------------------

    def _only_calls(self) -> str:
        return f"{self._prompted(self._form.trigger)} {self._calls()}"

    def _calls(self) -> str:
        """What follows the trigger: a call, and more of them where that is allowed."""
        form = self._form
        by_form: dict[str, tuple[ToolFormat, list[str]]] = {}
        for index, tool in self._tools:
            used, expression = self._call(index, tool)
            by_form.setdefault(used.name, (used, []))[1].append(self._rule(f"call{index}", expression))
        first: list[str] = []
        following: list[str] = []
        for used, calls in by_form.values():
            any_call = self._rule(f"calls{len(first)}", " | ".join(calls))
            first.append(f"{self._literal((used.opening + used.begin).removeprefix(form.trigger))} {any_call}")
            following.append(f"{self._literal(used.between + used.begin)} {any_call}")
        more = ""
        if self._choice.parallel and form.parallel:
            more = f"({self._rule('more', ' | '.join(following))}){{0,{MOST_CALLS - 1}}}"
        return f"({' | '.join(first)}) {more} {self._literal(form.close)}"

    def _call(self, index: int, tool: Tool) -> tuple[ToolFormat, str]:
        """A call from its name on, and in which form it is written."""
        form = self._form
        if form.argument is not None:
            arguments = separate(tool)
            if arguments is not None:
                each = " ".join(self._argument(form.argument, index, item) for item in enumerate(arguments))
                return form, f"{self._literal(tool.name + form.middle)} {each} {self._literal(form.end)}"
            assert form.other is not None
            form = form.other
        arguments_json = self._json_arguments(index, tool)
        return form, f"{self._literal(tool.name + form.middle)} {arguments_json} {self._literal(form.end)}"

    def _json_arguments(self, index: int, tool: Tool) -> str:
        return self._json(f"arguments{index}", arguments_schema(tool), index)

    def _json(self, name: str, schema: str, tool: int) -> str:
        self._parts.append(GrammarPart(name, JsonConstraint(schema=schema), tool))
        return f"@{name}"

    def _argument(self, syntax: ArgumentSyntax, tool: int, item: tuple[int, Argument]) -> str:
        number, argument = item
        name = f"{tool}_{number}"
        head = self._literal(syntax.before + argument.key + syntax.middle)
        closer = self._literal(syntax.after)
        if argument.kind == "json":
            body = f"{head} {self._json(f'argument{name}', argument.schema, tool)} {closer}"
        elif argument.kind == "choice":
            body = f"{head} ({' | '.join(map(self._literal, argument.choices))}) {closer}"
        else:
            tag = syntax.after.strip()
            value = self._up_to(f"value{name}", tag)
            body = f"{head} {value} {self._literal(syntax.after.partition(tag)[2])}"
        rule = self._rule(f"argument{name}", body)
        return rule if argument.required else f"({rule})?"


def _regex(text: str) -> str:
    """A text as part of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")
