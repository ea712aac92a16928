"""Measurements that lie in a run's folder: what ``taperlit bench --json`` and ``taperlit report --measure`` write."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from taperlit.errors import TaperlitError

PATTERN = "bench*.json"
BEFORE_AND_AFTER = "bench_before_after.json"  # what --measure writes


class Bench(NamedTuple):
    """A measurement.

    Args:
        path: of its file.
        about: ``versions``, ``device``, ``commit`` and ``command``, as far as the file has them.
        rows: see the commands.
    """

    path: Path
    about: dict[str, Any]
    rows: list[dict[str, Any]]


def find_benches(folder: Path) -> list[Path]:
    """The files of measurements in a run's folder, by name."""
    return sorted(folder.glob(PATTERN))


def read_bench(path: Path) -> Bench:
    """Read one.

    Raises:
        TaperlitError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content.pop("rows")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TaperlitError(f"{path} is not what `taperlit bench --json` writes; measure again.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaperlitError(f"{path} has no rows of figures; measure again.")
    return Bench(path, content, rows)
