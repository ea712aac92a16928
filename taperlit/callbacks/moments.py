"""Give the linear branch the optimizer's moments of the gains and biases that it is copied from."""

from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm

LEAVE_OUT = "leave moments out"


def check_optimizers(trainer: L.Trainer, who: str) -> None:
    """Refuse optimizers whose state cannot be copied from one parameter to another.

    Raises:
        TaperlitError: one is not torch's Adam or AdamW, or FSDP1 has cut the parameters, each in another way.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise TaperlitError(f"{who} cannot copy moments under FSDP1, which cuts parameters at any place; {LEAVE_OUT}.")
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            kind = type(optimizer).__name__
            raise TaperlitError(f"{who} knows the moments of torch's Adam and AdamW, not those of {kind}; {LEAVE_OUT}.")


@torch.no_grad()
def carry_moments(norms: dict[str, TaperNorm], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Copy the state of every norm's gain and bias to those of its linear branch.

    Args:
        norms: by name. A gain that no optimizer holds is not trained and has no moments.
        optimizers: all that train the model.

    Raises:
        TaperlitError: an optimizer holds a gain and has no state of it, or one that is not per parameter.
    """
    held = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, norm in norms.items():
        for kind in ("weight", "bias"):
            own, twin = norm.own(kind), getattr(norm, f"taper_{kind}")
            if own is None or twin not in held or own not in held:
                continue
            state = held[own].state.get(own, {})
            if not state or not all(_fits(value, twin) for value in state.values()):
                raise TaperlitError(
                    f"{type(held[own]).__name__} has no moments of {name}.{kind} that its linear branch could begin "
                    f"with; {LEAVE_OUT} of AlignmentFreeze."
                )
            held[twin].state[twin] = {key: value.clone() for key, value in state.items()}


def _fits(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and (value.dim() == 0 or value.shape == parameter.shape)
