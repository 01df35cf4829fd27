"""Llama 3.1 to 3.3: the answer is one JSON object, and there is no mark before it."""

from ocserve.chat.tool_formats.format import ToolFormat

LLAMA = ToolFormat(
    name="llama",
    trigger='{"name": "',
    begin='{"name": "',
    middle='", "parameters": ',
    ends=("}",),
    signature=('"parameters": ', "Environment: ipython"),
    whole_answer=True,
    parallel=False,
)
