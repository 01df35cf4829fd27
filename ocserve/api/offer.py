"""What a model offers its clients, in the words of listings: parameters, features, quantisation, prices.

Parameters come from the tables that requests are read by, so what is listed is what is enforced.
"""

from __future__ import annotations

from ocserve.api import openai_chat, openai_completions, openai_embeddings
from ocserve.api.fields import Field
from ocserve.generation import Sampling
from ocserve.modelcard import Capability, ServedModel

# About the request, not about the answer.
_TRANSPORT = frozenset(
    {"model", "messages", "prompt", "input", "stream", "stream_options", "suffix", "echo", "best_of", "service_tier"}
)
# Accepted from everybody, but of use only where the model has it.
_NEEDS: dict[str, Capability] = {
    "tools": "tools",
    "tool_choice": "tools",
    "parallel_tool_calls": "tools",
    "functions": "tools",
    "function_call": "tools",
    "reasoning": "reasoning",
    "reasoning_effort": "reasoning",
    "include_reasoning": "reasoning",
    "chat_template_kwargs": "reasoning",
}
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "top_a", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "stop", "seed", "max_tokens", "logit_bias",
)  # fmt: skip
_FEATURES = {
    "tools": "tools",
    "json_mode": "response_format",
    "structured_outputs": "response_format",
    "logprobs": "logprobs",
    "reasoning": "reasoning",
}


def parameters(model: ServedModel) -> tuple[Field, ...]:
    """The parameters that have an effect on this model's answers."""
    if "chat" in model.capabilities:
        table = openai_chat.PARAMETERS
    elif "completion" in model.capabilities:
        table = openai_completions.PARAMETERS
    elif "embedding" in model.capabilities:
        table = openai_embeddings.PARAMETERS
    else:
        return ()
    return tuple(
        field
        for field in table
        if field.kind == "effective"
        and field.name not in _TRANSPORT
        and _NEEDS.get(field.name, model.capabilities[0]) in model.capabilities
    )


def features(model: ServedModel) -> list[str]:
    """What the model can do beyond text, as provider listings name it."""
    offered = {field.name for field in parameters(model)}
    return [feature for feature, parameter in _FEATURES.items() if parameter in offered]


def default(model: ServedModel, name: str) -> object:
    """What a sampling parameter is where a request is silent; None where there is no such word."""
    chosen = getattr(model.sampling, name, None)
    return getattr(Sampling(), name, None) if chosen is None else chosen


def default_max_tokens(model: ServedModel) -> int:
    """The bound on an answer's tokens where a request is silent."""
    return min(model.default_output_tokens, model.max_output_tokens)


def quantization(model: ServedModel) -> str | None:
    """The listings' word for a GGUF type. 2-, 3-, 5- and 6-bit types have none: null is then the only honest value."""
    name = model.quantisation.upper()
    for prefix, word in (("Q8", "int8"), ("Q4", "int4"), ("IQ4", "int4"), ("MXFP4", "mxfp4")):
        if name.startswith(prefix):
            return word
    return {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(name)
