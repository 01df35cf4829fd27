"""A model's chat template: messages and tools in, the prompt's segments out; and how the model will answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from ocserve.chat import reasoning
from ocserve.chat.budget import Budget
from ocserve.chat.channels import Channels
from ocserve.chat.messages import (
    PROBE,
    PROBE_NAME,
    PROBE_SYSTEM,
    PROBE_TOOL,
    PROBES_CONTENT,
    PROBES_LATER_SYSTEM,
    Convention,
    Rewrite,
    probe_call,
    template_messages,
    template_tools,
)
from ocserve.chat.sandbox import Program, rendering_budget
from ocserve.chat.specials import Control, Guard, Place, Segment, SpecialTokens, placed
from ocserve.chat.speech import Speech
from ocserve.chat.tool_formats import FORMATS, GENERIC, ToolFormat
from ocserve.errors import InvalidRequest
from ocserve.generation import Message, Reasoning, Tool

_NO_REASONING = Reasoning()
# Clients know more degrees of effort than templates do.
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}


class ChatTemplate:
    """One model's compiled template. Threads may share it; renderings take turns."""

    def __init__(self, source: str, *, bos: str, eos: str, specials: SpecialTokens) -> None:
        """Raises TemplateUnusable for a source that does not compile."""
        self._specials = specials
        self._program = Program(source)
        self._foreign = source + bos + eos
        self._variables: dict[str, object] = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._convention = Convention(writes_calls=True, writes_results=True, describes_tools=True)
        if not self._accepts(PROBE):
            # Some templates take an absent list of tools for an empty one, but not a null.
            del self._variables["tools"], self._variables["documents"]
        self._convention = self._find_convention(source)
        self.reads = self._find_reads()
        self.reasoning = reasoning.detect(source)

    @property
    def tool_format(self) -> ToolFormat:
        """How this model writes calls."""
        return self._convention.form

    def render(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...] = (),
        reasoning: Reasoning = _NO_REASONING,
    ) -> tuple[Segment, ...]:
        """The prompt for an answer to the messages, or, where the last is the assistant's, for its continuation.

        The text of a continuation ends with that message's content and nothing after it. Raises InvalidRequest,
        never with the client's text in it, where the template refuses or cannot render the messages.
        """
        if not messages:
            raise InvalidRequest("At least one message is needed.", param="messages")
        if messages[-1].role == "assistant" and messages[-1].tool_calls:
            raise InvalidRequest(
                "The last message has tool calls without their results; it cannot be continued.", param="messages"
            )
        strings: list[str] = [self._foreign]

        def collect(text: str) -> str:
            strings.append(text)
            return text

        self._turns(messages, tools, collect, "")
        guard = Guard(self._specials, strings)
        size = sum(map(len, strings))
        variables = _reasoning_variables(reasoning)

        def prompt(rewrite: Rewrite) -> tuple[Segment, ...]:
            budget = rendering_budget(messages=len(messages), input_bytes=2 * size)
            turns, given = self._turns(messages, tools, rewrite, guard.image_mark)
            rendered = self._prompt(turns, {**variables, **given}, guard.end_mark, budget)
            return tuple(placed(self._specials.partition(rendered, guard.nonce), guard.image_mark))

        segments = prompt(guard.protect)
        if guard.broken and _count(segments, Control) != _count(prompt(guard.blank), Control):
            raise InvalidRequest(
                "The messages contain the text of control tokens, and this model's chat template does not keep it"
                " apart from its own.",
                param="messages",
            )
        if _count(segments, Place) != sum(len(message.images) for message in messages):
            raise InvalidRequest("This model's chat template has no place for these images.", param="messages")
        return segments

    def _turns(
        self, messages: tuple[Message, ...], tools: tuple[Tool, ...], rewrite: Rewrite, image_mark: str
    ) -> tuple[list[dict[str, object]], dict[str, object]]:
        """The messages as the template reads them, and the variables for the tools."""
        turns = template_messages(messages, tools, self._convention, rewrite, image_mark)
        if not tools or not self._convention.describes_tools:
            return turns, {}
        return turns, {"tools": template_tools(tools, rewrite)}

    def _prompt(
        self, turns: list[dict[str, object]], variables: Mapping[str, object], end_mark: str, budget: Budget
    ) -> str:
        if turns[-1]["role"] != "assistant":
            return self._run(turns, variables, budget, add_generation_prompt=True)
        return self._continuation(turns, variables, budget, end_mark)

    def _continuation(
        self, turns: list[dict[str, object]], variables: Mapping[str, object], budget: Budget, end_mark: str
    ) -> str:
        """The conversation up to the end of its last content.

        1. The template writes the last turn as it writes history; the text is cut after the content.
        2. Where it refuses that, or changes the content, the content follows the generation prompt.
        """
        content = str(turns[-1]["content"])
        # `prefix` is how templates of Mistral's family are told that the turn is to be continued.
        marked: dict[str, object] = {**turns[-1], "content": content + end_mark, "prefix": True}
        refusal: InvalidRequest | None = None
        try:
            rendered = self._run([*turns[:-1], marked], variables, budget, add_generation_prompt=False)
        except InvalidRequest as error:
            refusal = error
        else:
            head, *rest = rendered.split(end_mark)
            if len(rest) == 1 and head.endswith((content, content.lstrip())):
                return head
        try:
            return self._run(turns[:-1], variables, budget, add_generation_prompt=True) + content
        except InvalidRequest as error:
            raise (refusal or error) from None

    def _run(
        self,
        turns: list[dict[str, object]],
        variables: Mapping[str, object],
        budget: Budget,
        *,
        add_generation_prompt: bool,
    ) -> str:
        if self._convention.content_in_parts:
            turns = [_in_parts(turn) if turn["role"] in self._convention.content_in_parts else turn for turn in turns]
        given = {**self._variables, **variables, "messages": turns, "add_generation_prompt": add_generation_prompt}
        return self._program.run(given, budget)

    # --- what the template can do, found by trying ------------------------------------------------------------------

    def _find_convention(self, source: str) -> Convention:
        self._convention = self._find_content(Convention("developer" in source))
        found = self._find_calls(self._convention)
        self._convention = found
        describes = self._accepts(PROBE, "probe_tool", "probe_key", tools=(PROBE_TOOL,))
        form = self._find_form(source, found) if describes or found.writes_calls else GENERIC
        return replace(
            found,
            short_ids=found.writes_calls and not self._accepts(probe_call("call_of_the_probe"), "probe_name"),
            knows_system=self._accepts(PROBE_SYSTEM, "probe_system"),
            knows_later_system=all(
                self._accepts(probe, "probe_system", "probe_later") for probe in PROBES_LATER_SYSTEM
            ),
            describes_tools=describes and form is not GENERIC,
            writes_calls=found.writes_calls and form is not GENERIC,
            writes_results=found.writes_calls and form is not GENERIC and self._writes_results(),
            form=form,
        )

    def _find_content(self, found: Convention) -> Convention:
        """Which roles' contents have to be lists of parts: as text they are lost, and so they arrive."""
        for role, (text, probe) in PROBES_CONTENT.items():
            self._convention = found
            if not self._accepts(probe, text):
                self._convention = replace(found, content_in_parts=found.content_in_parts | {role})
                found = self._convention if self._accepts(probe, text) else found
        return found

    def _find_calls(self, found: Convention) -> Convention:
        """Try how the template wants a turn with tool calls; the first form whose parts all arrive is taken."""
        base = replace(found, writes_calls=True, writes_results=True, describes_tools=True)
        for null_content in (False, True):
            for as_object in (True, False):
                self._convention = replace(base, arguments_as_object=as_object, null_content_of_calls=null_content)
                if self._accepts(probe_call("probe0001"), "probe_name", "probe_key", "probe_value"):
                    return self._convention
        return replace(base, writes_calls=False)

    def _writes_results(self) -> bool:
        return self._accepts(probe_call("probe0001"), "probe_result")

    def _find_form(self, source: str, convention: Convention) -> ToolFormat:
        """The format that reads what the template itself writes; else the one that its source speaks of."""
        rendered = self._try(probe_call("probe0001")) if convention.writes_calls else None
        if rendered is not None:
            read = next((form for form in FORMATS if _reads_probe(form, rendered)), None)
            if read is not None:
                return read
        named = (form for form in FORMATS if all(part in source for part in form.signature))
        return next((form for form in named if rendered is None or form.rendered_otherwise), GENERIC)

    def _find_reads(self) -> frozenset[str]:
        """The labels of messages that reach the prompt; the template passes over the others."""
        probes = {
            "name": self._accepts(PROBE_NAME, "probe_name"),
            "tool_call_id": self._accepts(probe_call("probe0001"), "probe0001"),
        }
        return frozenset(name for name, is_read in probes.items() if is_read)

    def _accepts(self, messages: tuple[Message, ...], *expected: str, tools: tuple[Tool, ...] = ()) -> bool:
        rendered = self._try(messages, tools)
        # Python's way of writing a dict is no model's: there the template wanted the JSON text.
        return rendered is not None and all(part in rendered for part in expected) and "{'" not in rendered

    def _try(self, messages: tuple[Message, ...], tools: tuple[Tool, ...] = ()) -> str | None:
        turns, variables = self._turns(messages, tools, str, "")
        try:
            return self._run(turns, variables, rendering_budget(), add_generation_prompt=True)
        except InvalidRequest:
            return None


