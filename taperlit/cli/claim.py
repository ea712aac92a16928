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
    itself or ends. The lock is the system's, so that a killed process leaves none. A folder in which nothing was
    written is taken away again. Of several processes the first holds it. Loggers without a folder per run have nothing
    to be held.

    Raises:
        TaperlitError: another process writes to the folder, or it cannot be made.
    """
    logger = trainer.logger
    if rank_zero_only.rank or trainer.fast_dev_run or not isinstance(logger, TensorBoardLogger | CSVLogger | None):
        yield
        return
    try:
        folder = Path(trainer.default_root_dir) if logger is None else _make(logger)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise TaperlitError(
            f"{folder} is being written by another run; wait until it has ended, or stop it and start this again."
        ) from None
    except OSError as error:
        raise TaperlitError(f"{error.filename or 'the output folder'} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        remove(folder / LOCK)
        lock.release()
        if logger is not None:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _make(logger: TensorBoardLogger | CSVLogger) -> Path:
    """The logger's folder; of a run that begins it is made, with the first number that is free."""
    begins = begins_a_new_version(logger)
    while begins:
        try:
            Path(logger.log_dir).mkdir(parents=True)
            break
        except FileExistsError:
            continue_version(logger, int(logger.version) + 1)
    return Path(logger.log_dir)
