"""Decoding with a cache of keys and values, against the forward pass that sees the whole context at once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from taperlit.compare import largest_difference
from taperlit.decode.engine import Engine
from taperlit.hub.causal_lm import CausalLM
from taperlit.stress.report import Outcome
from taperlit.stress.tally import Tally
from taperlit.transformer import Transformer

ROUNDING = 1e-3  # of float32 logits, relative to the largest, over a context that is decoded token by token
CASE = "cached decoding"


class Decoder(Protocol):
    """What decodes with a cache, such as :class:`taperlit.Engine`."""

    def prefill(self, prompts: Tensor) -> Tensor:
        """Read (B, T) prompts into an empty cache: (B, vocab_size) logits of the token after each."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append (B,) tokens: (B, vocab_size) logits of the next ones."""


MakeDecoder = Callable[[nn.Module, int, int], Decoder | None]
"""Makes the decoder of a model for so many rows of so many tokens, or None where the model has none."""


class LmDecoder:
    """A ``transformers`` language model with its own cache.

    Args:
        model: of which the ``lm`` decodes.
    """

    def __init__(self, model: CausalLM) -> None:
        self._lm: Any = model.lm
        self._cache: Any = None

    def prefill(self, prompts: Tensor) -> Tensor:
        """Read (B, T) prompts into an empty cache: (B, vocab_size) logits."""
        self._cache = None
        return self._run(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """Append (B,) tokens: (B, vocab_size) logits."""
        return self._run(tokens[:, None])

    def _run(self, tokens: Tensor) -> Tensor:
        output = self._lm(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return cast(Tensor, output.logits[:, -1])


class _Unchecked(Engine):
    """Our engine as it decodes, also where that is not what the model computes: to tell it is the test's part."""

    def _check(self, model: Transformer) -> None:
        pass


def decoder_of(model: nn.Module, rows: int, length: int) -> Decoder | None:
    """The decoder that a user of the model would have: our engine, or the cache of ``transformers``.

    Raises:
        TaperlitError: the engine does not know a part of the model.
    """
    if isinstance(model, Transformer):
        # Not the fastest, which is measured and may be another each time: the same seed is to give the same figures.
        return cast(Decoder, _Unchecked(model, rows, length, backend="eager", layout="rows", rms_form="fused"))
    return LmDecoder(model) if isinstance(model, CausalLM) else None


def compare_cached(decoder: Decoder, tokens: Tensor, full: Tensor, runs: list[tuple[int, int]], dtype: str) -> Outcome:
    """Decode contexts and compare every logit with the forward pass.

    Args:
        decoder: for as many rows.
        tokens: (B, T) contexts.
        full: (B, T, vocab_size) logits of the forward pass on them.
        runs: prompts' lengths, and how many tokens are appended to each one by one.
        dtype: for the report.
    """
    tally = Tally(CASE, dtype)
    worst, length = 0.0, 0

    def look(position: int, logits: Tensor) -> None:
        nonlocal worst, length
        tally.add(tokens[:, position : position + 1], logits[:, None], None)
        difference = largest_difference(full[:, position], logits.to(full.device))
        if difference > worst or not length:
            worst, length = difference, position + 1

    for prompt, steps in runs:
        look(prompt - 1, decoder.prefill(tokens[:, :prompt]))
        for position in range(prompt, prompt + steps):
            look(position, decoder.step(tokens[:, position]))
    return replace(tally.outcome(), difference=worst, difference_length=length)


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest difference that is still the rounding of a dtype."""
    return max(ROUNDING, 16 * torch.finfo(dtype).eps)
