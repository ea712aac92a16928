"""A run's folder for the one process that writes to it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from taperlit.checkpoint.atomic import remove
from taperlit.errors import TaperlitError
from taperlit.training.lightning_compat import begins_a_new_version, continue_version

LOCK = ".lock"


@contextmanager
def claimed_folder(trainer: L.Trainer) -> Iterator[None]:
    """Hold the folder of the trainer's run, which no other run then takes.

    A run that begins gets a number that no other has, however many begin at once; one that goes on has its folder to
    itself or ends. The lock is the system's, so that a killed process leaves none. The folders that were made for it
    are taken away again, those above it too, as far as nothing was written there; of a run that ends before its first
    batch, with what was. What was there before stays. Of several processes the first holds it. Loggers without a
    folder per run have nothing to be held.

    Raises:
        TaperlitError: another process writes to the folder, or it cannot be made.
    """
    logger = trainer.logger
    if rank_zero_only.rank or trainer.fast_dev_run or not isinstance(logger, TensorBoardLogger | CSVLogger | None):
        yield
        return
    made: list[Path] = []  # by this process, outermost first
    try:
        try:
            folder = Path(trainer.default_root_dir) if logger is None else _number(logger, made)
            _make(folder, made)
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise TaperlitError(
                f"{folder} is being written by another run; wait until it has ended, or stop it and start this again."
            ) from None
        except OSError as error:
            where = error.filename or "the output folder"
            raise TaperlitError(f"{where} cannot be written: {error.strerror}.") from error
        try:
            yield
        except BaseException:
            # Lightning's loggers write before the data and the callbacks are asked, which may refuse.
            if logger is not None and folder in made and not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                remove(folder)
            raise
        finally:
            remove(folder / LOCK)
            lock.release()
    finally:
        for path in reversed(made):
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _number(logger: TensorBoardLogger | CSVLogger, made: list[Path]) -> Path:
    """The logger's folder; of a run that begins it is made, with the first number that is free."""
    begins = begins_a_new_version(logger)
    while begins and not _make(Path(logger.log_dir), made):
        continue_version(logger, int(logger.version) + 1)
    return Path(logger.log_dir)


def _make(folder: Path, made: list[Path]) -> bool:
    """Make a folder and those above it, and note which of them were not there; whether it was not itself."""
    while True:
        try:
            folder.mkdir()
        except FileNotFoundError:
            _make(folder.parent, made)  # and again, for another run may take its own away just now
        except FileExistsError:
            if not folder.is_dir():
                raise
            return False
        else:
            made.append(folder)
            return True
