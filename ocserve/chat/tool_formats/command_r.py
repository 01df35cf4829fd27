"""Cohere: Command R and R+ announce a list of actions, Command R7B and A have control tokens for it."""

from ocserve.chat.marks import ID
from ocserve.chat.tool_formats.format import ToolFormat

COMMAND_R = ToolFormat(
    name="command_r",
    trigger="Action:\n```json",
    opening="Action:\n```json\n[\n",
    begin='    {\n        "tool_name": "',
    middle='",\n        "parameters": ',
    ends=("\n    }",),
    between=",\n",
    close="\n]\n```",
    signature=("Action:", "tool_name", "```json"),
)

COMMAND_R7B = ToolFormat(
    name="command_r7b",
    trigger="<|START_ACTION|>",
    opening="<|START_ACTION|>[\n",
    begin=f'    {{"tool_call_id": "{ID}", "tool_name": "',
    middle='", "parameters": ',
    ends=("}",),
    between=",\n",
    close="\n]<|END_ACTION|>",
    signature=("<|START_ACTION|>",),
    say=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
