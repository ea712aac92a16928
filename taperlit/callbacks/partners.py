"""What the callbacks ask of each other, of the model and of the strategy."""

from typing import TypeVar

import lightning as L
from torch import nn

from taperlit.errors import TaperlitError
from taperlit.schedule import resolve_steps

C = TypeVar("C", bound=L.Callback)


def find_partner(trainer: L.Trainer, kind: type[C]) -> C | None:
    """The trainer's first callback of a kind."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def resolve_boundary(trainer: L.Trainer, at: int | float | None, who: str) -> int:
    """The step after which statistics freeze: ``at``, or the end of the GateSchedule's warm-up.

    Raises:
        TaperlitError: neither is there, or no step is left to gather statistics in.
    """
    from taperlit.callbacks.gate import GateSchedule  # it needs AlignmentFreeze in turn

    schedule = find_partner(trainer, GateSchedule)
    if at is not None:
        boundary = resolve_steps(at, trainer.max_steps, f"{who}.at")
    elif schedule is not None:
        boundary, _ = schedule.boundaries(trainer)
    else:
        raise TaperlitError(f"{who} needs to know when to freeze: add a GateSchedule to the callbacks, or give it at=.")
    if boundary < 1:
        raise TaperlitError(f"{who} has no steps to gather statistics in; make the gate's warm-up at least 1 step.")
    return boundary


def named_module(pl_module: L.LightningModule, name: str, who: str) -> nn.Module:
    """A submodule by name.

    Raises:
        TaperlitError: there is none of that name.
    """
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        raise TaperlitError(
            f"{who} finds no module {name!r} in {type(pl_module).__name__}; its children are "
            f"{', '.join(child for child, _ in pl_module.named_children())}."
        ) from error
