"""Hermes 2 and 3, Qwen 2.5 and 3, and most templates that followed them: JSON in a tag for each call."""

from ocserve.chat.tool_formats.format import ToolFormat

HERMES = ToolFormat(
    name="hermes",
    trigger="<tool_call>",
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    ends=("}\n</tool_call>",),
    between="\n",
    signature=("<tool_call>", "arguments"),
)
