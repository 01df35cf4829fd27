"""DeepSeek: V2, V2.5, V3 and R1 with JSON in a code block, V3.1 without."""

from ocserve.chat.tool_formats.format import ToolFormat

DEEPSEEK = ToolFormat(
    name="deepseek",
    trigger="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    middle="\n```json\n",
    ends=("\n```<｜tool▁call▁end｜>",),
    between="\n",
    close="<｜tool▁calls▁end｜>",
    signature=("<｜tool▁calls▁begin｜>", "```"),
)

DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v3.1",
    trigger="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁call▁begin｜>",
    middle="<｜tool▁sep｜>",
    ends=("<｜tool▁call▁end｜>",),
    close="<｜tool▁calls▁end｜>",
    signature=("<｜tool▁calls▁begin｜>",),
)
