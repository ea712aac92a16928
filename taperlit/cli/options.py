"""Options parsed from the command line, and wrong ones told in one line."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser


class OneLineErrors:
    """Mixed into a parser: a wrong option is told in one line, with exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line and exit."""
        print(f"taperlit: error: {' '.join(message.split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse's parser with errors of one line."""


def call(function: Callable[..., None], name: str, args: Sequence[str]) -> None:
    """Parse a function's parameters from the arguments of a command and call it.

    Exits with status 2 where an option is wrong.

    Args:
        function: its annotations say how each option is parsed, its docstring what each is for.
        name: of the command.
        args: the command's arguments; ``--config`` reads options from a YAML file.
    """
    parser = Parser(prog=f"taperlit {name}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options")
    parser.add_function_arguments(function)
    options = parser.parse_args(list(args))
    options.pop("config", None)
    function(**options)
