"""Checkpoints of a run: the latest, always, the best, and one more when the run is told to stop."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from taperlit.checkpoint.atomic import recover
from taperlit.distributed import gather
from taperlit.training.lightning_compat import CheckpointCallback, repeat_validation, should_accumulate, validates_next


class Stopped(SIGTERMException):
    """A fit that SIGTERM ended. A process that does not catch it exits with the shell's status for that, 143.

    Args:
        checkpoint: path of the ``last.ckpt`` to go on from; None where there is none.
    """

    def __init__(self, checkpoint: str | None) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.checkpoint = checkpoint


class RunCheckpoint(CheckpointCallback):
    """ModelCheckpoint that keeps the best by validation loss and a ``last.ckpt`` that is the run's end.

    On SIGTERM, sent to any process, it lets the training step or validation batch under way finish on all of them,
    saves ``last.ckpt`` and raises :class:`Stopped`. A validation pass that was interrupted is done again, from its
    start, by the run that goes on. Where validation data on several processes has no length, the pass ends first. A
    signal in the sanity check, before the first step, saves nothing; one in the last step ends no sooner than the run.

    (Lightning's own handler starts a collective operation inside the signal handler, which can hang a run of several
    processes, and stops only after validation.)

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[RunCheckpoint(every_n_train_steps=500)])
        trainer.fit(module, datamodule, ckpt_path="last")  # begins, or goes on

    Args:
        filename: of the best; the other arguments are those of :class:`lightning.pytorch.callbacks.ModelCheckpoint`.
        monitor: what the best is best in.
        save_last: keep a ``last.ckpt``, too.
        enable_version_counter: give a file another name where one of its name is there.
        **kwargs: ModelCheckpoint's others.

    Raises:
        Stopped: as above.
    """

    def __init__(
        self,
        filename: str | None = "best",
        monitor: str | None = "val/loss",
        save_last: bool | None = True,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filename=filename,
            monitor=monitor,
            save_last=save_last,
            enable_version_counter=enable_version_counter,
            **kwargs,
        )
        self._evaluates = False
        self._terminated = False
        self._in_validation = False  # saving within a pass
        self._common_batches = 0.0  # of this pass, that every process still has before it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder that the checkpoints go to."""
        super().setup(trainer, pl_module, stage)
        self._evaluates = stage != "fit"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier fit's signal."""
        self._terminated = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for SIGTERM from here on."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for SIGTERM, in a run that has no sanity check too."""
        super().on_train_start(trainer, pl_module)
        self._listen()

    def _listen(self) -> None:
        # In place of Lightning's handler. Lightning gives the signal back when the run ends, however it ends.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def _anyone_was_told(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._terminated, all=False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save if it is time, or if any process was told to stop."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if should_accumulate(trainer) or not self._anyone_was_told(trainer) or validates_next(trainer):
            return  # a validation pass stops at its first batch, and so knows that it has to be done again
        if self.saved_at != trainer.global_step:
            self.save_last_now(trainer)
        if not _is_over(trainer):
            raise Stopped(self.last_model_path or None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out how many batches all processes have: only in those can they agree to stop."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._common_batches = min(gather(float(sum(batches))))
        if self._common_batches == float("inf") and trainer.world_size > 1:
            self._common_batches = 0

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop within the pass, if any process was told to."""
        self._common_batches -= 1
        if trainer.state.fn != "fit" or self._common_batches < 0 or not self._anyone_was_told(trainer):
            return
        if trainer.sanity_checking:
            raise Stopped(None)
        self._in_validation = True
        try:
            self.save_last_now(trainer)
        finally:
            self._in_validation = False
        raise Stopped(self.last_model_path or None)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark what is saved within a validation pass: the pass is to be done again."""
        if self._in_validation:
            repeat_validation(checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end too: the last validation may have been some steps before it."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.saved_at != trainer.global_step:
            self.save_last_now(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Paths and scores of the checkpoints so far, tensors on the CPU."""
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take paths and scores from a checkpoint that a fit goes on from.

        No path outside the run's own folder is taken: in time the files there get deleted.
        """
        if self._evaluates:
            return

        def inside(path: str) -> bool:
            return Path(path).parent == Path(self.dirpath or "") and Path(path).name != ".."

        state = dict(state_dict)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if not inside(state.get(key, "")):
                state[key] = ""
        state["best_k_models"] = {path: score for path, score in state["best_k_models"].items() if inside(path)}
        super().load_state_dict(state)

    def before_last_is_sought(self, directory: Path) -> None:
        """Give a ``last.ckpt`` back its name that a killed process was about to replace."""
        recover(directory / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")


def _is_over(trainer: L.Trainer) -> bool:
    """Whether the training step under way is the run's last."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
