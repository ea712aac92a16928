"""`schedule`: how the taper's dials change the loss, and where runs diverge."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

from paper_harness.comparison import left_out
from paper_harness.figures import canvas, percent_axis
from paper_harness.records import BASELINE, ENOUGH_SEEDS, PAPERS, Schedule, StoredRun, grouped, title, without_doubles
from paper_harness.tables import Claim, Section, markdown, percent, run_row

SHADES = matplotlib.colormaps["PuOr_r"]  # below the baseline purple, above it orange: told apart by every kind of eye
LOST = "#3a3a3a"
DARKEST = 1.35  # times the largest gap is where the shades end: none is so dark that it looks like a lost run
MOST_MAPS = 6
DIALS = {"weight": "lambda", "ema_rate": "EMA rate"}


@dataclass
class Cell:
    """The runs of one setting of the dials.

    Args:
        runs: by seed.
        baselines: of the same setup and length, by seed.
    """

    runs: list[StoredRun]
    baselines: dict[int, StoredRun]

    def gaps(self) -> list[float]:
        """To the baselines of the same seeds."""
        pairs = [(run, self.baselines.get(run.seed)) for run in self.runs if run.arrived]
        return [run.loss / base.loss - 1 for run, base in pairs if base is not None and base.arrived]

    def lost(self) -> list[StoredRun]:
        """The runs that diverged."""
        return [run for run in self.runs if not run.arrived]

    def text(self) -> str:
        """For a table."""
        gaps, lost = self.gaps(), self.lost()
        if not gaps:
            arrived = [run.loss for run in self.runs if run.arrived]
            if arrived:
                return f"loss {statistics.fmean(arrived):.4f}, no baseline that arrived"
            return "; ".join(run.fate for run in lost)
        told = f" ({len(lost)} of {len(self.runs)} diverged)" if lost else ""
        return percent(statistics.fmean(gaps)) + told

    def short(self) -> str:
        """For a map, in two lines at most."""
        gaps, lost = self.gaps(), self.lost()
        if gaps:
            return percent(statistics.fmean(gaps)) + (f"\n{len(lost)}/{len(self.runs)} diverged" if lost else "")
        if not lost:
            return "no baseline"
        told = lost[0].result.get("diverged") or {}
        gate = told.get("gate")
        place = f"step {told['step']}" if "step" in told else "at the end"
        return f"{place}\n" + ("diverged" if gate is None else f"gate {gate:.2f}")


@dataclass
class Tried:
    """One variant at one learning rate: what was tried of the dials.

    Args:
        variant: of the runs.
        run: one of them, for the setup and the length.
        cells: by schedule; lambda is None of a variant without the scale loss.
    """

    variant: str
    run: StoredRun
    cells: dict[Schedule, Cell]

    def papers(self) -> Schedule:
        """The paper's dials, for this variant."""
        return PAPERS if self.variant.endswith("_aux") else PAPERS._replace(weight=None)

    def on_map(self) -> dict[tuple[float, float], Cell]:
        """Those that differ from the paper's in warm-up and end alone."""
        own = self.papers()
        return {
            (at.warmup, at.end): cell
            for at, cell in self.cells.items()
            if at == own._replace(warmup=at.warmup, end=at.end)
        }

    def singles(self) -> list[tuple[str, Cell]]:
        """The others, by what they differ in; and the paper's own, to hold them against."""
        own, found = self.papers(), []
        for at, cell in sorted(self.cells.items(), key=lambda one: _order(one[0], own)):
            changed = [
                f"{DIALS.get(name, name)} {value if isinstance(value, str) else f'{value:g}'}"
                for name, value, usual in zip(Schedule._fields, at, own, strict=True)
                if value != usual and value is not None
            ]
            if at != own._replace(warmup=at.warmup, end=at.end):
                found.append((", ".join(changed), cell))
        papers = [("the paper's", self.cells[own])] if own in self.cells and found else []
        return papers + found

    def name(self) -> str:
        """For a heading."""
        return f"{title(self.variant)}, {self.run.setup.title()}, {self.run.length:g} tokens per parameter"


