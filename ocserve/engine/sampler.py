"""llama.cpp's sampler chain for one sequence.

In the order that llama.cpp's server uses: bias, penalties, DRY, then what truncates (top-nσ, top-k, typical, top-p,
min-p, top-a), XTC, the temperature, and the draw. A neutral parameter adds no sampler.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ocserve.engine.bindings import LlamaError, api
from ocserve.engine.context import Context
from ocserve.engine.llama import Vocab
from ocserve.engine.logprobs import Logits
from ocserve.errors import InvalidRequest
from ocserve.generation import Sampling

# Below, dividing logits would overflow; nothing but the best token has had any probability for long.
_LEAST_TEMPERATURE = 1e-30
# Less of the best token's probability is as good as none, and a probability of exactly 0 makes NaN of an entropy.
_POSSIBLE = 1e-30
_MIROSTAT_CANDIDATES = 100  # from which mirostat 1 estimates the distribution, as llama.cpp's server does
# Finding the tokens that a DRY breaker may begin in takes a pass over the vocabulary for each, up to 0.4 s for 49,000
# tokens; llama.cpp cuts longer ones off.
_MOST_BREAKERS, _MOST_BREAKER_BYTES, _MOST_BREAKERS_BYTES = 16, 40, 128
_KEPT_DRY = 8


class Dry:
    """DRY's sampler before any token: to be cloned, since making one takes tens of milliseconds."""

    def __init__(self, vocab: Vocab, sampling: Sampling, window: int) -> None:
        words = [word.encode() for word in sampling.dry_breakers]
        self._sampler = vocab.dry_sampler(
            sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, window, words
        )
        if not self._sampler:
            raise LlamaError("llama.cpp refused a sampler")

    def clone(self) -> object:
        """Another one, for one sequence."""
        return api.llama_sampler_clone(self._sampler)

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            api.llama_sampler_free(self._sampler)


class DrySamplers:
    """Makes DRY's samplers and keeps the last ones. For one thread."""

    def __init__(self, vocab: Vocab, context: int) -> None:
        self._vocab = vocab
        self._context = context
        self._kept: OrderedDict[object, Dry] = OrderedDict()

    def get(self, sampling: Sampling) -> Dry | None:
        """What these parameters ask for, None for no DRY; raises `InvalidRequest` for breakers beyond the limits."""
        window = self._context if sampling.dry_window < 0 else min(sampling.dry_window, self._context)
        if not sampling.dry_multiplier or not window:
            return None
        _check_breakers(sampling.dry_breakers)
        key = (
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            window,
            sampling.dry_breakers,
        )
        made = self._kept.pop(key, None) or Dry(self._vocab, sampling, window)
        self._kept[key] = made
        if len(self._kept) > _KEPT_DRY:
            self._kept.popitem(last=False)
        return made


class SamplerChain:
    """llama.cpp's sampler chain for one sequence; `sample` also records the token for the penalties."""

    def __init__(
        self,
        vocab: Vocab,
        sampling: Sampling,
        *,
        seed: int,
        window: int,
        prompt: Iterable[int],
        dry: Dry | None = None,
    ) -> None:
        """`window` is how many tokens the penalties remember at most; `seed` is 64 bits, folded to llama.cpp's 32.

        The repetition penalty and DRY count the prompt, frequency and presence penalties do not (see `Sampling`), hence
        two penalty samplers.
        """
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        self._top_a: TopA | None = None
        if sampling.logit_bias:
            self._add(_logit_bias(vocab, sampling.logit_bias))
        self._add_penalties(vocab, sampling, window, prompt)
        if dry is not None:
            self._add(dry.clone(), prompt)
        greedy = not sampling.temperature and not sampling.dynamic_range
        if sampling.mirostat and not greedy:
            self._add_mirostat(vocab, sampling, _fold(seed))
            return
        if not greedy or sampling.typical_p < 1 or sampling.xtc_probability > 0:  # the others keep the best token
            self._add_truncation(vocab, sampling, _fold(seed))
        if greedy:
            self._add(api.llama_sampler_init_greedy())
        else:
            self._add_temperature(sampling)
            self._add(api.llama_sampler_init_dist(_fold(seed)))

    def _add(self, sampler: object, seen: Iterable[int] = ()) -> None:
        """Append a sampler that has seen these tokens."""
        if not sampler:
            raise LlamaError("llama.cpp refused a sampler")
        for token in seen:
            api.llama_sampler_accept(sampler, token)
        api.llama_sampler_chain_add(self._chain, sampler)

    def _add_penalties(self, vocab: Vocab, sampling: Sampling, window: int, prompt: Iterable[int]) -> None:
        if sampling.penalty_window is not None:
            window = min(window, sampling.penalty_window)
        if not window:
            return
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            self._add(api.llama_sampler_init_penalties(vocab.size, window, penalty, 0.0, 0.0), prompt)
        frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
        if frequency or presence:
            self._add(api.llama_sampler_init_penalties(vocab.size, window, 1.0, frequency, presence))

    def _add_truncation(self, vocab: Vocab, sampling: Sampling, seed: int) -> None:
        if sampling.top_n_sigma > 0:
            self._add(api.llama_sampler_init_top_n_sigma(sampling.top_n_sigma))
        if sampling.top_k:
            self._add(api.llama_sampler_init_top_k(min(sampling.top_k, vocab.size)))
        if sampling.typical_p < 1:
            self._add(api.llama_sampler_init_min_p(_POSSIBLE, 1))
            self._add(api.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            self._add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.top_a > 0:
            self._top_a = TopA(sampling.top_a)
            self._add(self._top_a.sampler())
        if sampling.xtc_probability > 0:
            self._add(api.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))

    def _add_temperature(self, sampling: Sampling) -> None:
        if sampling.dynamic_range:
            self._add(
                api.llama_sampler_init_temp_ext(sampling.temperature, sampling.dynamic_range, sampling.dynamic_exponent)
            )
        elif sampling.temperature != 1:
            self._add(api.llama_sampler_init_temp(max(sampling.temperature, _LEAST_TEMPERATURE)))

    def _add_mirostat(self, vocab: Vocab, sampling: Sampling, seed: int) -> None:
        """It draws by itself, from all that is possible at all."""
        self._add(api.llama_sampler_init_min_p(_POSSIBLE, 1))
        self._add_temperature(sampling)
        tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
        if sampling.mirostat == 1:
            self._add(api.llama_sampler_init_mirostat(vocab.size, seed, tau, eta, _MIROSTAT_CANDIDATES))
        else:
            self._add(api.llama_sampler_init_mirostat_v2(seed, tau, eta))

    @property
    def names(self) -> list[str]:
        """What the chain is made of, in llama.cpp's words."""
        count = api.llama_sampler_chain_n(self._chain)
        samplers = [api.llama_sampler_chain_get(self._chain, index) for index in range(count)]
        return [api.llama_sampler_name(sampler).decode() for sampler in samplers]

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


