"""`length`: the gap to the baseline against tokens per parameter, and where it changes its sign."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from paper_harness.comparison import Comparison, left_out
from paper_harness.figures import canvas, color_of, draw_line, gap_scale, name_ends, plain_log_axis
from paper_harness.records import BASELINE, Setup, StoredRun, grouped, title, variants_of, without_doubles
from paper_harness.statistics import Estimate, crossings, estimate, matching_crossing
from paper_harness.tables import Claim, Section, few, gap_cell, markdown, run_row

MOST_ROWS = 3  # of panels: the setups with the most runs


@dataclass
class Line:
    """A variant's gaps over the lengths.

    Args:
        variant: of them.
        gaps: mean and interval by tokens per parameter, where there is a pair.
        seeds: by seed, (tokens per parameter, gap) pairs.
        lost: by tokens per parameter, how many runs of it or of their baselines did not arrive, and of how many.
    """

    variant: str
    gaps: dict[float, Estimate] = field(default_factory=dict)
    seeds: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    lost: dict[float, tuple[int, int]] = field(default_factory=dict)

    def points(self) -> list[tuple[float, float]]:
        """The mean gaps, by length."""
        return [(length, gap.mean) for length, gap in sorted(self.gaps.items())]

    def crossing(self) -> str:
        """Where the mean gap changes its sign, with the range over the seeds, in words."""
        points = self.points()
        if len(points) < 2:
            return "fewer than two lengths"
        diverged = sum(count for count, _ in self.lost.values())
        apart = f"; {diverged} diverged left out" if diverged else ""
        found = crossings(points)
        if not found:
            side = next((", above it" if gap > 0 else ", below it" for _, gap in points if gap), "")
            return f"no crossing between {points[0][0]:g} and {points[-1][0]:g}{side}{apart}"
        told = []
        for one in found:
            own = [matching_crossing(curve, one) for curve in self.seeds.values()]
            places = [place for place in own if place is not None]
            way = "rises above" if one.rising else "falls below"
            span = f"{min(places):.2g} to {max(places):.2g}; " if len(places) > 1 else ""
            told.append(f"{way} at {one.x:.2g} ({span}{len(places)} of {len(own)} seeds cross)")
        return ", ".join(told) + apart + few(len(self.seeds))


def section(runs: Sequence[StoredRun]) -> Section:
    """The table, the rows and the figure of the runs."""
    picked = without_doubles(runs)
    lines = [
        "The gap to the baseline's validation loss of the same seed and length, against the tokens that a model was "
        "trained on per parameter: the mean over the pairs, with Student's 95% interval. Each length is a run of its "
        "own, with its whole schedule. The crossing is where the mean changes its sign, by straight lines over the "
        "logarithm of the length; its range is that of the single seeds' own crossings.",
        "",
    ]
    rows, drawn = [], []
    for setup, alike in grouped(picked.runs, lambda run: run.setup).items():
        comparisons = [Comparison(own) for own in grouped(alike, lambda run: run.length).values()]
        comparisons.sort(key=lambda comparison: comparison.length)
        for comparison in comparisons:
            rows += [run_row(run, comparison.gaps(run.variant).get(run.seed)) for run in comparison.runs]
        curves = [_line(comparisons, variant) for variant in variants_of(alike) if variant != BASELINE]
        if not curves:
            lines += [f"### {setup.title()}", "", "Only baselines so far.", ""]
            continue
        lines += [f"### {setup.title()}", "", *_table(comparisons, curves)]
        for comparison in comparisons:
            lines += comparison.fates(f" at {comparison.length:g}")
        if any(line.gaps for line in curves):
            drawn.append((setup, curves))
    return Section(
        name="length",
        title="The gap over the length of training",
        lines=[*lines, *left_out(picked.superseded)],
        rows=rows,
        caption="Mean gap with its 95% interval where there are several seeds, single seeds as dots; a ring is where "
        "the mean crosses the baseline, the bar through it the range over the seeds. Crosses at the bottom count the "
        "runs that diverged.",
        draw=partial(_draw, drawn[:MOST_ROWS]) if drawn else None,
        claims=[_claim(drawn[:MOST_ROWS])] if drawn else [],
    )


def _line(comparisons: Sequence[Comparison], variant: str) -> Line:
    line = Line(variant)
    for comparison in comparisons:
        gaps = comparison.gaps(variant)
        own = {run.seed for run in comparison.of(variant)}
        lost = {run.seed for name in (variant, BASELINE) for run in comparison.lost(name)}
        if own & lost:
            line.lost[comparison.length] = len(own & lost), len(own)
        if (mean := estimate(gaps.values())) is not None:
            line.gaps[comparison.length] = mean
        for seed, gap in gaps.items():
            line.seeds.setdefault(seed, []).append((comparison.length, gap))
    return line


def _table(comparisons: Sequence[Comparison], curves: Sequence[Line]) -> list[str]:
    header = ["variant", *(f"{comparison.length:g}" for comparison in comparisons), "crossing"]
    base = [_base_cell(comparison) for comparison in comparisons]
    rows = [["baseline's loss", *base, ""]] if any(base) else []
    for line in curves:
        cells = []
        for comparison in comparisons:
            lost, tried = len(comparison.lost(line.variant)), len(comparison.of(line.variant))
            told = f"({lost} of {tried} diverged)" if lost else ""
            cells.append(f"{gap_cell(line.gaps.get(comparison.length))} {told}".strip())
        rows.append([title(line.variant), *cells, line.crossing()])
    return markdown(header, rows)


def _base_cell(comparison: Comparison) -> str:
    mean = comparison.mean(BASELINE, lambda run: run.loss)
    lost, tried = len(comparison.lost(BASELINE)), len(comparison.of(BASELINE))
    told = f"({lost} of {tried} diverged)" if lost else ""
    return f"{'' if mean is None else f'{mean.mean:.4f}{few(mean.n)}'} {told}".strip()


def _claim(setups: Sequence[tuple[Setup, Sequence[Line]]]) -> Claim:
    told = []
    for setup, curves in setups:
        crossed = "; ".join(f"{title(line.variant)} {line.crossing()}" for line in curves if line.gaps)
        told.append(f"{setup.title()}: {crossed}")
    return Claim("The gap against tokens per parameter changes its sign", "not reported", "<br>".join(told))


def _draw(setups: Sequence[tuple[Setup, Sequence[Line]]], path: Path) -> None:
    with canvas(path, len(setups), 1, 4.2) as (_, panels):
        for (axis,), (setup, curves) in zip(panels, setups, strict=True):
            lengths = sorted({length for line in curves for length in (*line.gaps, *line.lost)})
            axis.set_xscale("log")
            axis.axhline(0, color=color_of(BASELINE), linewidth=1.2)
            ends = []
            for line in curves:
                points = line.points()
                if not points:
                    continue
                draw_line(axis, points, line.variant, marker="o", markersize=4.5)
                ends.append((*points[-1], line.variant))
                _draw_spread(axis, line)
            gap_scale(axis, *_limits(curves))
            _draw_lost(axis, curves)
            plain_log_axis(axis.xaxis, lengths)
            axis.set_title(f"gap to the baseline's validation loss: {setup.title()}")
            axis.set_xlabel("training tokens per parameter")
            name_ends(axis, [*ends, (axis.get_xlim()[1], 0.0, BASELINE)])


def _limits(curves: Sequence[Line]) -> tuple[float, float]:
    """All the single seeds, and as much of the intervals as leaves the lines readable."""
    seeds = [gap for line in curves for curve in line.seeds.values() for _, gap in curve] + [0.0]
    room = max(0.5 * (max(seeds) - min(seeds)), 0.002)
    gaps = [gap for line in curves for gap in line.gaps.values()]
    bounds = [edge for gap in gaps for edge in (gap.low, gap.high) if edge is not None]
    low, high = min(seeds + bounds), max(seeds + bounds)
    return max(low, min(seeds) - room), min(high, max(seeds) + room)


def _draw_lost(axis: Axes, curves: Sequence[Line]) -> None:
    """Crosses along the bottom at the lengths where runs diverged, with room made for them."""
    rows = [line for line in curves if line.lost]
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.07 * len(rows) * (high - low), high)
    for place, line in enumerate(rows):
        for length, (count, tried) in line.lost.items():
            axis.text(
                length, 0.02 + 0.06 * place, f"\N{MULTIPLICATION X} {count} of {tried}", color=color_of(line.variant),
                fontsize=8.5, ha="center", va="bottom", transform=axis.get_xaxis_transform(), zorder=5,
            )  # fmt: skip


def _draw_spread(axis: Axes, line: Line) -> None:
    color = color_of(line.variant)
    banded = [(length, gap.low, gap.high) for length, gap in sorted(line.gaps.items()) if gap.low is not None]
    if banded:
        lengths, low, high = zip(*banded, strict=True)
        axis.fill_between(lengths, low, high, color=color, alpha=0.13, linewidth=0)
        axis.plot(lengths, low, color=color, linewidth=0.6, alpha=0.5)
        axis.plot(lengths, high, color=color, linewidth=0.6, alpha=0.5)
    for curve in line.seeds.values():
        axis.plot(*zip(*curve, strict=True), linestyle="none", marker=".", markersize=4, color=color, alpha=0.6)
    for one in crossings(line.points()):
        places = [x for curve in line.seeds.values() if (x := matching_crossing(curve, one)) is not None]
        if len(places) > 1:
            axis.plot([min(places), max(places)], [0, 0], color=color, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axis.plot(one.x, 0, marker="o", markersize=9, markerfacecolor="white", markeredgecolor=color, markeredgewidth=2)
        span = f" ({min(places):.2g} to {max(places):.2g})" if len(places) > 1 else ""
        axis.annotate(
            f"{one.x:.2g}{span}", (one.x, 0), xytext=(0, -14 if one.rising else 14), textcoords="offset points",
            ha="center", va="center", color=color, fontsize=8.5,
            bbox={"facecolor": "white", "alpha": 0.75, "pad": 1, "linewidth": 0},
        )  # fmt: skip
