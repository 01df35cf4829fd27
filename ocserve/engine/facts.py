"""What an engine can say of any model it has loaded."""

from __future__ import annotations

from ocserve.engine import llama, wire
from ocserve.engine.process import gpu_makers


def layers_on_gpus(model: llama.Model) -> int:
    """How many layers GPUs compute, the output being one more."""
    gpu_visible = any(device.is_gpu for device in llama.devices())
    return min(model.gpu_layers_asked, model.layers + 1) if gpu_visible else 0


def model_facts(
    spec: wire.EngineSpec,
    model: llama.Model,
    *,
    pool_tokens: int,
    threads_decode: int,
    threads_prefill: int,
    load_s: float,
) -> wire.EngineFacts:
    """The facts of a model that does not chat; who knows more replaces what they know."""
    gpu_layers = layers_on_gpus(model)
    return wire.EngineFacts(
        architecture=model.metadata("general.architecture") or "unknown",
        description=model.description,
        context=min(spec.context, model.trained_context),
        trained_context=model.trained_context,
        parallel=spec.parallel,
        pool_tokens=pool_tokens,
        vocabulary=model.vocab.size,
        parameters=model.parameters,
        threads_decode=threads_decode,
        threads_prefill=threads_prefill,
        gpu_layers=gpu_layers,
        devices=llama.devices(),
        llama_cpp=llama.version(),
        has_chat_template=False,
        bos=model.vocab.text(model.vocab.bos),
        eos=model.vocab.text(model.vocab.eos),
        unused_gpus=gpu_makers() if spec.gpu_layers != 0 and gpu_layers == 0 else (),
        load_s=load_s,
    )
