"""Gather the alignment statistics and freeze every layer's scalar at the boundary."""

from typing import Any

import lightning as L
import torch

from taperlit.callbacks.partners import resolve_boundary
from taperlit.distributed import keep_buffers_float32, mean_over_ranks, whole_parameters
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, update_alignment
from taperlit.surgery import require_tapered


class AlignmentFreeze(L.Callback):
    """Freezes ``c``, and copies gains and biases to the linear branch, when the gate's warm-up ends.

    Until then it updates every layer's two moving averages once an optimizer step, from all its micro-batches and all
    ranks (arXiv:2602.10408, section 3).

    Args:
        at: freeze after this many steps (int) or fraction of ``max_steps`` (float); None is the end of the
            GateSchedule's warm-up.

    Raises:
        TaperlitError: before the first step, if the model has no TaperNorm or the boundary is unknown; at the
            boundary, if a layer has no usable statistics (it is named).
    """

    def __init__(self, at: int | float | None = None) -> None:
        self.at = at
        self.frozen = False
        self._norms: dict[str, TaperNorm] = {}
        self._boundary = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the statistics in float32 in every strategy."""
        keep_buffers_float32(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and the boundary."""
        self._norms = require_tapered(pl_module, "AlignmentFreeze")
        resolve_boundary(trainer, self.at, "AlignmentFreeze")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the boundary: only now has every strategy restored the GateSchedule's."""
        self._boundary = resolve_boundary(trainer, self.at, "AlignmentFreeze")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Freeze, once the warm-up's last step is done."""
        if self.frozen or trainer.global_step < self._boundary:
            return
        with whole_parameters(trainer):
            for name, norm in self._norms.items():
                try:
                    norm.freeze()
                except TaperlitError as error:
                    raise TaperlitError(f"{name}: {error}") from error
        self.frozen = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the moving averages from this step's batches."""
        if not self.frozen:
            update_alignment(self._norms.values(), lambda value: mean_over_ranks(trainer, value))

    def on_step_skipped(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the statistics of a step that :class:`FiniteGuard` takes out."""
        for norm in self._norms.values():
            norm.pending.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Whether the scalars are frozen; the scalars and averages are in the layers' own state."""
        return {"frozen": self.frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.frozen = state_dict["frozen"]