def _reasoning_variables(wanted: Reasoning) -> dict[str, object]:
    """What templates call it: Qwen's and most others' `enable_thinking`, Granite's and DeepSeek's `thinking`."""
    variables: dict[str, object] = {}
    enabled = False if wanted.effort == "none" else wanted.enabled
    if enabled is None and wanted.effort is not None:
        enabled = True
    if enabled is not None:
        variables |= {"enable_thinking": enabled, "thinking": enabled}
    if wanted.effort is not None and wanted.effort != "none":
        variables["reasoning_effort"] = _EFFORTS.get(wanted.effort, wanted.effort)
    return variables


def _in_parts(turn: dict[str, object]) -> dict[str, object]:
    content = turn["content"]
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _reads_probe(form: ToolFormat, rendered: str) -> bool:
    """Whether the form finds the probe's call, and only that, in the text of a prompt."""
    alone = replace(form, other=None)
    if form.whole_answer:
        rendered = rendered[max(rendered.find(form.begin + "probe_name"), 0) :]
    channels = Channels(Speech.of(alone, None, {}), tools={"probe_name": frozenset({"probe_key"})})
    parts = [part for part in (*channels.feed(rendered), *channels.finish()) if part.channel == "call"]
    try:
        arguments = json.loads("".join(part.text for part in parts))
    except ValueError:
        return False
    return bool(arguments == {"probe_key": "probe_value"})


def _count(segments: tuple[Segment, ...], kind: type[Control | Place]) -> int:
    return sum(isinstance(segment, kind) for segment in segments)
