"""Run a model in its own precision and in float64, and compare what it returns."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from taperlit.consumers import run_quietly, tensors_of
from taperlit.errors import TaperlitError
from taperlit.float64 import Copies, Float64, WideInputs

Run = Callable[[], object]
MASK = 1e3
"""Numbers this large, and as many times larger than any below them, had a mask added."""


class Changed(Exception):
    """What is not as it was with norms folded, in words."""


def outputs_of(
    model: nn.Module, run: Run, contexts: Callable[[], list[AbstractContextManager[object]]], fused: bool = False
) -> list[Tensor]:
    """The tensors in what a run returns. Gradients are off, unless the run cannot do without them."""
    try:
        result = run_quietly(model, run, *contexts(), torch.no_grad(), fused=fused)
    except TaperlitError:
        raise
    except Exception:  # it may want gradients; if it is not that, it says so again
        result = run_quietly(model, run, *contexts(), torch.enable_grad(), fused=fused)
    return [_dense(tensor) for tensor in tensors_of(result) if not tensor.is_meta]


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.layout is torch.strided else tensor.to_dense()


def own_outputs(model: nn.Module, run: Run, copy: bool = True) -> list[Tensor]:
    """A run's outputs in the model's own precision, by whichever path of torch's it would take.

    Args:
        model: that it runs.
        run: see :func:`taperlit.fold`.
        copy: run it on copies of the model's tensors, so that what it writes there does not stay.
    """
    return outputs_of(model, run, lambda: [Copies(model, wide=False)] if copy else [], fused=True)


def wide_outputs(
    model: nn.Module, run: Run, contents: dict[int, Callable[[], Tensor]], lean: bool = False
) -> list[Tensor]:
    """A run's outputs in float64, of the folded weights as they are before they are rounded."""
    return outputs_of(model, run, lambda: [Copies(model, True, contents, lean), WideInputs(), Float64()])


def require_numbers(outputs: Iterable[list[Tensor]]) -> None:
    """Refuse runs that return nothing to compare.

    Raises:
        TaperlitError: one returned no finite number.
    """
    for tensors in outputs:
        if not any(bool(t.isfinite().any()) for t in tensors if t.numel() and _is_number(t)):
            raise TaperlitError(
                "A run returned no finite numbers to check the folding with; let it return the model's output."
            )


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def check_same(old: list[Tensor], outputs: Callable[[], list[Tensor]], tolerance: float, where: str) -> float:
    """Largest relative difference of outputs from the old ones.

    Raises:
        Changed: it is above the tolerance, or there are no such outputs any more.
    """
    try:
        new = outputs()
    except Exception as error:  # whatever a stranger's forward raises
        raise Changed(f"leaves a model that does not run ({in_a_line(error)})") from error
    difference = 0.0 if len(new) == len(old) else math.inf
    for a, b in zip(old, new, strict=False):
        if _is_number(a):
            difference = max(difference, largest_difference(a, b))
        elif where == "float64" and not torch.equal(a, b):  # rounding may move what was compared or counted
            difference = math.inf
    if not difference <= tolerance:
        raise Changed(f"changes the output by {difference:.1e} (relative, in {where})")
    return difference


def in_a_line(error: Exception) -> str:
    """An error's kind and words, on one line of some length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest ``|a - b|`` relative to the largest ``|a|`` among the numbers that differ, in float64.

    What is the same bit by bit says nothing of the size of what was computed: a mask of -1e9 over padded logits would
    hide any change of the others. Nor do the numbers that such a mask was added to, which are measured apart (see
    ``MASK``). Where ``a`` is not finite ``b`` must be the same; if it is not, or the shapes differ, the result is
    infinite.
    """
    if a.shape != b.shape or not (wild := ~a.isfinite()).equal(~b.isfinite()):
        return math.inf
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    if bool(wild.any()):
        if not torch.equal(a[wild].nan_to_num(7.0), b[wild].nan_to_num(7.0)):
            return math.inf
        a, b = a[~wild], b[~wild]
    if torch.equal(a, b):
        return 0.0
    sizes = a.abs().masked_fill_(a == b, 0.0)
    if (limit := _below_a_mask(sizes)) is not None:
        masked = sizes > limit
        return max(largest_difference(a[masked], b[masked]), largest_difference(a[~masked], b[~masked]))
    return ((a - b).abs().max() / sizes.max().clamp(min=1e-30)).item()


def _below_a_mask(sizes: Tensor) -> Tensor | None:
    """The largest of the numbers that no mask was added to, where one was; what is 0 does not count.

    One number of some thousand lies far below all others by chance, a tenth of them does not.
    """
    if sizes.max() < MASK:
        return None
    ascending = sizes[sizes > 0].sort().values
    above = ascending[1:]
    steps = (above >= MASK * ascending[:-1]) & (above >= MASK)
    steps[: len(ascending) // 10] = False
    found = steps.nonzero()
    return ascending[found[0, 0]] if len(found) else None
