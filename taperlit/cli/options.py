"""Options parsed from the command line, and wrong ones told in one line."""

import inspect
import sys
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser

Texts = Annotated[list[str], "as they stand"]
"""Annotates a parameter whose option may be given several times, with a text each time, which is taken as it stands:
jsonargparse would read "[x]" as a list and "null" as nothing."""


class OneLineErrors:
    """Mixed into a parser: a wrong option is told in one line, with exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line and exit."""
        print(f"taperlit: error: {' '.join(message.split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class Parser(OneLineErrors, ArgumentParser):
    """jsonargparse's parser with errors of one line."""


class _AddText(Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or []
        setattr(namespace, self.dest, [*_as_list(before), values])


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


class _TextType:
    """What jsonargparse calls with each text of the command line, and with all that a YAML file has under the key."""

    def __call__(self, value: object) -> object:
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            return value
        raise ValueError(f"{value!r} is not a text or a list of texts; quote what YAML reads as something else")

    def __repr__(self) -> str:  # the help shows it
        return "str, several times"


def call(function: Callable[..., None], name: str, args: Sequence[str]) -> None:
    """Parse a function's parameters from the arguments of a command and call it.

    Exits with status 2 where an option is wrong.

    Args:
        function: its annotations say how each option is parsed (see :data:`Texts`), its docstring what each is for.
        name: of the command.
        args: the command's arguments; ``--config`` reads options from a YAML file.
    """
    parser = Parser(prog=f"taperlit {name}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options")
    parameters = inspect.signature(function).parameters
    texts: set[str | int] = {key for key in parameters if parameters[key].annotation in (Texts, Texts | None)}
    parser.add_function_arguments(function, skip=texts)
    for parameter in docstring_parser.parse(function.__doc__ or "").params:
        if (key := parameter.arg_name) in texts:
            required = parameters[key].default is inspect.Parameter.empty
            purpose = " ".join((parameter.description or "").split())
            parser.add_argument(
                f"--{key}", action=_AddText, type=_TextType(), metavar="TEXT", required=required, help=purpose
            )
    for action in parser._actions:
        if action.dest in parameters and parameters[action.dest].annotation is bool:
            action.nargs, action.const = "?", True  # --force alone says yes, as --force=true does
    options = parser.parse_args(list(args))
    options.pop("config", None)
    function(**{key: _as_list(value) if key in texts and value else value for key, value in vars(options).items()})
