"""GLM 4.5 and later: keys and values in tags of their own."""

from ocserve.chat.tool_formats.format import ArgumentSyntax, ToolFormat
from ocserve.chat.tool_formats.hermes import HERMES

GLM = ToolFormat(
    name="glm",
    trigger="<tool_call>",
    begin="<tool_call>",
    middle="\n",
    ends=("</tool_call>",),
    between="\n",
    signature=("<tool_call>", "<arg_key>", "<arg_value>"),
    argument=ArgumentSyntax(before="<arg_key>", middle="</arg_key>\n<arg_value>", after="</arg_value>\n"),
    other=HERMES,
)
