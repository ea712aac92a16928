"""The command line: which command, and what happens to an error. Nothing heavy is imported until a command runs."""

import os
import sys
import time
from collections.abc import Sequence

from taperlit.errors import TaperlitError

COMMANDS = {
    "fit": "train a model",
    "validate": "loss and perplexity of a checkpoint on held-out text",
    "test": "the same, logged as test/",
    "predict": "write each held-out token's log-probability to a file",
    "fold": "fold a checkpoint whose gate is 0 into a model without those norms",
    "generate": "continue a prompt with a folded model or a checkpoint",
}
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
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
        interrupted; 143 when terminated, the run saved.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    command = args[0]
    if command == "--version":
        from taperlit import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        return _fail(f"there is no command {command!r}; choose from {', '.join(COMMANDS)}.", status=2)
    # Lightning 2.6 uses what jsonargparse is about to drop; that is nothing the user can mend.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        from taperlit.cli import train

        train.run(command, args[1:])
    except TaperlitError as error:
        return _fail(str(error), error.status)
    except KeyboardInterrupt:
        return _fail("interrupted.", status=130)
    return 0


def _fail(message: str, status: int = 1) -> int:
    # Of a run's processes (Lightning, torchrun and SLURM number them so) the first speaks for what happens to all.
    numbers = {name: int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ}
    rank = next(iter(numbers.values()), 0)
    speaker = f"[rank {rank}]" if rank else "error:"
    print(f"taperlit: {speaker} {message}", file=sys.stderr)
    if rank and list(numbers) == ["LOCAL_RANK"]:
        time.sleep(6)  # Lightning's launcher kills the first process when it sees another fail: let it speak before
    return status
