"""The tool formats of model families, one module each. To add one: its module, and its name in `FORMATS`."""

from ocserve.chat.tool_formats.command_r import COMMAND_R, COMMAND_R7B
from ocserve.chat.tool_formats.deepseek import DEEPSEEK, DEEPSEEK_V31
from ocserve.chat.tool_formats.format import ArgumentSyntax, ToolFormat
from ocserve.chat.tool_formats.functionary import FUNCTIONARY_V31, FUNCTIONARY_V32
from ocserve.chat.tool_formats.gemma import GEMMA
from ocserve.chat.tool_formats.generic import GENERIC
from ocserve.chat.tool_formats.glm import GLM
from ocserve.chat.tool_formats.granite import GRANITE
from ocserve.chat.tool_formats.harmony import HARMONY
from ocserve.chat.tool_formats.hermes import HERMES
from ocserve.chat.tool_formats.lists import FIREFUNCTION, KIMI, NEMOTRON
from ocserve.chat.tool_formats.llama import LLAMA
from ocserve.chat.tool_formats.minimax import MINIMAX
from ocserve.chat.tool_formats.mistral import MISTRAL, MISTRAL_ID, MISTRAL_LIST
from ocserve.chat.tool_formats.phi import PHI
from ocserve.chat.tool_formats.qwen_coder import QWEN_CODER, SEED

# The more particular before the more general: the first one that fits is taken.
FORMATS: tuple[ToolFormat, ...] = (
    HARMONY,
    GEMMA,
    KIMI,
    DEEPSEEK,
    DEEPSEEK_V31,
    COMMAND_R7B,
    COMMAND_R,
    MISTRAL_ID,
    MISTRAL,
    MISTRAL_LIST,
    SEED,
    QWEN_CODER,
    GLM,
    MINIMAX,
    NEMOTRON,
    FIREFUNCTION,
    FUNCTIONARY_V32,
    FUNCTIONARY_V31,
    GRANITE,
    PHI,
    HERMES,
    LLAMA,
)

__all__ = ["FORMATS", "GENERIC", "ArgumentSyntax", "ToolFormat"]
