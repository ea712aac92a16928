"""Drive the global gate from 1 to 0."""

from typing import Any, Literal

import lightning as L
import torch

from taperlit.callbacks.alignment import AlignmentFreeze
from taperlit.callbacks.partners import find_partner
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, shared_gate
from taperlit.schedule import gate_at, resolve_steps
from taperlit.surgery import require_tapered


class GateSchedule(L.Callback):
    """Holds the gate at 1 during warm-up, then takes it to 0 (arXiv:2602.10408, section 3).

    During optimizer step k, counted from 1: ``g = 1`` for ``k <= warmup``, ``g = 0`` for ``k >= end``, and between them
    ``(1 + cos(pi (k - warmup) / (end - warmup))) / 2``, or a straight line. It also takes the parameters that the
    current phase leaves idle out of the optimizer's reach, so that they neither decay nor gather moments.

    A resumed run keeps the boundaries it began with.

    Example::

        taperlit.taper(model)
        trainer = Trainer(max_steps=1000, callbacks=[GateSchedule(warmup=0.05, end=0.5), AlignmentFreeze()])

    Args:
        warmup: last step at 1, in steps (int) or as a fraction of ``max_steps`` (float).
        end: first step at 0, likewise.
        shape: ``cosine`` or ``linear``.

    Raises:
        TaperlitError: before the first step, if the model has no TaperNorm, no AlignmentFreeze is there, or the
            boundaries are out of order or beyond the run.
    """

    def __init__(
        self, warmup: int | float = 0.05, end: int | float = 0.5, shape: Literal["cosine", "linear"] = "cosine"
    ) -> None:
        if shape not in ("cosine", "linear"):
            raise TaperlitError(f"GateSchedule.shape is {shape!r}; choose cosine or linear.")
        self.warmup, self.end, self.shape = warmup, end, shape
        self._boundaries: tuple[int, int] | None = None
        self._norms: list[TaperNorm] = []

    def boundaries(self, trainer: L.Trainer) -> tuple[int, int]:
        """Last step at 1 and first step at 0, in optimizer steps."""
        if self._boundaries is None:
            warmup = resolve_steps(self.warmup, trainer.max_steps, "GateSchedule.warmup")
            end = resolve_steps(self.end, trainer.max_steps, "GateSchedule.end")
            if end <= warmup:
                raise TaperlitError(f"GateSchedule ends at step {end}, not after its warm-up of {warmup}; raise end.")
            self._boundaries = (warmup, end)
        return self._boundaries

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model, the partner and the boundaries."""
        self._norms = list(require_tapered(pl_module, "GateSchedule").values())
        shared_gate(pl_module)
        if find_partner(trainer, AlignmentFreeze) is None:
            raise TaperlitError("GateSchedule without AlignmentFreeze: add AlignmentFreeze() to the callbacks.")
        self.boundaries(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set the gate for the optimizer step that this batch belongs to."""
        step = trainer.global_step + 1
        self._norms[0].gate.set(gate_at(step, *self.boundaries(trainer), self.shape))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hide the idle parameters: an optimizer skips what has no gradient, its decay and moments included."""
        for norm in self._norms:
            for parameter in norm.idle_parameters():
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The boundaries in steps."""
        return {"boundaries": list(self._boundaries or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the boundaries the run began with."""
        if state_dict["boundaries"]:
            self._boundaries = tuple(state_dict["boundaries"])
