"""`short`: short runs of any length, learning rate and corpus: does any diverge, and does any lose?"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from paper_harness.comparison import left_out
from paper_harness.figures import canvas, color_of
from paper_harness.records import BASELINE, StoredRun, corpus_names, grouped, title, without_doubles
from paper_harness.sections.ideas import PAPERS_OWN, Tried, tried_in
from paper_harness.tables import RUN_COLUMNS, Section, markdown, percent, run_row

MOST = 0.02  # gap to the baseline that no run should have


def section(runs: Sequence[StoredRun]) -> Section:
    """The table of all ways to taper, that of the runs, the rows and the figure."""
    picked = without_doubles(runs)
    sizes = grouped(picked.runs, lambda run: run.setup.size)
    drawn = {size: _by_draw(own) for size, own in sizes.items()}
    found = {size: _by_way(draws) for size, draws in drawn.items()}
    names = corpus_names(picked.runs)
    lines = [
        "Each draw has its own steps (uniform in the logarithm), learning rate (likewise), corpus and seed. The gap is "
        f"to the baseline of the same draw and model; a run loses where it is over {MOST:+.0%}.",
        "",
        *(
            line
            for size, draws in drawn.items()
            for line in (f"### {size}", "", *_summary(found[size]), *_each(draws, list(found[size]), names))
        ),
        *left_out(picked.superseded),
    ]
    dots = {f"{size}, {_name(way)}": rows for size, ways in found.items() for way, rows in ways.items()}
    rows = [
        [run.draw, row.idea, *run_row(run, None if row.variant == BASELINE else row.gaps().get(seed))]
        for draws in drawn.values()
        for tried in draws
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
        draw=partial(_draw, dots) if any(row.gaps() for rows in dots.values() for row in rows) else None,
    )


def _by_draw(runs: Sequence[StoredRun]) -> list[list[Tried]]:
    """The rows of each draw; of one whose corpus has several texts those of each text."""
    return [tried_in(own) for _, own in sorted(grouped(runs, lambda run: (run.draw, *run.place)).items())]


def _by_way(draws: list[list[Tried]]) -> dict[tuple[str, str], list[Tried]]:
    """The rows of all draws by idea and variant."""
    found: dict[tuple[str, str], list[Tried]] = {}
    for row in (row for rows in draws for row in rows if row.variant != BASELINE):
        found.setdefault(_way(row), []).append(row)
    return found


def _way(row: Tried) -> tuple[str, str]:
    return row.idea, row.variant


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


def _each(draws: list[list[Tried]], ways: list[tuple[str, str]], names: dict[tuple[str, str], str]) -> list[str]:
    rows = []
    for tried in draws:
        run = next(run for row in tried for run in row.runs.values())
        bases = [one for row in tried if _way(row) == ("", BASELINE) for one in row.runs.values()]
        loss = ", ".join(f"{one.loss:.4f}" if one.arrived else one.fate for one in bases)
        cells = ["; ".join(_cell(row) for row in tried if _way(row) == way) for way in ways]
        corpus = names[run.setup.corpus, run.setup.corpus_sha256]
        rows.append([str(run.draw), corpus, str(run.steps), f"{run.setup.lr:g}", loss, *cells])
    return markdown(["draw", "corpus", "steps", "learning rate", "baseline", *map(_name, ways)], rows, left=2)


def _cell(row: Tried) -> str:
    return "; ".join([*(percent(gap) for gap in row.gaps().values()), *(run.fate for run in row.lost)])


def _draw(dots: dict[str, list[Tried]], path: Path) -> None:
    with canvas(path, 1, 1, 0.9 + 0.3 * len(dots)) as (_, panels):
        axis = panels[0][0]
        axis.axvline(0, color=color_of(BASELINE), linewidth=1.2)
        axis.axvline(MOST, color=color_of(BASELINE), linewidth=0.8, linestyle=":")
        for at, tried in enumerate(dots.values()):
            gaps = [gap for row in tried for gap in row.gaps().values()]
            axis.plot(gaps, [at] * len(gaps), "o", color=color_of(tried[0].variant), alpha=0.5, markersize=4)
            if lost := sum(len(row.lost) for row in tried):
                axis.annotate(f"{lost} lost", (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axis.set_yticks(range(len(dots)), list(dots), fontsize=7.5)
        axis.set_ylim(len(dots) - 0.5, -0.5)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("gap to the baseline")
