"""Phi-4-mini: a JSON list between two control tokens."""

from dataclasses import replace

from ocserve.chat.tool_formats.granite import GRANITE

PHI = replace(GRANITE, name="phi", close="]<|/tool_call|>", signature=("<|tool|>", "<|/tool|>"))
