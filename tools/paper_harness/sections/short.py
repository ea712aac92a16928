"""`short`: short runs of any length, learning rate and corpus: does any diverge, and does any lose?"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from paper_harness.comparison import left_out
from paper_harness.figures import canvas, color_of
from paper_harness.records import BASELINE, StoredRun, grouped, title, without_doubles
from paper_harness.sections.ideas import PAPERS_OWN, Tried, tried_in
from paper_harness.tables import RUN_COLUMNS, Section, markdown, percent, run_row

MOST = 0.02  # gap to the baseline that no run should have


def section(runs: Sequence[StoredRun]) -> Section:
    """The table of all ways to taper, that of the runs, the rows and the figure."""
    picked = without_doubles(runs)
    draws = {draw: tried_in(own) for draw, own in sorted(grouped(picked.runs, lambda run: run.draw).items())}
    ways = {(row.idea, row.variant): None for rows in draws.values() for row in rows if row.variant != BASELINE}
    found = {way: [row for rows in draws.values() for row in rows if (row.idea, row.variant) == way] for way in ways}
    lines = [
        "Each draw has its own steps (uniform in the logarithm), learning rate (likewise), corpus and seed. The gap is "
        f"to the baseline of the same draw and model; a run loses where it is over {MOST:+.0%}.",
        "",
        *_summary(found),
        *_each(draws, list(ways)),
        *left_out(picked.superseded),
    ]
    rows = [
        [draw, row.idea, *run_row(run, None if row.variant == BASELINE else row.gaps().get(seed))]
        for draw, tried in draws.items()
        for row in tried
        for seed, run in sorted(row.runs.items())
    ]
    return Section(
        name="short",
        title="Short runs, drawn at random",
        lines=lines,
        columns=("draw", "idea", *RUN_COLUMNS),
        rows=rows,
        caption="Gap to the baseline of the same draw and model, a dot per draw; at the right how many diverged.",
        draw=partial(_draw, found) if any(row.gaps() for rows in found.values() for row in rows) else None,
    )


def _name(way: tuple[str, str]) -> str:
    return f"{way[0] or PAPERS_OWN}, {title(way[1])}"


def _summary(found: dict[tuple[str, str], list[Tried]]) -> list[str]:
    rows = []
    for way, tried in found.items():
        gaps = [gap for row in tried for gap in row.gaps().values()]
        ratios = [ratio for row in tried for run in row.runs.values() if (ratio := run.random("ratio")) is not None]
        rows.append([
            way[0] or PAPERS_OWN,
            title(way[1]),
            str(sum(len(row.runs) for row in tried)),
            str(sum(len(row.lost) for row in tried)),
            str(sum(gap > MOST for gap in gaps)),
            percent(statistics.median(gaps)) if gaps else "",
            percent(max(gaps)) if gaps else "",
            f"{max(ratios):.2f}" if ratios else "",
        ])  # fmt: skip
    header = ["idea", "variant", "runs", "diverged", "lose", "median gap", "largest gap", "largest RMS"]
    return markdown(header, rows, left=2)


def _each(draws: dict[int | None, list[Tried]], ways: list[tuple[str, str]]) -> list[str]:
    rows = []
    for draw, tried in draws.items():
        run = next(run for row in tried for run in row.runs.values())
        by_way = {(row.idea, row.variant): row for row in tried}
        base = by_way.get(("", BASELINE))
        loss = "" if base is None else ", ".join(f"{one.loss:.4f}" for one in base.runs.values())
        cells = [_cell(by_way[way]) if way in by_way else "" for way in ways]
        rows.append([str(draw), run.setup.corpus, str(run.steps), f"{run.setup.lr:g}", loss, *cells])
    return markdown(["draw", "corpus", "steps", "learning rate", "baseline", *map(_name, ways)], rows, left=2)


def _cell(row: Tried) -> str:
    return "; ".join([*(percent(gap) for gap in row.gaps().values()), *(run.fate for run in row.lost)])


def _draw(found: dict[tuple[str, str], list[Tried]], path: Path) -> None:
    with canvas(path, 1, 1, 0.9 + 0.3 * len(found)) as (_, panels):
        axis = panels[0][0]
        axis.axvline(0, color=color_of(BASELINE), linewidth=1.2)
        axis.axvline(MOST, color=color_of(BASELINE), linewidth=0.8, linestyle=":")
        for at, (way, tried) in enumerate(found.items()):
            gaps = [gap for row in tried for gap in row.gaps().values()]
            axis.plot(gaps, [at] * len(gaps), "o", color=color_of(way[1]), alpha=0.5, markersize=4)
            if lost := sum(len(row.lost) for row in tried):
                axis.annotate(f"{lost} lost", (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set_yticks(range(len(found)), [_name(way) for way in found], fontsize=7.5)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("gap to the baseline")
