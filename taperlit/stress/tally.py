"""Counts over forward passes: logits that are not finite, the largest, and the scales of the residuals."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import find_names
from taperlit.stress.report import Outcome


class Residual:
    """The root mean square of what a module was last called with, per token.

    Args:
        module: whose first tensor is the pre-logit residual, (B, T, d); None where it is not known.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._seen: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the module."""
        if self._module is None:
            yield
            return
        handle = self._module.register_forward_pre_hook(self._look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        # In float64: the square of what float32 still holds may be more than it does.
        self._seen = None if h is None else h.detach().double().square().mean(-1).sqrt()

    def take(self, shape: torch.Size) -> Tensor | None:
        """(B, T) float64 of the last pass, infinite where it is NaN; None where there is none per token."""
        seen, self._seen = self._seen, None
        if seen is None or seen.numel() != shape.numel():
            return None
        return seen.reshape(shape).nan_to_num(torch.inf, torch.inf)


def find_residual(model: nn.Module, vocab_size: int, tokens: Tensor) -> nn.Module | None:
    """The module that is given the pre-logit residual: the final norm, or what folding left in its place, else the
    head: the last module with a logit per token of the vocabulary.

    Args:
        model: from (B, T) token ids to logits.
        vocab_size: how many logits a head gives.
        tokens: (1, T) to find the head with.
    """
    for module in model.modules():
        if isinstance(final := getattr(module, "final_norm", None), nn.Module):
            return final
        if callable(getattr(module, "get_output_embeddings", None)):
            try:
                return module.get_submodule(find_names(module).final_norm)
            except (TaperlitError, AttributeError, NotImplementedError):
                pass  # it is built in another way
    heads: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = next((value for value in args if isinstance(value, Tensor)), None)
        if given is None or not isinstance(output, Tensor) or output.shape[-1] != vocab_size:
            return
        if given.is_floating_point() and given.shape[-1] != vocab_size:
            heads.append(module)

    handles = [module.register_forward_hook(look) for module in model.modules() if not module._modules]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return heads[-1] if heads else None


class Tally:
    """Adds up the passes of one case in one dtype.

    Args:
        case: its name.
        dtype: its dtype's.
    """

    def __init__(self, case: str, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        self.tokens = self.nonfinite = 0
        self.largest_logit: float | None = None
        self._scales: list[Tensor] = []
        # The worst position: whether its logits are not finite, then how early that was, or else how large it was.
        self._worst: tuple[tuple[bool, float], int, int] | None = None

    def add(self, tokens: Tensor, logits: Tensor, scales: Tensor | None) -> Tensor:
        """Add a pass.

        Args:
            tokens: (B, T) token ids.
            logits: (B, T, vocab_size).
            scales: (B, T) float64 root mean squares of the residuals, or None.

        Returns:
            (B, T) float64 how bad each token is: its scale, or its largest logit, and infinite where one is not finite.
        """
        low, high = logits.aminmax(dim=-1)  # (B, T); NaN where there is one
        good = low.isfinite() & high.isfinite()
        size = torch.maximum(-low, high).double()
        self.tokens += tokens.numel()
        if bool(good.all()):
            self._note_logit(size.max())
        else:
            bad = logits[~good]
            finite = bad.isfinite()
            self.nonfinite += int((~finite).sum())
            for values in (size[good], bad[finite].double().abs()):
                if values.numel():
                    self._note_logit(values.max())
        if scales is not None:
            self._scales.append(scales.flatten().cpu())
        measure = (size if scales is None else scales).masked_fill(~good, torch.inf)
        self._note_worst(tokens, good, measure)
        return measure

    def _note_logit(self, value: Tensor) -> None:
        self.largest_logit = max(self.largest_logit or 0.0, value.item())

    def _note_worst(self, tokens: Tensor, good: Tensor, measure: Tensor) -> None:
        if bool(good.all()):
            row, position = divmod(int(measure.flatten().argmax()), measure.shape[1])
            key = (False, measure[row, position].item())
        else:
            where = (~good).nonzero()
            row, position = where[where[:, 1].argmin()].tolist()
            key = (True, -float(position))
        if self._worst is None or key > self._worst[0]:
            self._worst = key, int(tokens[row, position]), position

    def outcome(self) -> Outcome:
        """What all passes gave."""
        ratio = None
        if self._scales:
            scales = torch.cat(self._scales)
            largest, median = scales.max().item(), scales.median().item()
            ratio = 1.0 if largest == median else largest / median if median and math.isfinite(largest) else math.inf
        token, position = (None, None) if self._worst is None else self._worst[1:]
        return Outcome(self.case, self.dtype, self.tokens, self.nonfinite, self.largest_logit, ratio, token, position)
