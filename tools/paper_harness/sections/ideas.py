"""`ideas`: what was tried to taper without loss, each beside the paper's own settings and the baseline of its seed."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from paper_harness.comparison import left_out
from paper_harness.figures import canvas, color_of
from paper_harness.records import BASELINE, TITLES, StoredRun, corpus_names, grouped, title, without_doubles
from paper_harness.statistics import Estimate, estimate
from paper_harness.tables import RUN_COLUMNS, Section, few, gap_cell, markdown, number_cell, run_row

MOST_ROWS = 4  # of panels: the places with the most runs
PAPERS_OWN = "the paper's"
COLUMNS = ("idea", *RUN_COLUMNS)
CAPTION = (
    "Mean gap to the baseline of the same model and seed with its 95% interval, single seeds as dots; at the right how "
    "many runs diverged."
)


class Tried:
    """The runs of one idea and variant at one place, each with the baseline of its seed.

    Args:
        idea: name in ``IDEAS``; empty is the paper's own settings.
        variant: of the runs.
        runs: by seed.
        baselines: of the same model, data and seed, where there is one that arrived.
        plain: losses of the baselines without any idea, by seed.
    """

    def __init__(
        self,
        idea: str,
        variant: str,
        runs: dict[int, StoredRun],
        baselines: dict[int, StoredRun],
        plain: dict[int, float],
    ) -> None:
        self.idea, self.variant, self.runs = idea, variant, runs
        self.baselines, self.plain = baselines, plain

    @property
    def lost(self) -> list[StoredRun]:
        """Those that diverged."""
        return [run for run in self.runs.values() if not run.arrived]

    def pairs(self) -> dict[int, tuple[StoredRun, StoredRun]]:
        """Runs that arrived, with their baselines, by seed."""
        arrived = {seed: run for seed, run in self.runs.items() if run.arrived}
        return {seed: (run, self.baselines[seed]) for seed, run in arrived.items() if seed in self.baselines}

    def gaps(self) -> dict[int, float]:
        """The loss over the own baseline's, less 1, by seed."""
        return {seed: run.loss / base.loss - 1 for seed, (run, base) in self.pairs().items()}

    def gap(self) -> Estimate | None:
        """Their mean."""
        return estimate(self.gaps().values())

    def over_plain(self) -> Estimate | None:
        """The same over the baseline without the idea, which may be of another model."""
        return estimate(
            run.loss / self.plain[seed] - 1 for seed, run in self.runs.items() if run.arrived and seed in self.plain
        )

    def widest(self) -> Estimate | None:
        """The largest gap at any validation while the gate falls."""
        found = []
        for run, base in self.pairs().values():
            others = dict(base.curve("val"))
            gate = run.curve("taper/gate")
            falls = [
                loss / others[step] - 1
                for step, loss in run.curve("val")
                if step in others and 0 < _at(gate, step) < 1 and math.isfinite(loss)
            ]
            found += [max(falls)] if falls else []
        return estimate(found)

    def ratio(self, figure: Callable[[StoredRun], float | None]) -> Estimate | None:
        """A figure over the own baseline's, as the mean over the pairs."""
        values = [(figure(run), figure(base)) for run, base in self.pairs().values()]
        return estimate(own / other for own, other in values if own is not None and other)

    def mean(self, figure: Callable[[StoredRun], float | None]) -> Estimate | None:
        """A figure's mean over the runs that arrived."""
        return estimate(v for run in self.runs.values() if run.arrived and (v := figure(run)) is not None)


def _at(curve: Sequence[tuple[float, float]], step: float) -> float:
    """A trace's last value up to a step; NaN where there is none."""
    return next((value for at, value in reversed(curve) if at <= step), math.nan)


def tried_in(runs: Iterable[StoredRun]) -> list[Tried]:
    """The runs of one place as rows: the paper's own settings first, then the ideas by name, each variant in turn.

    Runs of several setups, as ideas that change the model are, are rows of their own; `plain` is of the one setup with
    the most baselines.
    """
    runs = [*runs]
    arrived = [run for run in runs if run.variant == BASELINE and run.arrived]
    bases = {(run.setup, run.seed): run for run in arrived}
    without = grouped([run for run in arrived if not run.idea], lambda run: run.setup)
    plain = {run.seed: run.loss for run in next(iter(without.values()), [])}
    rows = []
    for (idea, variant, setup), own in grouped(runs, lambda run: (run.idea, run.variant, run.setup)).items():
        by_seed = {run.seed: run for run in own}
        own_bases = {seed: base for seed in by_seed if (base := bases.get((setup, seed))) is not None}
        rows.append(Tried(idea, variant, by_seed, own_bases, plain))
    order = [*TITLES]
    return sorted(rows, key=lambda row: (row.idea, order.index(row.variant)))


