"""How one ``--config`` or option lies over another: which fields it keeps, and what it takes back."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

Leaves = dict[tuple[str, ...], Any]  # values by the path of keys to them
FIELDS = ("model", "overrides")  # a mapping that the parser takes for one value


def keep_fields(args: Sequence[str]) -> list[str]:
    """The same arguments where a mapping changes single fields of ``model.overrides``, as of all other options.

    The parser would have it, in a ``--config`` or as an option, replace what was given before whole. So the fields that
    it does not name are given again after it.

    Args:
        args: the command's arguments.
    """
    kept: list[str] = []
    fields: dict[str, Any] = {}
    for taken, _, leaves in walk(args):
        kept += taken
        mine = _nested({path[2:]: value for path, value in leaves.items() if path[:2] == FIELDS and len(path) > 2})
        if FIELDS in leaves:  # null, or no mapping
            fields = {}
        elif mine:
            before = {key: value for key, value in fields.items() if key not in mine}
            kept += [f"--{'.'.join(FIELDS)}.{key}={_written(value)}" for key, value in before.items()]
        fields |= mine
    return kept


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
            turned_off = value in (None, False) and (name is None or path[0] != "taper")  # see cli.slots.turn_on
            within = other[: len(path)] == path and (turned_off or other[len(path) :] == ("class_path",))
            if within or other == path[: len(other)]:
                return (f"--{'.'.join(other)}" if name is None else name), other == path and its == value
    return None


def _given(args: Sequence[str]) -> Iterator[tuple[str | None, Leaves]]:
    """Files with their names, and other options without, in the order in which they are applied."""
    return ((name, leaves) for _, name, leaves in walk(args) if leaves or name is not None)


def walk(args: Sequence[str]) -> Iterator[tuple[list[str], str | None, Leaves]]:
    """The arguments of each option of a command, the file's name where it is one, and the values that it sets."""
    waiting = [*args]
    while waiting:
        taken = [waiting.pop(0)]
        key, equals, value = taken[0].partition("=")
        if key.startswith("--") and not equals and waiting and not waiting[0].startswith("--"):
            taken.append(value := waiting.pop(0))
        if not key.startswith("--") or key.endswith("+") or (not equals and len(taken) == 1):
            yield taken, None, {}  # among them an appended value, which takes nothing back
        elif key == "--config":
            yield taken, value, _leaves(_read(value))
        else:
            path = tuple(part for part in key.removeprefix("--").split(".") if part != "init_args")
            yield taken, None, _leaves(_loaded(value), path)


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


def _written(value: Any) -> str:
    """A value as an option on the command line has it: the parser takes a string there as it stands."""
    return value if isinstance(value, str) else json.dumps(value)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Leaves:
    """The values in nested mappings; ``init_args``, which options need not name, is left out of their paths."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found: Leaves = {}
    for key, one in value.items():
        found |= _leaves(one, path if key == "init_args" else (*path, str(key)))
    return found


def _nested(leaves: Leaves) -> dict[str, Any]:
    """The nested mappings that have these values."""
    whole: dict[str, Any] = {}
    for (*within, last), value in leaves.items():
        place = whole
        for key in within:
            place = place.setdefault(key, {})
        place[last] = value
    return whole
