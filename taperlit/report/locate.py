"""Find the run that a path means."""

from collections.abc import Iterable
from pathlib import Path

from taperlit.errors import TaperlitError

EVENTS = "events.out.tfevents.*"
MADE_BY_LOGGERS = (EVENTS, "metrics.csv", "config.yaml", "hparams.yaml", "checkpoints")
NAMED = 3  # folders that an error names


def find_run(path: str | Path) -> Path:
    """The folder of the run that a path means.

    Args:
        path: a run's own folder (``version_N``); a logger's folder, whose newest run is taken; or a run's checkpoints,
            their folder, or a folded model beside them.

    Raises:
        TaperlitError: nothing is there, or no run.
    """
    given = Path(path)
    if not given.exists():
        raise TaperlitError(f"{path}: there is no such folder; name a run's, such as runs/quickstart/version_0.")
    if is_run(given):
        return given
    if runs := _runs_in(given):
        return newest(runs)
    for folder in given.absolute().parents[:2]:
        if is_run(folder):
            return folder
    raise TaperlitError(f"{path} holds no run (no event files, metrics.csv or config.yaml); {_advice(given)}.")


def is_run(folder: Path) -> bool:
    """Whether a folder has anything that a run's logger leaves."""
    return folder.is_dir() and any(next(folder.glob(pattern), None) for pattern in MADE_BY_LOGGERS)


def newest(runs: Iterable[Path]) -> Path:
    """The highest ``version_N``; of runs that are named otherwise, the one that was written to last."""

    def age(run: Path) -> tuple[int, float]:
        number = run.name.removeprefix("version_")
        return (int(number) if number.isdigit() else -1, run.stat().st_mtime)

    return max(runs, key=age)


def _runs_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if is_run(path)] if folder.is_dir() else []


def _advice(folder: Path) -> str:
    if folder.is_dir() and (below := [str(path) for path in sorted(folder.glob("*")) if _runs_in(path)]):
        more = f" or {len(below) - NAMED} more" if len(below) > NAMED else ""
        return f"name one of the loggers' folders in it: {', '.join(below[:NAMED])}{more}"
    return "name a run's folder, such as runs/quickstart/version_0"
