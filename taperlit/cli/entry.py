"""``main``: run one command, and tell an error in one line."""

import contextlib
import errno
import os
import select
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from taperlit.cli.signals import Stops
from taperlit.cli.table import COMMANDS
from taperlit.errors import TaperlitError

# What a disk says that is full, over its quota, read-only or broken.
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What a path says that is another's, or a file where a folder should be, or the other way round.
PATH_REFUSES = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
LAUNCHER_LOOKS_EVERY = 5  # seconds; lightning.fabric.strategies.launchers.subprocess_script._ChildProcessObserver


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: taperlit COMMAND [options]",
            "",
            "Train language models whose norms are tapered away, fold them, and decode.",
            "",
            *lines,
            "",
            "taperlit COMMAND --help lists a command's options; --print_config prints them as YAML.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit status: 0; 1 for an error that the user can mend, told in one line; 2 for wrong options; 130 when
        interrupted; 143 when terminated.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    name = args[0]
    if name == "--version":
        from taperlit import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; choose from {', '.join(COMMANDS)}.", status=2)
    # Lightning 2.6 uses what jsonargparse is about to drop; that is nothing the user can mend.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        with Stops():
            try:
                _run(name, args[1:])
            finally:
                sys.stdout.flush()  # now, and not where Python ends, which has no line for a reader that has gone
    except TaperlitError as error:
        return _fail(str(error), error.status)
    except FileNotFoundError as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno == errno.EPIPE and _nobody_reads():
            return _fail("nobody reads the standard output any more.")
        if error.errno in PATH_REFUSES and error.filename:
            return _fail(f"{error.filename}: {error.strerror}.")
        if error.errno not in DISK_REFUSES:
            raise
        return _fail(f"{error.filename or 'the output folder'}: {error.strerror}; make room first.")
    except KeyboardInterrupt:
        return _fail("interrupted.", status=130)
    return 0


def _run(name: str, args: list[str]) -> None:
    command = COMMANDS[name]
    function = getattr(import_module(command.module), command.function)
    if command.parses:
        function(name, args)
    else:
        from taperlit.cli.options import call

        call(function, name, args)


def _nobody_reads() -> bool:
    """Whether the standard output's reader has gone (``| head``); what is left to write then goes nowhere."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)  # for errors alone, which are always told
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _fail(message: str, status: int = 1) -> int:
    # Of a run's processes (Lightning, torchrun and SLURM number them so) the first speaks for what happens to all.
    numbers = {name: int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ}
    rank = next(iter(numbers.values()), 0)
    speaker = f"[rank {rank}]" if rank else "error:"
    sys.stderr.write(f"taperlit: {speaker} {message}\n")  # at once: print writes the line's end apart
    if rank and list(numbers) == ["LOCAL_RANK"]:
        _outlive_the_launcher()
    return status


def _outlive_the_launcher() -> None:
    """Give the first process the time to tell its error.

    Lightning's launcher runs in it, looks at the other processes every few seconds, and kills it as soon as one of them
    has ended with an error. What goes wrong on all processes should be told by the first before that.
    """
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(LAUNCHER_LOOKS_EVERY + 1)
