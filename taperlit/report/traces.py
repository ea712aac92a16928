"""What a run's loggers wrote, by tag: TensorBoard's event files and CSVLogger's ``metrics.csv``."""

import csv
from collections.abc import Iterable
from pathlib import Path

from taperlit.errors import TaperlitError
from taperlit.report.locate import EVENTS

Points = list[tuple[int, float]]
"""(step, value) pairs, the steps as they were logged: 0 is the first optimizer step."""

GAINS = "gain/"  # histograms by TaperMonitor
NOT_TRACES = ("hp_metric",)  # Lightning's placeholder for TensorBoard's page of hyperparameters


def read_traces(run: Path) -> dict[str, Points]:
    """Every scalar that a run logged.

    A tag's steps rise. Where a run was resumed from an earlier step, what it had logged after that step was of work
    that is lost, and is left out.

    Args:
        run: its folder.

    Raises:
        TaperlitError: a ``metrics.csv`` that is none.
    """
    logged = tensorboard_scalars(run)
    for tag, points in csv_scalars(run).items():
        logged.setdefault(tag, points)
    return {tag: points for tag, points in logged.items() if tag not in NOT_TRACES}


def tensorboard_scalars(run: Path) -> dict[str, Points]:
    """The scalars in the event files of a folder, by tag.

    TaperMonitor writes its gains there as histograms, ``gain/<norm>``, which hold the sums that these two are made of:
    they are here under the names that other loggers get, ``taper/gain_mean/<norm>`` and ``taper/gain_std/<norm>``.
    """
    if next(run.glob(EVENTS), None) is None:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    scalars = {
        tag: _as_it_went((event.step, event.value) for event in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }
    for tag in events.Tags()["histograms"]:
        if tag.startswith(GAINS):
            norm, drawn = tag.removeprefix(GAINS), events.Histograms(tag)
            sums = [(each.step, each.histogram_value) for each in drawn]
            means = [(step, each.sum / each.num) for step, each in sums if each.num]
            squares = [each.sum_squares / each.num for _, each in sums if each.num]
            deviations = [
                (step, max(0.0, square - mean**2) ** 0.5) for (step, mean), square in zip(means, squares, strict=True)
            ]
            scalars[f"taper/gain_mean/{norm}"], scalars[f"taper/gain_std/{norm}"] = map(
                _as_it_went, (means, deviations)
            )
    return scalars


def csv_scalars(run: Path) -> dict[str, Points]:
    """The columns of a folder's ``metrics.csv``, by their heading.

    Raises:
        TaperlitError: it has no ``step``, or a cell that is no number.
    """
    path = run / "metrics.csv"
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a run that was killed may leave half a line, and half a number in it
    rows = csv.DictReader(whole.splitlines())
    logged: dict[str, list[tuple[int, float]]] = {}
    try:
        for row in rows:
            step = int(row["step"])
            for tag, cell in row.items():
                if tag != "step" and cell:
                    logged.setdefault(tag, []).append((step, float(cell)))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise TaperlitError(f"{path}, line {rows.line_num}, is not CSVLogger's ({error}); move it away.") from error
    return {tag: _as_it_went(points) for tag, points in logged.items()}


def _as_it_went(written: Iterable[tuple[int, float]]) -> Points:
    """Points in the order in which they were written, without those that a later one goes back behind."""
    kept: Points = []
    for step, value in written:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept
