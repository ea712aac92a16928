"""Commands of ``taperlit`` in processes forked from one that has imported everything: quick to begin, and to stop."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torture_harness.verdict import Ended

MEMORY = 4 << 30  # bytes of a process's own: a size that allocates for ever should fail here, and not the machine
CRASHED = 70  # the status of a command that ended in a traceback

_context = multiprocessing.get_context("forkserver")


def import_beforehand() -> None:
    """Let what commands are forked from import everything first. It holds for all of this process."""
    _context.set_forkserver_preload(["torture_harness.warm"])


@dataclass(frozen=True)
class Call:
    """One command.

    Args:
        args: its name and options.
        folder: that it runs in.
        result: names a function of ``torture_harness.results`` that makes its result, and what it is given.
        environment: of the process, beside this one's.
        function: that takes the arguments and returns the status, as ``module:name``.
    """

    args: Sequence[str]
    folder: Path
    result: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    function: str = "taperlit.cli:main"


@dataclass(frozen=True)
class Started:
    """A command under way.

    Args:
        process: that it runs in.
        log: where its output goes, one file a stream.
    """

    process: BaseProcess
    log: Path

    def ended(self, hung: bool = False) -> Ended:
        """How it ended; waits for that."""
        self.process.join()
        texts = [(self.log / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        made = self.log / "result"
        result = json.loads(made.read_text()) if made.exists() else None
        status = self.process.exitcode
        return Ended(status if status is not None else 1, *texts, hung or status == -signal.SIGXCPU, result)

    def begin(self) -> None:
        """Wait until it has begun: the first of all waits for the imports."""
        while not (self.log / "begun").exists() and self.process.is_alive():
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9 it and what it has started, if it is still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()


class Runner:
    """Runs commands, and stops those that hang.

    Args:
        logs: folder for their output.
        limit: seconds of processor time after which a command hangs; of the clock, six times as many.
    """

    def __init__(self, logs: Path, limit: float = 20.0) -> None:
        self.logs, self.limit, self._count = logs, limit, 0

    @property
    def seconds(self) -> float:
        """Of processor time, of all commands that ended by themselves."""
        return sum(float(path.read_text()) for path in self.logs.glob("*/seconds"))

    def start(self, call: Call, limited: bool = True) -> Started:
        """Begin a command."""
        log = self.logs / str(self._count)
        self._count += 1
        log.mkdir(parents=True)
        for name in ("stdout", "stderr"):
            (log / name).touch()
        process = _context.Process(target=_child, args=(call, log, self.limit if limited else None), daemon=True)
        process.start()
        return Started(process, log)

    def run(self, call: Call) -> Ended:
        """Run a command to its end, or until it hangs."""
        started = self.start(call)
        started.begin()
        started.process.join(6 * self.limit)
        hung = started.process.is_alive()
        started.kill()
        return started.ended(hung)

    def run_together(self, calls: Sequence[Call]) -> list[Ended]:
        """Run several at once."""
        several = [self.start(call) for call in calls]
        for started in several:
            started.begin()
        until = time.monotonic() + 6 * self.limit * len(calls)
        for started in several:
            started.process.join(max(0.0, until - time.monotonic()))
        hung = [started.process.is_alive() for started in several]
        for started in several:
            started.kill()
        return [started.ended(late) for started, late in zip(several, hung, strict=True)]


def _child(call: Call, log: Path, limit: float | None) -> None:
    os.setpgid(0, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_APPEND), number)
    (log / "begun").touch()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit) + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    os.chdir(call.folder)
    os.environ.update(call.environment)
    sys.argv = ["taperlit"]
    status = _status(call)
    if status == 0 and call.result:
        try:
            (log / "result").write_text(json.dumps(_result(call)))
        except BaseException:
            traceback.print_exc()
            status = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    (log / "seconds").write_text(str(time.process_time()))
    os._exit(status)


def _status(call: Call) -> int:
    module, _, name = call.function.partition(":")
    try:
        import torch

        torch.set_num_threads(1)
        return int(getattr(__import__(module, fromlist=[name]), name)(list(call.args)))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return CRASHED


def _result(call: Call) -> Any:
    from torture_harness import results

    name, *given = call.result
    return getattr(results, name)(*given)
