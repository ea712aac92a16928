"""Markdown tables, CSV files, and how numbers are told."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from paper_harness.records import ENOUGH_SEEDS, StoredRun
from paper_harness.statistics import Estimate

FEW = "†"
FOOTNOTE = f"{FEW} of fewer than {'three' if ENOUGH_SEEDS == 3 else ENOUGH_SEEDS} seeds."
RUN_COLUMNS = (
    "run", "size", "corpus", "lr", "tokens_per_parameter", "steps", "parameters", "tokens", "variant", "seed",
    "warmup", "end", "shape", "ema_rate", "lambda", "val_loss", "gap", "loss_max", "loss_p999", "random_ratio",
    "random_largest_rms", "random_largest_loss", "diverged_step", "diverged_gate", "cpu_seconds", "date",
)  # fmt: skip


class Claim(NamedTuple):
    """A row of the page's first table."""

    claim: str
    papers: str
    ours: str


@dataclass
class Section:
    """One experiment, as the page tells it.

    Args:
        name: of the experiment and its files.
        title: its heading.
        lines: of Markdown, without heading and figure.
        columns: of the CSV file.
        rows: of the CSV file.
        caption: of the figure.
        draw: writes the figure to a path; None where there is nothing to draw.
        claims: rows of the page's first table.
    """

    name: str
    title: str
    lines: list[str]
    columns: Sequence[str] = RUN_COLUMNS
    rows: list[list[Any]] = field(default_factory=list)
    caption: str = ""
    draw: Callable[[Path], None] | None = None
    claims: list[Claim] = field(default_factory=list)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table, with a footnote if a number rests on few seeds.

    Args:
        header: of the columns.
        rows: of cells.
        left: columns of words; the others are numbers and stand to the right.
    """
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    marked = any(FEW in line for line in lines)
    return [*lines, "", *([FOOTNOTE, ""] if marked else [])]


def few(n: int) -> str:
    """The mark of a number that rests on fewer than three seeds."""
    return FEW if n < ENOUGH_SEEDS else ""


def percent(value: float) -> str:
    """A gap: two digits after the point, fewer once it is large, and past a thousand percent its power of ten."""
    if abs(value) >= 10:
        return f"{100 * value:+.0e}%"
    return f"{value:+.2%}" if abs(value) < 1 else f"{value:+.0%}"


def gap_cell(gap: Estimate | None) -> str:
    """A gap with its interval; the mark where it rests on few seeds."""
    if gap is None:
        return ""
    span = "" if gap.low is None or gap.high is None else f" ({percent(gap.low)} to {percent(gap.high)})"
    return f"{percent(gap.mean)}{span}{few(gap.n)}"


def number_cell(value: Estimate | None, form: str = ".2f", after: str = "") -> str:
    """A mean with the mark where it rests on few seeds; empty where there is none."""
    return "" if value is None else f"{value.mean:{form}}{after}{few(value.n)}"


def run_row(run: StoredRun, gap: float | None) -> list[Any]:
    """The cells of one run for ``RUN_COLUMNS``."""
    diverged = run.result.get("diverged") or {}
    ran = run.record.get("ran") or {}
    setup = run.setup
    return [
        run.key, setup.size, setup.corpus, setup.lr, run.length, run.steps,
        run.result.get("parameters"), run.result.get("tokens"), run.variant, run.seed,
        *(run.schedule or [None] * 5),
        run.loss if run.arrived else None, gap, run.tail("loss_max"), run.tail("loss_p999"),
        run.random("ratio"), run.random("largest_rms"), run.random("largest_loss"),
        diverged.get("step"), diverged.get("gate"), ran.get("cpu_seconds"), ran.get("date"),
    ]  # fmt: skip


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A header and the rows, with empty cells for None."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