def section(runs: Sequence[StoredRun]) -> Section:
    """The tables, the rows and the figure of the runs."""
    picked = without_doubles(runs)
    lines = [
        "Each idea changes one thing of the paper's settings; docs/experiments.md says what it is and what came of it. "
        "The gap is to the baseline of the same model and seed: the mean of the pairs, with Student's 95% interval; "
        "`plain` is the same to the baseline without the idea, another one where the idea changes the model. `widest` "
        "is the largest gap at a validation while the gate falls. Tails are over the baseline's: the largest loss of "
        "a held-out token, and of random tokens; `RMS` is the largest over the median residual before the head on "
        "random tokens, of the run itself.",
        "",
    ]
    names = corpus_names(picked.runs)
    rows, drawn = [], []
    for place, own in grouped(picked.runs, lambda run: run.place).items():
        table = tried_in(own)
        size, corpus, text, lr, length = place
        heading = f"{size}, {names[corpus, text]}, learning rate {lr:g}, {length:g} tokens per parameter"
        lines += [f"### {heading}", "", *_table(table)]
        rows += csv_rows(table)
        if told := rivals(table):
            drawn.append((heading, told))
    return Section(
        name="ideas",
        title="Tapering without loss: what was tried",
        lines=[*lines, *left_out(picked.superseded)],
        columns=COLUMNS,
        rows=rows,
        caption=CAPTION,
        draw=partial(draw_gaps, drawn[:MOST_ROWS]) if any(some for _, some in drawn) else None,
    )


def csv_rows(table: Iterable[Tried]) -> list[list[Any]]:
    """The runs of the rows, one by one, for the CSV file."""
    return [
        [row.idea, *run_row(run, None if row.variant == BASELINE else row.gaps().get(seed))]
        for row in table
        for seed, run in sorted(row.runs.items())
    ]


def rivals(table: Iterable[Tried]) -> list[Tried]:
    """The rows of which there is a gap, or a run that diverged, to draw."""
    return [row for row in table if row.variant != BASELINE and (row.gaps() or row.lost)]


def _table(table: Sequence[Tried]) -> list[str]:
    header = [
        "idea", "variant", "seeds", "diverged", "loss", "gap (95%)", "spread", "plain", "widest", "largest", "random",
        "RMS",
    ]  # fmt: skip
    rows = []
    for row in table:
        base = row.variant == BASELINE
        gaps = [*row.gaps().values()]
        rows.append([
            row.idea or PAPERS_OWN,
            title(row.variant),
            str(len(row.runs)),
            str(len(row.lost)) if row.lost else "",
            number_cell(row.mean(lambda run: run.loss), ".4f"),
            "" if base else gap_cell(row.gap()),
            "" if base or len(gaps) < 2 else f"{statistics.stdev(gaps):.2%}{few(len(gaps))}",
            gap_cell(row.over_plain()) if row.idea else "",
            "" if base else gap_cell(row.widest()),
            "" if base else number_cell(row.ratio(lambda run: run.tail("loss_max"))),
            "" if base else number_cell(row.ratio(lambda run: run.random("largest_loss"))),
            number_cell(row.mean(lambda run: run.random("ratio"))),
        ])  # fmt: skip
    return markdown(header, rows, left=2)


def draw_gaps(places: Sequence[tuple[str, Sequence[Tried]]], path: Path) -> None:
    """The gaps of the rows of several places, a panel each, as a picture."""
    most = max(len(rows) for _, rows in places)
    with canvas(path, len(places), 1, 0.8 + 0.22 * most) as (_, panels):
        for (axis,), (heading, rows) in zip(panels, places, strict=True):
            axis.axvline(0, color=color_of(BASELINE), linewidth=1.2)
            for at, row in enumerate(rows):
                _draw_row(axis, at, row)
            names = [f"{row.idea or PAPERS_OWN}, {title(row.variant)}" for row in rows]
            axis.set_yticks(range(len(rows)), names, fontsize=7.5)
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_title(heading)
            axis.set_xlabel("gap to the baseline")


def _draw_row(axis: Axes, at: int, row: Tried) -> None:
    color, gap = color_of(row.variant), row.gap()
    if gap is not None:
        half = None if gap.high is None else gap.high - gap.mean
        axis.errorbar([gap.mean], [at], xerr=half, fmt="o", color=color, markersize=5)
    axis.plot([*row.gaps().values()], [at] * len(row.gaps()), ".", color=color, alpha=0.4, markersize=4)
    if row.lost:
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axis.annotate(f"{len(row.lost)} lost", (1.01, at), color=color, **place)
