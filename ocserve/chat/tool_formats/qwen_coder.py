"""Qwen3-Coder, Qwen3.5, Nemotron 3 and Seed-OSS: a tag for the function and one for each argument."""

from dataclasses import replace

from ocserve.chat.tool_formats.format import ArgumentSyntax, ToolFormat
from ocserve.chat.tool_formats.hermes import HERMES

QWEN_CODER = ToolFormat(
    name="qwen_coder",
    trigger="<tool_call>",
    begin="<tool_call>\n<function=",
    middle=">\n",
    ends=("</function>\n</tool_call>",),
    between="\n",
    signature=("<tool_call>", "<function=", "<parameter="),
    argument=ArgumentSyntax(before="<parameter=", middle=">\n", after="\n</parameter>\n"),
    other=HERMES,
)

SEED = ToolFormat(
    name="seed",
    trigger="<seed:tool_call>",
    begin="<seed:tool_call>\n<function=",
    middle=">\n",
    ends=("</function>\n</seed:tool_call>",),
    between="\n",
    signature=("<seed:tool_call>",),
    argument=ArgumentSyntax(before="<parameter=", middle=">", after="</parameter>\n"),
    other=replace(
        HERMES,
        name="seed_json",
        trigger="<seed:tool_call>",
        begin='<seed:tool_call>\n{"name": "',
        ends=("}\n</seed:tool_call>",),
    ),
)
