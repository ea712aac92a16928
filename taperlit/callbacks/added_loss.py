"""Add to what a LightningModule's ``training_step`` returns."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from taperlit.distributed import mean_over_ranks


def wrap_training_step(
    pl_module: L.LightningModule, before: Callable[[], None], after: Callable[[Any], Any]
) -> Callable[[], None]:
    """Run something before every ``training_step``, and change what it returns.

    Lightning shows callbacks the loss but takes none back from them, and a second backward pass, of an added loss
    alone, would have to be scaled for precision and accumulation by hand and breaks DDP, which allows one.

    Args:
        pl_module: whose step it is; nothing but the step is changed.
        before: called first.
        after: maps what the step returned to what Lightning gets.

    Returns:
        Puts the step back.
    """
    original, below = pl_module.training_step, vars(pl_module).get("training_step")

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        if training_step.done:  # type: ignore[attr-defined]
            return original(*args, **kwargs)
        before()
        return after(original(*args, **kwargs))

    training_step.done, training_step.below = False, below  # type: ignore[attr-defined]
    pl_module.training_step = training_step

    def undo() -> None:
        training_step.done = True  # type: ignore[attr-defined]
        top = vars(pl_module).pop("training_step", None)
        while getattr(top, "done", False):  # those of other callbacks, in whatever order they are undone
            top = top.below  # type: ignore[union-attr]
        if top is not None:
            pl_module.training_step = top

    return undo


def with_added(output: Any, loss: Tensor) -> Any:
    """What ``training_step`` returned, a loss or a mapping with one, with another loss added."""
    return output + loss if isinstance(output, Tensor) else {**output, "loss": output["loss"] + loss}


def sum_over_ranks(trainer: L.Trainer, values: list[Tensor]) -> Tensor:
    """The sum and the number of some 0-d values, (2,), over all processes but for one factor.

    A process may have none: what they are measured at need not run on each.
    """
    device = trainer.strategy.root_device
    total = torch.stack(values).sum() if values else torch.zeros((), device=device)
    return mean_over_ranks(trainer, torch.stack((total, torch.full_like(total, len(values)))))
