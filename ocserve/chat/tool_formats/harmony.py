"""gpt-oss ("harmony"): every part of an answer is a message on a channel; a call is one addressed to a function."""

from ocserve.chat.tool_formats.format import ToolFormat

HARMONY = ToolFormat(
    name="harmony",
    trigger="<|channel|>commentary to=functions.",
    begin="<|channel|>commentary to=functions.",
    middle=" <|constrain|>json<|message|>",
    ends=("<|call|>",),
    signature=("<|channel|>", "<|message|>", "functions."),
    rendered_otherwise=True,
    parallel=False,
    say=("<|channel|>final<|message|>", ""),
)
