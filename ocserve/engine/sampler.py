"""llama.cpp's sampler chain for one sequence."""

from __future__ import annotations

from collections.abc import Iterable

from ocserve.engine.bindings import LlamaError, api
from ocserve.engine.context import Context
from ocserve.engine.llama import Vocab
from ocserve.generation import Sampling

_GREEDY_BELOW = 1e-3  # dividing logits by less overflows; what is left of the distribution is its top token


class SamplerChain:
    """llama.cpp's sampler chain for one sequence; `sample` also records the token for the penalties."""

    def __init__(self, vocab: Vocab, sampling: Sampling, *, seed: int, window: int, prompt: Iterable[int]) -> None:
        """`window` is how many tokens the penalties remember; `seed` is 64 bits, folded to llama.cpp's 32.

        The repetition penalty counts the prompt, frequency and presence penalties do not (see `Sampling`), hence two
        penalty samplers. The truncating samplers come before the temperature, in llama.cpp's usual order.
        """
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if sampling.logit_bias:
            self._add(_logit_bias(vocab, sampling.logit_bias))
        if sampling.repetition_penalty != 1.0:
            repetition = api.llama_sampler_init_penalties(vocab.size, window, sampling.repetition_penalty, 0.0, 0.0)
            for token in prompt:
                api.llama_sampler_accept(repetition, token)
            self._add(repetition)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._add(
                api.llama_sampler_init_penalties(
                    vocab.size, window, 1.0, sampling.frequency_penalty, sampling.presence_penalty
                )
            )
        if sampling.temperature < _GREEDY_BELOW:
            self._add(api.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            self._add(api.llama_sampler_init_top_k(min(sampling.top_k, vocab.size)))
        if sampling.top_p < 1:
            self._add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.temperature != 1:
            self._add(api.llama_sampler_init_temp(sampling.temperature))
        self._add(api.llama_sampler_init_dist(_fold(seed)))

    def _add(self, sampler: object) -> None:
        if not sampler:
            raise LlamaError("llama.cpp refused a sampler")
        api.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, row: int) -> int:
        """Draw the token that follows row `row` of the last batch."""
        return int(api.llama_sampler_sample(self._chain, context.pointer, row))

    def accept(self, token: int) -> None:
        """Record a token that was added without being drawn, for the penalties."""
        api.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        """Free the chain and its samplers; the object is unusable afterwards."""
        if self._chain:
            api.llama_sampler_free(self._chain)
            self._chain = None


def _fold(seed: int) -> int:
    """64 bits to 32, avoiding llama.cpp's 0xFFFFFFFF, which means a random seed."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != 0xFFFFFFFF else 0x7FFFFFFF


def _logit_bias(vocab: Vocab, biases: dict[int, float]) -> object:
    array = (api.llama_logit_bias * len(biases))()
    for slot, (token, bias) in zip(array, biases.items(), strict=True):
        slot.token, slot.bias = token, bias
    return api.llama_sampler_init_logit_bias(vocab.size, len(biases), array)
