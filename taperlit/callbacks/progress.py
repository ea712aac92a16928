"""One progress bar over the whole run, so that its estimate of the time left is the run's."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from taperlit.ranges import require_range
from taperlit.training.lightning_compat import update_bar


class StepProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar, but counting optimizer steps to ``max_steps`` and not batches to the epoch's end.

    Args:
        refresh_rate: optimizer steps between two redraws.
        leave: keep finished bars on the screen.

    Raises:
        TaperlitError: a refresh rate below 1.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        require_range("StepProgressBar.refresh_rate", refresh_rate, least=1)
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def on_train_start(self, *args: Any) -> None:
        """Open the bar, at the step where the run is."""
        super().on_train_start(*args)
        trainer = self.trainer
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.train_progress_bar.reset(total)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("step")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave the bar as it is: it spans epochs."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the bar to the trainer's step."""
        step = trainer.global_step
        if step % self.refresh_rate == 0 or step == trainer.max_steps:
            update_bar(self.train_progress_bar, step)
            metrics = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            self.train_progress_bar.set_postfix(metrics)