def section(runs: Sequence[StoredRun]) -> Section:
    """The maps, the rows and the figure of the runs."""
    picked = without_doubles(runs)
    tried = _tried(picked.runs)
    seeds = max((len(cell.runs) for one in tried for cell in one.cells.values()), default=0)
    lines = [
        "The gap to the baseline of the same seed, length and learning rate, by where the gate begins to close (rows) "
        f"and is closed (columns), as shares of the run; the paper's are {PAPERS.warmup:g} and {PAPERS.end:g}. Then "
        "what else was tried, one dial at a time. A run that diverged is a result.",
        "",
    ]
    if 0 < seeds < ENOUGH_SEEDS:
        lines += [f"Every cell rests on {seeds} {'seed' if seeds == 1 else 'seeds'}: fewer than three.", ""]
    for one in tried:
        lines += [f"### {one.name()}", "", *_map_table(one), *_singles_table(one)]
    rows = []
    for run in picked.runs:
        base = [other for other in picked.runs if other.variant == BASELINE and _place(other) == _place(run)]
        gaps = Cell([run], {other.seed: other for other in base}).gaps()
        rows.append(run_row(run, gaps[0] if gaps and run.variant != BASELINE else None))
    return Section(
        name="schedule",
        title="The taper's dials, and where runs diverge",
        lines=[*lines, *left_out(picked.superseded)],
        rows=rows,
        caption="Gap to the baseline of the same learning rate and seed; dark cells are runs that diverged, with the "
        "step and the gate. The framed cell is the paper's.",
        draw=partial(_draw, tried) if tried else None,
        claims=_claims(tried),
    )


def _order(at: Schedule, papers: Schedule) -> list[tuple[int, Any]]:
    """What a schedule changes, by dial and value."""
    return [(dial, value) for dial, (value, usual) in enumerate(zip(at, papers, strict=True)) if value != usual]


def _place(run: StoredRun) -> tuple:
    return run.setup, run.length


def _tried(runs: Sequence[StoredRun]) -> list[Tried]:
    found = []
    for (setup, length, variant), own in grouped(runs, lambda run: (run.setup, run.length, run.variant)).items():
        if variant == BASELINE or own[0].schedule is None:
            continue
        base = {run.seed: run for run in runs if run.variant == BASELINE and _place(run) == (setup, length)}
        cells = {at: Cell(alike, base) for at, alike in _by_schedule(own).items()}
        found.append(Tried(variant, own[0], cells))
    return sorted(found, key=lambda one: (one.run.setup.size, one.run.length, one.variant, one.run.setup.lr))


