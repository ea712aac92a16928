"""Weight decay that goes with the norms."""

from typing import Any

import lightning as L

from taperlit.callbacks.in_step import ScaledInStep
from taperlit.norm import shared_gate
from taperlit.ranges import require_range
from taperlit.surgery import require_tapered


class DecayWithGate(L.Callback):
    """Multiplies the optimizers' weight decay by the gate: in full under the norms, and none once they are gone.

    What follows a norm does not feel the size of what the norm is given, so decay there sets no more than how fast
    directions turn. In a model whose norms are gone it shrinks what the model computes, step by step. What that was
    worth is in docs/experiments.md: no more than chance over a whole run, so it is off by default.

    A step with the gate at ``g`` decays with the optimizer's own ``weight_decay`` times ``floor + (1 - floor) * g``, in
    every group of every optimizer. It is put back as the step ends, so that checkpoints and what the run was given stay
    as they are, and a resumed run goes on as the unbroken one.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), DecayWithGate()])

    Args:
        floor: share of the weight decay that stays when the gate is closed, in [0, 1].

    Raises:
        TaperlitError: ``floor`` is out of its range; before the first step, if the model has no TaperNorm.
    """

    def __init__(self, floor: float = 0.0) -> None:
        require_range("DecayWithGate.floor", floor, least=0, most=1)
        self.floor = floor
        self._decay = ScaledInStep("weight_decay")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of an earlier fit."""
        self._decay.release()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a gate."""
        require_tapered(pl_module, "DecayWithGate")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the optimizers."""
        gate: Any = shared_gate(pl_module)
        self._decay.follow(trainer, lambda: self.floor + (1 - self.floor) * gate.number())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        self._decay.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weight decay back, also of a step that an error ended, before a checkpoint is written of it."""
        self._decay.release()
