"""Do many runs in a few processes: each run once, whoever else is at it."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from paper_harness import runs
from taperlit.errors import TaperlitError

LOOK_EVERY = 2.0  # seconds, for runs that another process is at


@dataclass(frozen=True)
class Place:
    """Where runs are done.

    Args:
        out: folder of the results.
        work: folder of the runs under way.
        accelerator: as Lightning names it.
        threads: of each process.
        compiled: with ``torch.compile``.
        until: ``time.time()`` from which on no run is begun; None is never.
    """

    out: Path
    work: Path
    accelerator: str = "cpu"
    threads: int = 1
    compiled: bool = False
    until: float | None = None


def remaining(wanted: Sequence[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The settings that have no record yet."""
    return [settings for settings in wanted if not runs.record_path(out, runs.hash_of(settings)).exists()]


def work(wanted: Sequence[dict[str, Any]], place: Place, parent: int | None = None) -> None:
    """Do what is not done yet, in order; leave alone what another process is at, but do it if that one dies.

    Args:
        wanted: settings of the runs.
        place: where.
        parent: process without which this one ends, after its run; None is none.

    Raises:
        TaperlitError: a run failed.
    """
    torch.set_num_threads(place.threads)
    while pending := remaining(wanted, place.out):
        did = False
        for settings in pending:
            if (place.until is not None and time.time() >= place.until) or parent not in (None, os.getppid()):
                return
            with _claimed(settings, place) as mine:
                if mine:
                    _do(settings, place)
                    did = True
        if not did:
            time.sleep(LOOK_EVERY)


@contextmanager
def _claimed(settings: dict[str, Any], place: Place) -> Iterator[bool]:
    """Whether a run is this process's to do; the system gives a dead process's claim back."""
    place.work.mkdir(parents=True, exist_ok=True)
    path = place.work / f"{runs.hash_of(settings)}.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield bool(remaining([settings], place.out))
    finally:
        path.unlink(missing_ok=True)  # who opened it before finds the record once it has the lock
        lock.release()


def _do(settings: dict[str, Any], place: Place) -> None:
    record = runs.train(settings, place.out, place.work, place.accelerator, place.compiled)
    result = record["result"]
    lost = result["diverged"]
    end = f"diverged at step {lost['step']}: {lost['why']}" if lost else f"val/loss {result['val'][-1][1]:.4f}"
    print(f"{title(settings)}: {end}, {record['ran']['seconds']:.0f} s", file=sys.stderr, flush=True)


def title(settings: dict[str, Any]) -> str:
    """A run in one line."""
    idea = f" {settings['idea']}" if "idea" in settings else ""
    what = f"{settings['size']} {settings['corpus']} {settings['variant']}{idea} seed {settings['seed']}"
    return (
        f"{runs.hash_of(settings)} {what}, {settings['tokens_per_parameter']:g} tokens/parameter, lr {settings['lr']:g}"
    )


def do_all(wanted: Sequence[dict[str, Any]], place: Place, workers: int) -> None:
    """Do runs in several processes, or one run alone in this one.

    Args:
        wanted: settings of the runs, in the order to do them.
        place: where.
        workers: processes.

    Raises:
        TaperlitError: a run failed; its worker has told why.
    """
    pending = remaining(wanted, place.out)
    workers = min(workers, len(pending))
    if workers <= 1:
        work(pending, place)
        return
    context = multiprocessing.get_context("spawn")  # threads and a GPU do not outlive a fork
    processes = [context.Process(target=_worker, args=(pending, place, os.getpid())) for _ in range(workers)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
        signal.signal(signal.SIGTERM, before)
    if any(process.exitcode for process in processes):
        raise TaperlitError("a worker failed, see above; what is done is kept: run the same command again to go on.")


def _worker(pending: Sequence[dict[str, Any]], place: Place, parent: int) -> None:
    try:
        work(pending, place, parent)
    except TaperlitError as error:
        sys.exit(f"paper: {error}")
