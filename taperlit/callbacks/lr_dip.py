"""A short dip of the learning rate where the taper begins."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from taperlit.callbacks.in_step import ScaledInStep
from taperlit.norm import TaperNorm, shared_gate
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.surgery import require_tapered


class LearningRateDip(L.Callback):
    """Takes smaller steps when the gate has just begun to fall, and goes back to the schedule's on a straight line.

    Where ``b`` is the first optimizer step with the gate below 1, step ``k`` is taken with the learning rate that the
    scheduler gives times ``factor + (1 - factor) * (k - b) / steps`` for ``b <= k < b + steps``, and with that learning
    rate as it is before and after. At the boundary a second branch comes in whose gains have no optimizer moments yet,
    and whose scalar fits the tokens only on average.

    ``b`` is what the gate says, whoever moves it: a warm-up that waits (GateSchedule's ``warmup="auto"``) is followed,
    and a gate that waits or goes back (GateHold) makes no second dip. With ``stages`` the dip begins anew whenever a
    further norm's own gate begins to fall. Weights that are tapered already have had their boundary, and get no dip.

    The learning rate is multiplied as an optimizer's step begins and put back as it ends, in every group of every
    optimizer, so that no scheduler, whichever it is, and no checkpoint sees it. ``train/lr`` of
    :class:`taperlit.LanguageModel` is the one in use, but for 16-mixed precision, where it is the scheduler's, which
    Lightning's LearningRateMonitor logs. Steps are those that ``trainer.global_step`` counts. A resumed run goes on as
    the unbroken one.

    Example::

        Trainer(max_steps=1000, callbacks=[GateSchedule(), AlignmentFreeze(), LearningRateDip(factor=0.1, steps=30)])

    Args:
        factor: of the learning rate at the bottom, in [0, 1).
        steps: from the bottom to the full learning rate, in steps (int) or as a fraction of ``max_steps`` (float), of
            which 1 step is the least.

    Raises:
        TaperlitError: a value out of its range; before the first step, if the model has no TaperNorm, or ``steps`` are
            more than the run's.
    """

    def __init__(self, factor: float = 0.1, steps: int | float = 0.02) -> None:
        require_range("LearningRateDip.factor", factor, least=0, below=1)
        require_steps("LearningRateDip.steps", steps, least=1)
        self.factor, self.steps = factor, steps
        self._rate = ScaledInStep("lr")
        self._forget()

    def _forget(self) -> None:
        self._rate.release()
        self._norms: list[TaperNorm] = []
        self._length = 1
        self._lowest: float | None = None  # the gate has been, as far as it made norms begin to fall
        self._bottom: int | None = None  # the step with which the latest dip begins

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and the length."""
        self._norms = list(require_tapered(pl_module, "LearningRateDip").values())
        shared_gate(pl_module)  # there is one
        steps = 1 if trainer.fast_dev_run else resolve_steps(self.steps, trainer.max_steps, "LearningRateDip.steps")
        self._length = max(1, steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note which norms are past their boundary already, and follow the optimizers."""
        if self._lowest is None:
            self._lowest = self._norms[0].gate.number()
            if all(norm.own_gate_at(self._lowest) < 1 for norm in self._norms):
                rank_zero_info("LearningRateDip: the gate has begun to fall already, so that there is no dip.")
        self._rate.follow(trainer, lambda: self._multiplier(trainer.global_step + 1))

    def _multiplier(self, step: int) -> float:
        """What the learning rate of the step under way, the ``step``-th, is multiplied with, by the gate as it is."""
        assert self._lowest is not None
        g = self._norms[0].gate.number()
        if g < self._lowest:
            if any(norm.own_gate_at(g) < 1 <= norm.own_gate_at(self._lowest) for norm in self._norms):
                self._bottom = step
            self._lowest = g
        past = self._length if self._bottom is None else step - self._bottom
        return self.factor + (1 - self.factor) * past / self._length if past < self._length else 1.0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers and the model alone."""
        self._rate.release()
        self._norms = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the learning rate back, also of a step that an error ended, before a checkpoint is written of it."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """How low the gate has been, and the step with which the latest dip began."""
        return {"lowest": self._lowest, "bottom": self._bottom}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the resumed run's dip."""
        self._lowest, self._bottom = state_dict["lowest"], state_dict["bottom"]
