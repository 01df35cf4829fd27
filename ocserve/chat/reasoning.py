"""How models mark what they think before they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """`begin` and `end` surround a thought. `signature` are parts of a template's source that tell the format.

    `silent` are further marks of such models that belong to no channel. With `repeats`, an answer may think again
    after words; elsewhere a thought comes first or not at all.
    """

    name: str
    begin: str
    end: str
    signature: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    repeats: bool = False


THINK = ReasoningFormat(name="think", begin="<think>", end="</think>", signature=("</think>",))

# The first whose signature a template has is the model's.
FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        name="harmony",
        begin="<|channel|>analysis<|message|>",
        end="<|end|><|start|>assistant",
        signature=("<|channel|>analysis<|message|>",),
        silent=("<|channel|>commentary<|message|>", "<|end|><|start|>assistant", "<|end|>"),
        repeats=True,
    ),
    ReasoningFormat(name="gemma", begin="<|channel>thought\n", end="<channel|>", signature=("<|channel>thought",)),
    ReasoningFormat(
        name="command_r7b",
        begin="<|START_THINKING|>",
        end="<|END_THINKING|>",
        signature=("<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    ReasoningFormat(name="mistral", begin="[THINK]", end="[/THINK]", signature=("[THINK]", "[/THINK]")),
    ReasoningFormat(
        name="seed",
        begin="<seed:think>",
        end="</seed:think>",
        signature=("seed:think",),
    ),
    ReasoningFormat(
        name="granite",
        begin="<think>",
        end="</think>",
        signature=("</think>", "between <response></response>"),
        silent=("<response>", "</response>"),
    ),
    THINK,
)


def detect(source: str) -> ReasoningFormat | None:
    """The format of a template's model, if it thinks."""
    for form in FORMATS:
        if all(part in source for part in form.signature):
            return form
    return None
