"""For models whose template has no tools: they are described in a system message, calls are JSON in a tag."""

from __future__ import annotations

from dataclasses import replace

from ocserve.chat.tool_formats.format import ToolFormat
from ocserve.chat.tool_formats.hermes import HERMES

# Models that were never taught to call repeat the same call for as long as they may: one at a time.
GENERIC = replace(HERMES, name="generic", signature=(), parallel=False)

_DESCRIPTION = """\
# Tools

You can call functions. Each line between <tools> and </tools> describes one of them:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments in exactly this form, and nothing after it:
{example}

What a call returned is given to you between <tool_response> and </tool_response>."""


def description(tools: list[str], form: ToolFormat) -> str:
    """The system message: `tools` are the tools as JSON texts, `form` is how calls are to be written."""
    example = form.write([("function_name", '{"argument_name": "value"}')])
    return _DESCRIPTION.format(tools="\n".join(tools), example=example)


def response(contents: list[str]) -> str:
    """The user's message that stands for results of calls."""
    return "\n".join(f"<tool_response>\n{content}\n</tool_response>" for content in contents)
