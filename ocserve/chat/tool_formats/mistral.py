"""Mistral: a control token, then a JSON list (to Nemo and Large 2), or name and arguments (Small 3 and later)."""

from ocserve.chat.marks import ID
from ocserve.chat.tool_formats.format import ToolFormat

MISTRAL_LIST = ToolFormat(
    name="mistral_list",
    trigger="[TOOL_CALLS]",
    opening="[TOOL_CALLS][",
    begin='{"name": "',
    middle='", "arguments": ',
    ends=("}", f', "id": "{ID}"}}'),
    between=", ",
    close="]",
    id_pattern="[a-zA-Z0-9]{9}",
    signature=("[TOOL_CALLS]",),
)

MISTRAL = ToolFormat(
    name="mistral",
    trigger="[TOOL_CALLS]",
    begin="[TOOL_CALLS]",
    middle="[ARGS]",
    ends=("",),
    signature=("[TOOL_CALLS]", "[ARGS]"),
)

MISTRAL_ID = ToolFormat(
    name="mistral_id",
    trigger="[TOOL_CALLS]",
    begin="[TOOL_CALLS]",
    middle=f"[CALL_ID]{ID}[ARGS]",
    ends=("",),
    id_pattern="[a-zA-Z0-9]{9}",
    signature=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
