"""Gemma 4. Its models write arguments in a notation of their own; here they are JSON, of which every value is checked.

(Gemma 2 and 3 have no tools in their template: the generic format.)
"""

from ocserve.chat.tool_formats.format import ToolFormat

GEMMA = ToolFormat(
    name="gemma",
    trigger="<|tool_call>",
    begin="<|tool_call>call:",
    middle="",
    ends=("<tool_call|>",),
    signature=("<|tool_call>call:", "<tool_call|>"),
    rendered_otherwise=True,
)