def _by_schedule(runs: Sequence[StoredRun]) -> dict[Schedule, list[StoredRun]]:
    cells: dict[Schedule, list[StoredRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.schedule is not None:
            cells.setdefault(run.schedule, []).append(run)
    return cells


def _axes(one: Tried) -> tuple[list[float], list[float]]:
    on_map = one.on_map()
    return sorted({warmup for warmup, _ in on_map}), sorted({end for _, end in on_map})


def _map_table(one: Tried) -> list[str]:
    warmups, ends = _axes(one)
    on_map = one.on_map()
    if not on_map:
        return []
    rows = []
    for warmup in warmups:
        cells = [on_map.get((warmup, end)) for end in ends]
        rows.append([f"warm-up {warmup:.0%}", *("" if cell is None else cell.text() for cell in cells)])
    return markdown(["", *(f"end {end:.0%}" for end in ends)], rows)


def _singles_table(one: Tried) -> list[str]:
    rows = [[name, cell.text()] for name, cell in one.singles()]
    return markdown(["changed", "gap to the baseline"], rows) if rows else []


def _claims(tried: Sequence[Tried]) -> list[Claim]:
    told = []
    for one in tried:
        lost = sum(len(cell.lost()) for cell in one.cells.values())
        done = sum(len(cell.runs) for cell in one.cells.values())
        told.append(f"{title(one.variant)} at {one.run.setup.lr:g}: {lost} of {done} diverged")
    return [Claim("How the schedule's dials matter", "not mapped", "; ".join(told))] if told else []


def _draw(tried: Sequence[Tried], path: Path) -> None:
    """A map per variant and learning rate, and a row of dots for the single dials."""
    maps = [one for one in tried if one.on_map()][:MOST_MAPS]
    singles = [one for one in tried if one.singles()][:MOST_MAPS]
    columns = 2
    map_rows, single_rows = -(-len(maps) // columns), -(-len(singles) // columns)
    most = max([abs(gap) for one in maps for cell in one.on_map().values() for gap in cell.gaps()] or [0.0])
    reach = DARKEST * min(max(most, 0.005), 0.1)
    shade = TwoSlopeNorm(0.0, -reach, reach)
    with canvas(path, map_rows + single_rows, columns, 3.1) as (figure, panels):
        for axis in panels.flat:
            axis.set_visible(False)
        for axis, one in zip(panels[:map_rows].flat, maps, strict=False):
            axis.set_visible(True)
            _draw_map(axis, one, shade)
        for axis, one in zip(panels[map_rows:].flat, singles, strict=False):
            axis.set_visible(True)
            _draw_singles(axis, one)
        if maps:
            colors = ScalarMappable(shade, SHADES)
            bar = figure.colorbar(colors, ax=panels[:map_rows], shrink=0.8, aspect=30, pad=0.02)
            percent_axis(bar.ax.yaxis)
            bar.set_label("gap to the baseline")


def _head(one: Tried) -> str:
    return f"{title(one.variant)}, lr {one.run.setup.lr:g}"


def _draw_map(axis: Axes, one: Tried, shade: TwoSlopeNorm) -> None:
    warmups, ends = _axes(one)
    axis.grid(False)
    axis.set_xlim(-0.5, len(ends) - 0.5)
    axis.set_ylim(-0.5, len(warmups) - 0.5)
    for (warmup, end), cell in one.on_map().items():
        x, y = ends.index(end), warmups.index(warmup)
        gaps = cell.gaps()
        color = SHADES(shade(statistics.fmean(gaps))) if gaps else LOST if cell.lost() else "#dddddd"
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
        ink = "white" if np.dot(matplotlib.colors.to_rgb(color), (0.299, 0.587, 0.114)) < 0.5 else "black"
        axis.text(x, y, cell.short(), ha="center", va="center", color=ink, fontsize=8)
        if (warmup, end) == PAPERS[:2]:
            axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=1.8))
    axis.set_xticks(range(len(ends)), [f"{end:.0%}" for end in ends])
    axis.set_yticks(range(len(warmups)), [f"{warmup:.0%}" for warmup in warmups])
    axis.set_xlabel("gate closed at")
    axis.set_ylabel("gate begins to close at")
    axis.set_title(_head(one))


def _draw_singles(axis: Axes, one: Tried) -> None:
    singles = one.singles()[::-1]
    for place, (_, cell) in enumerate(singles):
        gaps = cell.gaps()
        axis.plot(gaps, [place] * len(gaps), linestyle="none", marker="o", markersize=6, color="#0072B2")
        if gaps:
            axis.annotate(
                percent(statistics.fmean(gaps)),
                (max(gaps), place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        elif cell.lost():
            axis.text(0.02, place, cell.lost()[0].fate, va="center", fontsize=8, transform=axis.get_yaxis_transform())
    axis.axvline(0, color="black", linewidth=1)
    axis.margins(x=0.25)
    axis.set_ylim(-0.6, len(singles) - 0.4)
    axis.set_yticks(range(len(singles)), [name for name, _ in singles])
    percent_axis(axis.xaxis)
    axis.grid(axis="y", visible=False)
    axis.set_title(_head(one))
    axis.set_xlabel("gap to the baseline")
