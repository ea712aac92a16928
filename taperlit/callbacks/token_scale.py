"""The scale of each token at a module's input, and forward passes that no statistic counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taperlit.norm import TaperNorm

_uncounted = 0  # how deep in such passes


def token_scale(module: nn.Module, h: Tensor) -> Tensor:
    """``s(h)`` of every token: its root mean square, or standard deviation where the module is of the LayerNorm kind.

    Args:
        module: a norm, or whatever else is given ``h``.
        h: (..., d), or (..., *shape) of a TaperNorm over several dimensions.

    Returns:
        (...) float32 (float64 of float64), with a gradient at zero too.
    """
    dims: tuple[int, ...] = (-1,)
    centred = isinstance(module, nn.LayerNorm)
    if isinstance(module, TaperNorm):
        dims, centred = tuple(range(-len(module.kind.shape), 0)), module.kind.centred
    return scale_over(h, dims, centred, 1e-12)


def scale_over(h: Tensor, dims: tuple[int, ...], centred: bool, eps: float) -> Tensor:
    """``sqrt(mean(h^2) + eps)`` over some dimensions, of ``h`` less its mean where ``centred``: float32 or float64."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    if centred:
        h = h - h.mean(dims, keepdim=True)
    return (h.square().mean(dims) + eps).sqrt()


@contextmanager
def uncounted() -> Iterator[None]:
    """Run the model beside the training step's own pass: hooks that gather statistics leave such passes out."""
    global _uncounted
    _uncounted += 1
    try:
        yield
    finally:
        _uncounted -= 1


def is_uncounted() -> bool:
    """Whether the pass under way is not the training step's own."""
    return _uncounted > 0
