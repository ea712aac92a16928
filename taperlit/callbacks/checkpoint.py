"""Checkpoints of a run: the latest, always, the best, and one more when the run is told to stop."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from taperlit.checkpoint.atomic import recover


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps the best by validation loss and a ``last.ckpt`` that is the run's end.

    On SIGTERM it lets the step under way finish on all processes, saves ``last.ckpt``, and raises Lightning's
    ``SIGTERMException``. (Lightning's own handler starts a collective operation inside the signal handler, which can
    hang a run of several processes.)

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
        self._terminated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for SIGTERM. Lightning gives the signal back when the run ends, however it ends."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save if it is time, or if any process was told to stop."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(self._terminated, all=False):
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end too: the last validation may have been some steps before it."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def state_dict(self) -> dict[str, Any]:
        """As Lightning's, on the CPU."""
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, but no path outside this run's folder: checkpoints at these paths get deleted in time."""

        def inside(path: str) -> bool:
            return Path(path).parent == Path(self.dirpath) and Path(path).name != ".."

        state = dict(state_dict)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if not inside(state.get(key, "")):
                state[key] = ""
        state["best_k_models"] = {path: score for path, score in state["best_k_models"].items() if inside(path)}
        super().load_state_dict(state)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        directory = Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))
        recover(directory / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        return super()._find_last_checkpoints(trainer)
