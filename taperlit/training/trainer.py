"""Lightning's Trainer with checkpoints that cannot be lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException

from taperlit.checkpoint.atomic import aside, commit, remove
from taperlit.checkpoint.background import BackgroundWriter, can_copy, host_copy
from taperlit.checkpoint.reader import load_whole
from taperlit.checkpoint.sharded import DIGEST, META, digest
from taperlit.distributed import gather
from taperlit.errors import TaperlitError
from taperlit.training.lightning_compat import (
    FitLoop,
    LoggerConnector,
    SignalConnector,
    dump_checkpoint,
    writes_one_file,
)
from taperlit.training.trainer_numbers import check_numbers


class RunCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file, and reads files and sharded directories without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint to the file ``path``, whose directory is made if it is missing."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file or a sharded directory, tensors on the CPU.

        Raises:
            TaperlitError: as :func:`taperlit.checkpoint.reader.load_whole`.
        """
        return load_whole(path)


class Trainer(L.Trainer):
    """Writes every checkpoint aside, syncs it and only then gives it its name, whatever strategy or callback saves it.

    A run on one process or with DDP also resumes from what a sharded run saved. A ``CheckpointIO`` plugin of the user's
    own is left to do as it does.

    Args:
        *args: those of :class:`lightning.Trainer`.
        **kwargs: those of :class:`lightning.Trainer`.

    Raises:
        TaperlitError: a number out of its range that Lightning would take, as a ``gradient_clip_val`` below 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_numbers(kwargs)
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = RunCheckpointIO()
        FitLoop.replace(self)
        LoggerConnector.replace(self)
        SignalConnector.replace(self)
        self._writer = BackgroundWriter()
        self._in_background = False
        self._behind: Path | None = None  # what the first process writes in the background

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Save as :meth:`lightning.Trainer.save_checkpoint`, but aside and synced first; every process must ask.

        One that is written in the background is waited for.

        Raises:
            TaperlitError: it cannot be written, or the one before could not; what was there stays.
        """
        self.finish_saving()
        if not isinstance(self.strategy.checkpoint_io, RunCheckpointIO) or "://" in str(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        target = Path(filepath)
        partial = aside(target, "partial")
        if self.is_global_zero:
            remove(partial)  # a killed run's
        self.strategy.barrier("Trainer.save_checkpoint")
        checkpoint = dump_checkpoint(self, weights_only)
        if self._in_background and writes_one_file(self.strategy) and can_copy(checkpoint):
            self._behind = target
            if self.is_global_zero:
                copied = host_copy(checkpoint)
                self._writer.start(lambda: self._write_file(copied, partial, target))
            return
        self._all_or_none(target, partial, lambda: self.strategy.save_checkpoint(checkpoint, partial))
        self._all_or_none(target, partial, lambda: self._commit(partial, target))

    @contextmanager
    def saving_in_background(self) -> Iterator[None]:
        """Here checkpoints are copied to host memory and written while training goes on, wherever that is safe.

        That is on one process and with DDP, where the first writes one file. A sharded checkpoint, which all write
        together, is written before training goes on.
        """
        self._in_background = True
        try:
            yield
        finally:
            self._in_background = False

    @property
    def saving_failed(self) -> bool:
        """Whether this process could not write a checkpoint in the background; :meth:`finish_saving` says why."""
        return self._writer.failed

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one; every process must ask.

        Raises:
            TaperlitError: it could not be written, as from :meth:`save_checkpoint`.
        """
        target, self._behind = self._behind, None
        error = self._writer.wait()  # also for one that was abandoned
        if target is not None:
            self._raise_anywhere(target, None if error is None else _reason(error))

    def abandon_saving(self, patience: float | None = None) -> None:
        """Wait for it on this process alone, where others may have gone, and raise nothing.

        Args:
            patience: the most seconds to wait; None is for ever.
        """
        self._behind = None
        self._writer.wait(patience)

    def _write_file(self, checkpoint: dict[str, Any], partial: Path, target: Path) -> None:
        try:
            self.strategy.checkpoint_io.save_checkpoint(checkpoint, partial)
            commit(partial, target)
        except Exception:
            remove(partial)
            raise

    def _commit(self, partial: Path, target: Path) -> None:
        if not self.is_global_zero:
            return
        if (partial / META).exists():
            (partial / DIGEST).write_text(digest(partial))
        commit(partial, target)

    def _all_or_none(self, target: Path, partial: Path, write: Callable[[], None]) -> None:
        """Write on every process; what fails on one fails on all, so that none waits, and nothing is left behind."""
        problem = None
        try:
            write()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = _reason(error)
        except BaseException:  # told to stop
            if self.is_global_zero:
                remove(partial)
            raise
        self._raise_anywhere(target, problem, partial)

    def _raise_anywhere(self, target: Path, problem: str | None, partial: Path | None = None) -> None:
        problems = [problem for problem in gather(problem) if problem is not None]
        if problems:
            if self.is_global_zero and partial is not None:
                remove(partial)
            raise TaperlitError(
                f"{target} cannot be written: {problems[0]}. What was saved before is intact; make room and go on "
                "with --ckpt_path last."
            )


def _reason(error: BaseException) -> str:
    """The disk's own word, if it has one: torch tells a failed write by where it noticed."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))  # the first rank's, with its traceback
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200]