class BestToken:
    """Takes the best token, for sequences that ask for nothing else; what `SamplerChain` does for them too.

    llama.cpp writes a record for each token of the vocabulary first, which takes ten times as long.
    """

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biased = np.fromiter(biases.keys(), np.int64, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))

    def sample(self, context: Context, row: int) -> int:
        """The best token behind row `row` of the last batch, of equal ones the first."""
        logits = context.logits(row)
        if not len(self._biased):
            return _best(logits)
        unbiased = logits[self._biased]
        logits[self._biased] += self._biases
        best = _best(logits)
        logits[self._biased] = unbiased  # log-probabilities are of what the model gave
        return best

    def accept(self, token: int) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing is held."""


def _best(logits: Logits) -> int:
    """The index of the largest logit; one that is not a number, from a broken row of weights, is never it."""
    best = int(logits.argmax())
    return best if logits[best] == logits[best] else int(np.nanargmax(logits))


def sampler_of(
    vocab: Vocab, sampling: Sampling, *, seed: int, window: int, prompt: Iterable[int], dry: Dry | None = None
) -> BestToken | SamplerChain:
    """What draws as `sampling` asks; see `SamplerChain` for the parameters."""
    chain = SamplerChain(vocab, sampling, seed=seed, window=window, prompt=prompt, dry=dry)
    if not set(chain.names) <= {"logit-bias", "greedy"}:
        return chain
    chain.close()
    return BestToken(sampling.logit_bias)


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class TopA:
    """A sampler of ours, which llama.cpp lacks: keeps tokens of at least `top_a` times the best probability squared.

    Must live as long as the chain that it is in.
    """

    def __init__(self, top_a: float) -> None:
        self._top_a = top_a
        self._interface = api.llama_sampler_i()
        self._text = ctypes.create_string_buffer(b"top-a")
        # ctypes cannot return text from a callback, an address it can.
        self._name = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda sampler: ctypes.addressof(self._text))
        self._interface.name = ctypes.cast(self._name, api.llama_sampler_i_name)
        self._interface.apply = api.llama_sampler_i_apply(self._apply)

    def sampler(self) -> object:
        """To be put into one chain."""
        return api.llama_sampler_init(ctypes.byref(self._interface), None)

    def _apply(self, sampler: object, array: Any) -> None:
        candidates = array.contents
        memory = ctypes.cast(candidates.data, ctypes.POINTER(ctypes.c_uint8 * (candidates.size * _CANDIDATE.itemsize)))
        tokens = np.frombuffer(memory.contents, _CANDIDATE)
        ratios = np.exp(tokens["logit"] - tokens["logit"].max())  # to the best probability
        kept = tokens[ratios >= self._top_a / ratios.sum(dtype=np.float64)]
        if len(kept):  # none where top_a is above 1
            tokens[: len(kept)] = kept
            candidates.size = len(kept)
        else:
            tokens[0] = tokens[ratios.argmax()]
            candidates.size = 1


def _check_breakers(breakers: tuple[str, ...]) -> None:
    param = "dry_sequence_breakers"
    sizes = [len(word.encode()) for word in breakers]
    if len(breakers) > _MOST_BREAKERS or sum(sizes) > _MOST_BREAKERS_BYTES:
        raise InvalidRequest(
            f"At most {_MOST_BREAKERS} sequence breakers of {_MOST_BREAKERS_BYTES} bytes together are taken.",
            param=param,
        )
    for index, (word, size) in enumerate(zip(breakers, sizes, strict=True)):
        if not 0 < size <= _MOST_BREAKER_BYTES or "\0" in word:
            raise InvalidRequest(
                f"A sequence breaker has 1 to {_MOST_BREAKER_BYTES} bytes, and no NUL among them.",
                param=f"{param}[{index}]",
            )


def _fold(seed: int) -> int:
    """64 bits to 32, avoiding llama.cpp's 0xFFFFFFFF, which means a random seed."""
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != 0xFFFFFFFF else 0x7FFFFFFF


def _logit_bias(vocab: Vocab, biases: dict[int, float]) -> object:
    array = (api.llama_logit_bias * len(biases))()
    for slot, (token, bias) in zip(array, biases.items(), strict=True):
        slot.token, slot.bias = token, bias
    return api.llama_sampler_init_logit_bias(vocab.size, len(biases), array)
