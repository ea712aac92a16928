"""What a later option takes back that an earlier ``--config`` set."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

Leaves = dict[tuple[str, ...], Any]  # values by the path of keys to them


def without_effect(args: Sequence[str], gathered: Collection[str] = ()) -> list[str]:
    """A line for each ``--config`` of a command whose every value a later file or option sets to something else.

    Later ones win, so that the order of two overlays decides which of them a run has. A file that repeats what another
    says is not told. What cannot be read is left to the parser.

    Args:
        args: the command's arguments.
        gathered: options whose values add up, so that none takes another back.
    """
    given = [*_given(args)]
    lines = []
    for i, (name, mine) in enumerate(given):
        if name is None or not mine or any(path[0] in gathered for path in mine):
            continue
        later = given[i + 1 :]
        takers = [_taken_by(path, value, later) for path, value in mine.items()]
        if all(taker is not None for taker in takers) and any(not same for _, same in filter(None, takers)):
            by = dict.fromkeys(taker for taker, _ in filter(None, takers))
            lines.append(f"--config {name} has no effect: all that it sets is set again by {' and '.join(by)}.")
    return lines


def _taken_by(path: tuple[str, ...], value: Any, later: list[tuple[str | None, Leaves]]) -> tuple[str, bool] | None:
    """Which of the later ones has the last word on a value, and whether it says the same; None where nothing does."""
    for name, leaves in reversed(later):
        for other, its in leaves.items():
            within = other[: len(path)] == path and (value in (None, False) or other[len(path) :] == ("class_path",))
            if within or other == path[: len(other)]:
                return (f"--{'.'.join(other)}" if name is None else name), other == path and its == value
    return None


def _given(args: Sequence[str]) -> Iterator[tuple[str | None, Leaves]]:
    """Files with their names, and other options without, in the order in which they are applied."""
    waiting = [*args]
    while waiting:
        key, equals, value = waiting.pop(0).partition("=")
        if not key.startswith("--") or key.endswith("+"):  # an appended value takes nothing back
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                continue
            value = waiting.pop(0)
        if key == "--config":
            yield value, _leaves(_read(value))
        else:
            path = tuple(part for part in key.removeprefix("--").split(".") if part != "init_args")
            yield None, _leaves(_loaded(value), path)


def _read(name: str) -> Any:
    try:
        return yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Leaves:
    """The values in nested mappings; ``init_args``, which options need not name, is left out of their paths."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found: Leaves = {}
    for key, one in value.items():
        found |= _leaves(one, path if key == "init_args" else (*path, str(key)))
    return found
