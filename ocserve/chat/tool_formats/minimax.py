"""MiniMax M2: calls in one tag of their own, each a tag with the function's name and one for each argument."""

from ocserve.chat.tool_formats.format import ArgumentSyntax, ToolFormat

_JSON = ToolFormat(
    name="minimax_json",
    trigger="<minimax:tool_call>",
    opening="<minimax:tool_call>\n",
    begin='{"name": "',
    middle='", "arguments": ',
    ends=("}\n",),
    close="</minimax:tool_call>",
)
MINIMAX = ToolFormat(
    name="minimax",
    trigger="<minimax:tool_call>",
    opening="<minimax:tool_call>\n",
    begin='<invoke name="',
    middle='">\n',
    ends=("</invoke>\n",),
    close="</minimax:tool_call>",
    signature=("<minimax:tool_call>", "<invoke name="),
    argument=ArgumentSyntax(before='<parameter name="', middle='">', after="</parameter>\n"),
    other=_JSON,
)
