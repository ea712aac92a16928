"""Measurements that lie in a run's folder: what ``taperlit bench --json`` and ``taperlit report --measure`` write."""

from pathlib import Path
from typing import Any, NamedTuple

from taperlit.checkpoint.plain import check_fields, read_json
from taperlit.errors import TaperlitError

PATTERN = "bench*.json"
MEND = "measure again"
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
    content = read_json(path, MEND)
    if not isinstance(content, dict) or "rows" not in content:
        raise TaperlitError(f"{path} is not what `taperlit bench --json` writes; {MEND}.")
    rows = content.pop("rows")
    check_fields(rows, list[dict[str, Any]], path, "rows", MEND)
    return Bench(path, content, rows)
