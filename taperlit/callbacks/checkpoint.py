"""Checkpoints of a run: the latest, always, the best, one every so many minutes and when the run is told to stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from taperlit.checkpoint.atomic import recover
from taperlit.checkpoint.background import host_copy
from taperlit.distributed import gather
from taperlit.errors import TaperlitError
from taperlit.ranges import require_range
from taperlit.training.lightning_compat import (
    CheckpointCallback,
    log_step_now,
    repeat_validation,
    should_accumulate,
    stop_launched,
    validates_next,
)
from taperlit.training.trainer import Trainer

PATIENCE = 5.0  # seconds that a process which is told to stop at once waits for a checkpoint being written


class Stopped(SIGTERMException):
    """A fit that SIGTERM or SIGINT ended. A process that does not catch it exits with the shell's status, 143 or 130.

    Args:
        checkpoint: path of the ``last.ckpt`` to go on from; None where there is none.
        signum: of the signal.
    """

    def __init__(self, checkpoint: str | None, signum: int = signal.SIGTERM) -> None:
        super().__init__(128 + signum)
        self.checkpoint = checkpoint
        self.signum = signum


class RunCheckpoint(CheckpointCallback):
    """ModelCheckpoint that keeps the best by validation loss and a ``last.ckpt`` that is the run's end.

    ``last.ckpt`` is also saved when it is some minutes old, between validations. With :class:`taperlit.Trainer` on one
    process, or with DDP, training then goes on as soon as the state is copied to host memory (of each process's host,
    as much again as the checkpoint has bytes), and the file is written meanwhile. The best is known after a validation
    only, and saved there.

    On SIGTERM or SIGINT (Ctrl-C), sent to any process, it lets the training step or validation batch under way finish
    on all of them, saves ``last.ckpt`` and raises :class:`Stopped`. A second SIGINT stops at once and saves nothing. A
    validation pass that was interrupted is done again, from its start, by the run that goes on. Where validation data
    on several processes has no length, the pass ends first. A signal in the sanity check, before the first step, saves
    nothing; one in the last step ends no sooner than the run.

    Where Lightning's ``WeightAveraging`` is in use, every checkpoint has the averages as ``state_dict`` and the weights
    that are trained as ``current_model_state``, whenever it is saved. Used again by a new trainer, the callback begins
    anew, in the folder that it has.

    (Lightning's own handler starts a collective operation inside the signal handler, which can hang a run of several
    processes, and stops only after validation; its Ctrl-C saves nothing.)

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[RunCheckpoint(minutes=5)])
        trainer.fit(module, datamodule, ckpt_path="last")  # begins, or goes on

    Args:
        filename: of the best; the other arguments are those of :class:`lightning.pytorch.callbacks.ModelCheckpoint`.
        monitor: what the best is best in.
        save_last: keep a ``last.ckpt``, too.
        enable_version_counter: give a file another name where one of its name is there.
        minutes: the age at which ``last.ckpt`` is saved anew after a training step; None for never.
        **kwargs: ModelCheckpoint's others.

    Raises:
        TaperlitError: ``minutes`` is not above 0, or checkpoints between validations are asked for with a ``monitor``.
        Stopped: as above.
    """

    def __init__(
        self,
        filename: str | None = "best",
        monitor: str | None = "val/loss",
        save_last: bool | None = True,
        enable_version_counter: bool = False,
        minutes: float | None = 15.0,
        **kwargs: Any,
    ) -> None:
        require_range("RunCheckpoint.minutes", minutes, above=0, mend="null is never")
        between = [name for name in ("every_n_train_steps", "train_time_interval") if kwargs.get(name)]
        if monitor is not None and between:
            raise TaperlitError(
                f"RunCheckpoint.{between[0]} would keep the weights of one step under {monitor} of another: leave it "
                "out (minutes= saves last.ckpt between validations), or give it a RunCheckpoint with monitor=None."
            )
        super().__init__(
            filename=filename,
            monitor=monitor,
            save_last=save_last,
            enable_version_counter=enable_version_counter,
            **kwargs,
        )
        self.minutes = minutes
        self._saved_last = time.monotonic()
        self._evaluates = False
        self._told = 0  # the signal's number
        self._handlers: dict[int, Any] = {}  # those that were there before
        self._in_step = False  # saving after a training step
        self._in_validation = False  # saving within a pass
        self._in_pass = False  # of validation, in which averages stand in the module
        self._trained: dict[str, Any] | None = None  # the weights at the run's end, before averages are copied over
        self._common_batches = 0.0  # of this pass, that every process still has before it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder that the checkpoints go to, and forget an earlier fit; a checkpoint is loaded after this."""
        if stage == "fit":
            # A trainer that has made steps goes on with its run, whose best stays the best.
            self.forget(everything=trainer.global_step == 0)
            self._trained = None
        super().setup(trainer, pl_module, stage)
        self._evaluates = stage != "fit"
        self._speaks = trainer.is_global_zero

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier fit's signal."""
        self._told = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for signals from here on."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for signals, in a run that has no sanity check too."""
        super().on_train_start(trainer, pl_module)
        self._saved_last = time.monotonic()
        self._listen()

    def _listen(self) -> None:
        # In place of Lightning's handlers and, until the end, of those that were there before a fit.
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN:  # the process was started so, in the background
                self._handlers[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: Any) -> None:
        if os.getpid() != self._process:  # a worker of the data loader's, forked with this handler
            return
        self._told = signum
        if signum == signal.SIGINT:
            self._give_back(signal.SIGINT)  # for the second, which is meant to stop at once
            # Not print: its buffer may be in use just now.
            if self._speaks:
                os.write(2, b"\nSaving last.ckpt once the step is done; Ctrl-C again stops at once, without it.\n")

    def _give_back(self, *signums: int) -> None:
        for signum in signums or tuple(self._handlers):
            if signum in self._handlers:
                signal.signal(signum, self._handlers.pop(signum))

    def _is_due(self) -> bool:
        return self.save_last is True and self.minutes is not None and self._age() >= 60 * self.minutes

    def _age(self) -> float:
        return time.monotonic() - self._saved_last

    def _anyone_was_told(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self._told), all=False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save if it is time, or if any process was told to stop."""
        self._in_step = True
        self._trained = None
        try:
            super().on_train_batch_end(trainer, pl_module, *args)
            if not should_accumulate(trainer):
                self._after_step(trainer)
        finally:
            self._in_step = False

    def _after_step(self, trainer: L.Trainer) -> None:
        failed = isinstance(trainer, Trainer) and trainer.saving_failed
        # One question for three, since every step asks it of all processes.
        if not trainer.strategy.reduce_boolean_decision(bool(self._told) or failed or self._is_due(), all=False):
            return
        answers = gather((self._told, failed, self._is_due()))
        told, failed, due = (max(answer) for answer in zip(*answers, strict=True))
        if failed:
            trainer.finish_saving()
        if validates_next(trainer):
            return  # a validation pass stops at its first batch, and so knows that it has to be done again
        if told:
            self._save_and_stop(trainer, told)
        elif due and self.saved_at != trainer.global_step:
            self._save_behind(trainer)

    def _save_and_stop(self, trainer: L.Trainer, signum: int) -> None:
        if self.saved_at != trainer.global_step:
            self.save_last_now(trainer)
        self._finish(trainer)
        if not _is_over(trainer):
            raise Stopped(self.last_model_path or None, signum)

    def _save_behind(self, trainer: L.Trainer) -> None:
        with trainer.saving_in_background() if isinstance(trainer, Trainer) else nullcontext():
            self.save_last_now(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        if isinstance(trainer, Trainer):
            trainer.finish_saving()

    def before_saving(self, trainer: L.Trainer) -> None:
        """Write the step's numbers first: a run that goes on from the checkpoint does not log them again."""
        self._saved_last = time.monotonic()
        if self._in_step:
            log_step_now(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out how many batches all processes have: only in those can they agree to stop."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._common_batches = min(gather(float(sum(batches))))
        if self._common_batches == float("inf") and trainer.world_size > 1:
            self._common_batches = 0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know that averages were exchanged with the weights just now."""
        self._in_pass = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know that the weights are back."""
        self._in_pass = False

    @contextmanager
    def _saving_in_validation(self, trainer: L.Trainer) -> Iterator[None]:
        # Averages and weights change places for a pass, and a checkpoint calls each by its place.
        averages = _averages(trainer)
        for callback in averages:
            callback.on_validation_epoch_end(trainer, trainer.lightning_module)
        self._in_validation = True
        try:
            yield
        finally:
            self._in_validation = False
            for callback in averages:
                callback.on_validation_epoch_start(trainer, trainer.lightning_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop within the pass, if any process was told to."""
        self._common_batches -= 1
        if trainer.state.fn != "fit" or self._common_batches < 0 or not self._anyone_was_told(trainer):
            return
        signum = max(gather(self._told))
        if trainer.sanity_checking:
            raise Stopped(None, signum)
        with self._saving_in_validation(trainer):
            self.save_last_now(trainer)
        raise Stopped(self.last_model_path or None, signum)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save as ModelCheckpoint does, and ``last.ckpt`` if it is old: it goes with a new best only."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.saved_at == trainer.global_step:
            return
        if trainer.strategy.reduce_boolean_decision(self._is_due(), all=False):
            self._save_behind(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark what is saved within a validation pass: the pass is to be done again. Save the weights, not averages."""
        if self._in_validation:
            repeat_validation(checkpoint)
        if self._trained is not None and "current_model_state" in checkpoint:
            checkpoint["current_model_state"] = self._trained

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights if the run ends here: averages are copied over them before :meth:`on_train_end`."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.save_last and _averages(trainer) and (trainer.should_stop or _is_over(trainer)):
            self._trained = host_copy(trainer.strategy.lightning_module_state_dict())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end too: the last validation may have been some steps before it."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.saved_at != trainer.global_step:
            self.save_last_now(trainer)
        self._trained = None
        self._finish(trainer)
        self._give_back()  # all is saved: what other callbacks do now may be stopped where it stands

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let a checkpoint that is being written be whole; take those along that this process has launched."""
        with self._saving_in_validation(trainer) if self._in_pass and self.save_on_exception else nullcontext():
            super().on_exception(trainer, pl_module, exception)
        self._in_pass = False
        self._give_back()
        at_once = isinstance(exception, SystemExit) and not isinstance(exception, Stopped)
        if isinstance(trainer, Trainer):
            trainer.abandon_saving(PATIENCE if at_once else None)
        if at_once:
            stop_launched(trainer, signal.SIGTERM)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back after a fit that had no step left, too."""
        self._give_back()

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
        self.current_score = state.get("current_score")  # which Lightning saves, and forgets

    def before_last_is_sought(self, directory: Path) -> None:
        """Give a ``last.ckpt`` back its name that a killed process was about to replace."""
        recover(directory / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")


def _averages(trainer: L.Trainer) -> list[WeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]


def _is_over(trainer: L.Trainer) -> bool:
    """Whether the training step under way, or the one just done, is the run's last."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs
