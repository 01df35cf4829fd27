"""IBM Granite 3: a JSON list behind a control token. (Granite 4 writes as Hermes does.)"""

from ocserve.chat.tool_formats.format import ToolFormat

GRANITE = ToolFormat(
    name="granite",
    trigger="<|tool_call|>",
    opening="<|tool_call|>[",
    begin='{"name": "',
    middle='", "arguments": ',
    ends=("}",),
    between=", ",
    close="]",
    signature=("<|tool_call|>", "available_tools"),
)
