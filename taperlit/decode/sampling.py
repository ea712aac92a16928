"""Draw the next token from logits, all on the device: nothing waits for it, no shape depends on the values."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from taperlit.errors import TaperlitError

COLDEST = 1e-6  # below it logits of ordinary size overflow float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the filters apply in the order of the fields, from penalty and temperature on.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep this many of the likeliest tokens, and those that tie with the last of them.
        top_p: keep the likeliest tokens that together reach this probability (arXiv:1904.09751).
        min_p: keep tokens with at least this fraction of the likeliest one's probability (arXiv:2407.01082).
        repetition_penalty: divides the positive logits of tokens that were there before, multiplies negative ones
            (arXiv:1909.05858), before all else; 1 changes nothing.

    Raises:
        TaperlitError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        t, k, penalty = self.temperature, self.top_k, self.repetition_penalty
        if not (t == 0 or COLDEST <= t < math.inf):
            raise TaperlitError(f"temperature is {t}; give 0 for the likeliest token, or at least {COLDEST:g}.")
        if k is not None and not (isinstance(k, int) and k >= 1):
            raise TaperlitError(f"top_k is {k}; give a whole number of tokens, 1 or more, or null.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TaperlitError(f"top_p is {self.top_p}; give a probability above 0 and at most 1, or null.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise TaperlitError(f"min_p is {self.min_p}; give a fraction from 0 to 1, or null.")
        if not 0 < penalty < math.inf:
            raise TaperlitError(f"repetition_penalty is {penalty}; give a factor above 0, where 1 changes nothing.")

    @property
    def greedy(self) -> bool:
        """Takes the likeliest token and draws nothing."""
        return self.temperature == 0

    @property
    def remembers(self) -> bool:
        """Needs to know the tokens so far."""
        return self.repetition_penalty != 1


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: Tensor | None = None
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, vocab_size), of any floating dtype; computed with in float32.
        sampling: how.
        generator: of the draws, on the device of the logits; None is the device's own, which is what
            ``torch.compile`` can trace.
        seen: (B, vocab_size) bool, true for the tokens of the prompt and those drawn so far; only a repetition penalty
            reads it.

    Returns:
        (B,) int64 token ids; -1 where the logits have no likeliest token: NaN or infinity is among them. It says so
        instead of raising, which would have to wait for the device.

    Raises:
        TaperlitError: a repetition penalty without ``seen``.
    """
    if sampling.greedy:
        scores = penalized(logits, sampling, seen)
    else:
        scores = probabilities(logits, sampling, seen)
        # Of tokens that each wait for an exponential time, at the rate of its probability, the first one is a draw.
        # -log(u) is such a time; u is never 1 and is kept from 0, so that the time is finite and above 0.
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device)
        scores = scores / -uniform.clamp_min_(torch.finfo(torch.float32).tiny).log_()
    tokens = scores.argmax(-1, keepdim=True)  # a NaN is larger than all
    return torch.where(scores.gather(-1, tokens).isfinite(), tokens, -1).squeeze(-1)


def penalized(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits in float32 with the repetition penalty; arguments as for :func:`sample`."""
    logits = logits.float()
    if not sampling.remembers:
        return logits
    if seen is None:
        raise TaperlitError("A repetition penalty needs `seen`, the tokens so far.")
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The probabilities that :func:`sample` draws from, where the temperature is above 0; its arguments.

    Returns:
        (B, vocab_size) float32, 0 for what the filters drop; NaN in a row with a NaN or an infinite logit.
    """
    logits = penalized(logits, sampling, seen) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, index = logits.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p  # the token that crosses top_p stays
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    kept = logits.softmax(-1)
    if sampling.min_p is not None:
        kept = kept.masked_fill(kept < sampling.min_p * kept.amax(-1, keepdim=True), 0)
        kept = kept / kept.sum(-1, keepdim=True)
    return kept
