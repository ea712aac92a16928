"""Checkpoints of a run: the latest, always, and the best."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps the best by validation loss and a ``last.ckpt`` that is the run's end.

    Args:
        **kwargs: of :class:`lightning.pytorch.callbacks.ModelCheckpoint`, over these defaults.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            **{
                "filename": "best",
                "monitor": "val/loss",
                "save_last": True,
                "enable_version_counter": False,
                **kwargs,
            }
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end too: the last validation may have been some steps before it."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
