"""The plan of the run under way: callbacks write and read it at the model's gate and do not look for each other."""

from dataclasses import dataclass, field

import lightning as L
from torch import nn

from taperlit.errors import TaperlitError
from taperlit.norm import GatePlan, shared_gate, tapered_norms
from taperlit.schedule import resolve_steps


def forget_plan(pl_module: nn.Module) -> None:
    """Clear what was announced at the gate, when a fit begins and when it ends, however it ends."""
    for norm in tapered_norms(pl_module).values():
        norm.gate.plan = GatePlan()


@dataclass
class Boundary:
    """The step after which statistics freeze: a fixed one, or the end of the warm-up as far as it is known.

    Args:
        at: the step; None follows the plan.
        plan: whose ``warmup`` may still rise, see :class:`taperlit.norm.GatePlan`.
    """

    at: int | None = None
    plan: GatePlan = field(default_factory=GatePlan)

    @property
    def step(self) -> int:
        """The step, as far as it is known now; 0 where there is none."""
        step = self.plan.warmup if self.at is None else self.at
        return 0 if step is None else step


def find_boundary(trainer: L.Trainer, pl_module: L.LightningModule, at: int | float | None, who: str) -> Boundary:
    """The step after which statistics freeze: ``at``, or the end of the warm-up that a GateSchedule announced.

    The latter may still move, so ask it in every step. Under ``fast_dev_run`` it is 1, so that its few steps go through
    the boundary.

    Args:
        trainer: of the run.
        pl_module: whose gate bears the plan.
        at: in steps (int) or as a fraction of ``max_steps`` (float).
        who: asks, for the errors.

    Raises:
        TaperlitError: neither is there, or no step is left to gather statistics in.
    """
    gate = shared_gate(pl_module)
    if at is not None:
        boundary = Boundary(1 if trainer.fast_dev_run else resolve_steps(at, trainer.max_steps, f"{who}.at"))
    elif gate is not None and gate.plan.warmup is not None:
        boundary = Boundary(None, gate.plan)
    else:
        raise TaperlitError(f"{who} needs to know when to freeze: add a GateSchedule to the callbacks, or give it at=.")
    if boundary.step < 1:
        mend = "make the gate's warm-up at least 1 step" if at is None else f"raise {who}.at to at least 1 step"
        raise TaperlitError(f"{who} has no steps before its boundary; {mend}.")
    return boundary
