"""Options parsed from the command line, and wrong ones told in one line."""

import inspect
import sys
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser

from taperlit.cli.overlays import without_effect
from taperlit.ranges import require_seed

Texts = Annotated[list[str], "as they stand"]
"""Annotates a parameter whose option may be given several times, with a text each time, which is taken as it stands:
jsonargparse would read "[x]" as a list and "null" as nothing."""


class OneLineErrors:
    """Mixed into a parser: a wrong option, or one that is not written out, is told in one line, with exit status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What looks at the arguments as they were given (overlays.walk) would not know an abbreviated option.
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[call-arg]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line and exit."""
        print(f"taperlit: error: {' '.join(message.split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As the parser's own, but a file of other bytes than text, or nested without end, is a wrong option too."""
        try:
            return super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except UnicodeDecodeError as error:
            self.error(f"--config: a file is no UTF-8 text ({error.reason} at byte {error.start})")
        except RecursionError:
            self.error("an option or a file of --config is nested too deeply")


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


def _check_text(parser: Parser, key: str, value: str) -> None:
    if not value:
        parser.error(f"--{key} is empty; give it a value or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        parser.error(f"--{key} {value!a} is not UTF-8; give it as such")


def call(function: Callable[..., None], name: str, args: Sequence[str]) -> None:
    """Parse a function's parameters from the arguments of a command and call it.

    Exits with status 2 where an option is wrong. An empty text, one that is no UTF-8 and a ``seed`` out of its range
    are; an empty one of several texts is the function's to judge.

    Args:
        function: its annotations say how each option is parsed (see :data:`Texts`), its docstring what each is for.
        name: of the command.
        args: the command's arguments; ``--config`` reads options from a YAML file.

    Raises:
        TaperlitError: as the function, or the seed.
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
    for key, value in vars(options).items():
        if key not in texts and isinstance(value, str):
            _check_text(parser, key, value)
    require_seed("--seed", options.get("seed"))
    for line in without_effect(args, gathered=[str(key) for key in texts]):
        print(f"taperlit: {line}", file=sys.stderr)
    function(**{key: _as_list(value) if key in texts and value else value for key, value in vars(options).items()})
