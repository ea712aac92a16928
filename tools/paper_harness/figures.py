"""What the figures share: the look, a colour and a dash per variant, and names at the ends of lines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from paper_harness.records import BASELINE, PAPERS, title

WIDTH = 9.0  # inches: at 100 pixels each the page's 900, so that a point is read at its size
DPI = 150
FULL_SEEDS = 0.3  # opacity of single seeds behind a mean
LOOK = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
# Okabe and Ito's colours, told apart by every kind of eye; the dashes say it again where lines lie close.
STYLES: dict[str, tuple[str, Any]] = {
    BASELINE: ("#000000", "-"),
    "internal": ("#56B4E9", (0, (4, 1.5))),
    "internal_aux": ("#0072B2", "-"),
    "all": ("#E69F00", (0, (4, 1.5))),
    "all_aux": ("#D55E00", "-"),
    "fakeln": ("#009E73", (0, (5, 1, 1, 1))),
    "dyt": ("#CC79A7", (0, (1.2, 1))),
    "derf": ("#8C6BB1", (0, (1.2, 1))),
}
FAR = 0.15  # a gap beyond it makes a panel logarithmic
STRAIGHT = 0.05  # but for gaps up to this
GAP_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
OTHERS = ("#7F7F7F", (0, (3, 1, 1, 1, 1, 1)))
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")


def style(variant: str) -> dict[str, Any]:
    """The colour and the dash of a variant, the same in every figure."""
    color, dash = STYLES.get(variant, OTHERS)
    return {"color": color, "linestyle": dash}


def color_of(variant: str) -> str:
    """The colour alone."""
    return STYLES.get(variant, OTHERS)[0]


@contextmanager
def canvas(path: Path, rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of the page's width, written to ``path`` at the end.

    Args:
        path: a PNG file.
        rows: of panels.
        columns: of panels.
        height: of a row, in inches.
        options: of ``pyplot.subplots``.

    Yields:
        The figure, and the panels as an array of (rows, columns).
    """
    with pyplot.rc_context(LOOK):
        figure, panels = pyplot.subplots(
            rows, columns, figsize=(WIDTH, height * rows), squeeze=False, layout="constrained", **options
        )
        try:
            yield figure, panels
            figure.savefig(path, dpi=DPI, metadata={"Software": None})  # no version: equal figures are equal files
        finally:
            pyplot.close(figure)


def name_ends(axis: Axes, ends: Sequence[tuple[float, float, str]], gap: float = 0.068) -> None:
    """Write the variants' names to the right of the lines' ends, apart from each other.

    Args:
        axis: whose limits are settled.
        ends: (x, y, variant) of each line's last point.
        gap: least distance of two names, as a share of the axis's height.
    """
    low, high = axis.get_ylim()
    to_share = axis.transData + axis.transAxes.inverted()
    placed = sorted((min(max(to_share.transform((x, y))[1], 0.0), 1.0), x, y, variant) for x, y, variant in ends)
    heights = _apart([share for share, *_ in placed], gap)
    for height, (_, x, y, variant) in zip(heights, placed, strict=True):
        axis.annotate(
            title(variant),
            xy=(x, min(max(y, low), high)),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=color_of(variant),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color_of(variant), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2},
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The nearest places, in the same order, that are ``gap`` apart: neighbours that touch share their mean."""
    blocks: list[list[float]] = []  # of wanted places; a block's names stand around its mean
    for place in wanted:
        blocks.append([place])
        while len(blocks) > 1 and _bottom(blocks[-1], gap) - _top(blocks[-2], gap) < gap:
            last = blocks.pop()
            blocks[-1] += last
    return [_bottom(block, gap) + gap * i for block in blocks for i in range(len(block))]


def _bottom(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[float], gap: float) -> float:
    return _bottom(block, gap) + gap * (len(block) - 1)


def legend_of(figure: Figure, axis: Axes, names: Mapping[str, str]) -> None:
    """One row of names above all panels.

    Args:
        figure: to put it on.
        axis: any of its panels.
        names: by variant.
    """
    handles = [axis.plot([], [], label=name, **style(variant))[0] for variant, name in names.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), handlelength=2.6, columnspacing=1.4)


def gate_marks(axis: Axes, steps: int) -> None:
    """Dotted lines where the paper's gate begins to close and where it is closed."""
    for share in (PAPERS.warmup, PAPERS.end):
        axis.axvline(share * steps, color="#888888", linewidth=0.8, linestyle=":", zorder=0.5)


def draw_line(axis: Axes, points: Sequence[Sequence[float]], variant: str, **look: Any) -> None:
    """A variant's line through (x, y) points; a single point is a dot.

    Args:
        axis: of the panel.
        points: at least one.
        variant: whose colour and dash it has.
        look: options of ``plot`` over these.
    """
    dot = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
    axis.plot(*zip(*points, strict=True), **style(variant) | dot | look)


def draw_seed(axis: Axes, points: Sequence[Sequence[float]], variant: str) -> None:
    """A single seed's line, faint behind the mean."""
    draw_line(axis, points, variant, linewidth=0.7, alpha=FULL_SEEDS)


def mark_lost(axis: Axes, point: Sequence[float], variant: str) -> None:
    """A cross where a run diverged: the last of its points."""
    axis.plot(*point, "x", color=color_of(variant), markersize=8, markeredgewidth=2, zorder=4)


def percent_axis(axis: Axis) -> None:
    """Label an axis of shares as percents, with no more digits than the ticks need."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))


def gap_scale(axes: Axes, low: float, high: float) -> None:
    """Limits and labels of a y axis of gaps; logarithmic beyond 5% where some are far out.

    Args:
        axes: of the panel.
        low: the least gap to show.
        high: the largest.
    """
    if max(-low, high) > FAR:
        axes.set_yscale("symlog", linthresh=STRAIGHT, linscale=1.5)
        axes.yaxis.set_major_locator(FixedLocator([0, *(sign * gap for gap in GAP_TICKS for sign in (-1, 1))]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(1.3 * low - FAR / 20, 1.3 * high + FAR / 20)
    else:
        margin = 0.12 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    percent_axis(axes.yaxis)


def plain_log_axis(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis at its own values, in plain numbers."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with a few plain numbers at it, however much or little of it is seen."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN)
