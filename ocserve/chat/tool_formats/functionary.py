"""Functionary: v3.1 has a tag that names the function, v3.2 names the recipient of every part (`all` is the user)."""

from ocserve.chat.tool_formats.format import ToolFormat

FUNCTIONARY_V31 = ToolFormat(
    name="functionary_v3.1",
    trigger="<function=",
    begin="<function=",
    middle=">",
    ends=("</function>",),
    signature=("<function=", "</function>"),
)

FUNCTIONARY_V32 = ToolFormat(
    name="functionary_v3.2",
    trigger=">>>",
    begin=">>>",
    middle="\n",
    ends=("",),
    signature=(">>>all",),
    prompted=">>>",
    say=(">>>all\n", ""),
)
