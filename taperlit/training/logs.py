"""The logs of a run that goes on in its folder: each step's numbers once, as if nothing had stopped it."""

import csv
import math
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from taperlit.checkpoint.atomic import aside, recover, write_file
from taperlit.training.lightning_compat import create_csv_writer, logged_step

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"


class LoggedOnce(L.Callback):
    """Drops from the logs of an earlier process what a run that goes on from its checkpoint logs again.

    A process that ends without saving has logged steps after its last checkpoint. The next one does them again, with
    the same numbers, and TensorBoard would show both. Before its first step, what the loggers' folders held is cut
    there. A ``metrics.csv``, which its logger begins anew each time, keeps what came before.

    Args:
        loggers: of the run, before they have opened a file of their own; ``TensorBoardLogger`` and ``CSVLogger`` are
            looked after.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        local = [] if rank_zero_only.rank else list(loggers)
        self._events = {
            logger: sorted(Path(logger.log_dir).glob(EVENTS))
            for logger in local
            if isinstance(logger, TensorBoardLogger)
        }
        self._tables = [logger for logger in local if isinstance(logger, CSVLogger)]
        for table in self._tables:
            _keep_table(table)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before the first step, cut the logs at it."""
        self._cut(logged_step(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where no step was left, drop what was logged again all the same."""
        self._cut(math.inf)

    def _cut(self, step: float) -> None:
        for logger, earlier in self._events.items():
            logger.save()
            here = Path(logger.log_dir)
            again = {seen for path in here.glob(EVENTS) if path not in earlier for seen in _logged(path)}
            for path in earlier:
                _cut_events(path, step, again)
        for table in self._tables:
            _cut_table(Path(table.log_dir) / METRICS, step)
        self._events, self._tables = {}, []


def _records(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Each event of TensorBoard's, as its bytes in the file and as a message; what a killed process cut short is not.

    A file is a sequence of TFRecords: length, its checksum, the message, its checksum (8, 4, length and 4 bytes).
    """
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    data = path.read_bytes()
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        yield data[start:end], Event.FromString(data[start + 12 : end - 4])
        start = end


def _logged(path: Path) -> Iterator[tuple[str, int]]:
    for _, event in _records(path):
        yield from ((value.tag, event.step) for value in event.summary.value)


def _cut_events(path: Path, step: float, again: set[tuple[str, int]]) -> None:
    kept, dropped = [], 0
    for record, event in _records(path):
        values = event.summary.value
        if values and (event.step >= step or all((value.tag, event.step) in again for value in values)):
            dropped += 1
        else:
            kept.append(record)
    if dropped:
        write_file(path, lambda partial: partial.write_bytes(b"".join(kept)))


def _keep_table(logger: CSVLogger) -> None:
    """Let the logger make its writer, which deletes the table that there is, and put that back."""
    path = Path(logger.log_dir) / METRICS
    recover(path)
    if not path.exists():
        return
    kept = aside(path, "old")
    path.replace(kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty")
        header, _ = _read_table(kept)
        create_csv_writer(logger, header)
    kept.replace(path)


def _read_table(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        return table.fieldnames or (), list(table)


def _cut_table(path: Path, step: float) -> None:
    if not path.exists():
        return
    header, rows = _read_table(path)
    kept = [row for row in rows if float(row["step"] or 0) < step]
    if len(kept) == len(rows):
        return

    def fill(partial: Path) -> None:
        with open(partial, "w", newline="") as file:
            table = csv.DictWriter(file, header)
            table.writeheader()
            table.writerows(kept)

    write_file(path, fill)
