"""Families that write a JSON list of calls behind a mark of their own: Nemotron Nano 2, Firefunction 2, Kimi K2's
sections."""

from dataclasses import replace

from ocserve.chat.marks import ID
from ocserve.chat.tool_formats.format import ToolFormat
from ocserve.chat.tool_formats.granite import GRANITE

NEMOTRON = replace(
    GRANITE,
    name="nemotron",
    trigger="<TOOLCALL>",
    opening="<TOOLCALL>[",
    close="]</TOOLCALL>",
    signature=("<TOOLCALL>",),
)
FIREFUNCTION = replace(
    GRANITE, name="firefunction", trigger="functools[", opening="functools[", signature=("functools[",)
)
KIMI = ToolFormat(
    name="kimi",
    trigger="<|tool_calls_section_begin|>",
    opening="<|tool_calls_section_begin|>",
    begin="<|tool_call_begin|>functions.",
    middle=f":{ID}<|tool_call_argument_begin|>",
    ends=("<|tool_call_end|>",),
    close="<|tool_calls_section_end|>",
    signature=("<|tool_calls_section_begin|>",),
)
