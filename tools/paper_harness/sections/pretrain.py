"""`pretrain`: the losses of all variants, their gaps to the baseline, their tails, and the loss curves."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from paper_harness.comparison import Comparison, compare, finite
from paper_harness.experiments import PEERS
from paper_harness.figures import canvas, color_of, draw_line, draw_seed, gap_scale, gate_marks, mark_lost, name_ends
from paper_harness.records import BASELINE, TAPERED, StoredRun, title
from paper_harness.statistics import estimate, mean_curve
from paper_harness.tables import Claim, Section, few, gap_cell, markdown, number_cell, run_row

MOST_ROWS = 3  # of panels: the comparisons with the most runs
MOST_CLAIMED = 5  # of them in the page's first table


def section(runs: Sequence[StoredRun]) -> Section:
    """The table, the rows and the figure of the runs."""
    comparisons, left_out = compare(runs)
    lines = [
        "Validation loss at the end in nats per token, and the gap to the baseline of the same seed: the mean of the "
        "pairs, with Student's 95% interval. `largest` and `99.9%` are of single tokens' losses on the held-out text, "
        "with the mean ratio to the baseline's; `random tokens` is the largest over the median residual before the "
        "head, and the largest token loss, on random tokens. Means are of the runs that arrived.",
        "",
    ]
    rows = []
    for comparison in comparisons:
        lines += [f"### {comparison.heading()}", "", *_table(comparison), *comparison.fates()]
        for run in comparison.runs:
            rows.append(run_row(run, comparison.gaps(run.variant).get(run.seed)))
    drawn = [one for one in comparisons if any(len(run.curve("val")) for run in one.runs)][:MOST_ROWS]
    return Section(
        name="pretrain",
        title="Pre-training (the paper's figure 2)",
        lines=[*lines, *left_out],
        rows=rows,
        caption="Validation loss, and its gap to the baseline of the same seed: means over the seeds that arrived, "
        "single seeds behind them; a cross is where a run diverged. Between the dotted lines the gate closes.",
        draw=partial(_draw, drawn) if drawn else None,
        claims=_claims(comparisons),
    )


def _table(comparison: Comparison) -> list[str]:
    header = [
        "variant", *(f"seed {seed}" for seed in comparison.seeds), "mean", "gap to the baseline (95%)", "largest",
        "over baseline", "99.9%", "over baseline", "random tokens: RMS", "largest loss",
    ]  # fmt: skip
    rows = []
    for variant in comparison.variants:
        runs = comparison.of(variant)
        single = [comparison.run(variant, seed) for seed in comparison.seeds]
        mean = comparison.mean(variant, lambda run: run.loss)
        lost = len(comparison.lost(variant))
        told = f"({lost} of {len(runs)} diverged)" if lost else ""
        cells = ["" if run is None else f"{run.loss:.4f}" if run.arrived else run.fate for run in single]
        cells.append(f"{number_cell(mean, '.4f')} {told}".strip())
        base = variant == BASELINE
        cells.append("" if base else gap_cell(estimate(comparison.gaps(variant).values())))
        for name in ("loss_max", "loss_p999"):
            cells.append(number_cell(comparison.mean(variant, lambda run, name=name: run.tail(name))))
            ratio = None if base else comparison.ratios(variant, lambda run, name=name: run.tail(name))
            cells.append(number_cell(ratio))
        cells.append(number_cell(comparison.mean(variant, lambda run: run.random("ratio"))))
        cells.append(number_cell(comparison.mean(variant, lambda run: run.random("largest_loss"))))
        rows.append([title(variant), *cells])
    return markdown(header, rows)


def _claims(comparisons: Sequence[Comparison]) -> list[Claim]:
    """What the largest comparisons say to the paper's figures."""
    if not comparisons:
        return []

    def told(tell: Callable[[Comparison, str], str], variants: Sequence[str]) -> str:
        lines = []
        for comparison in comparisons[:MOST_CLAIMED]:
            parts = [f"{title(variant)} {text}" for variant in variants if (text := tell(comparison, variant))]
            setup = comparison.setup
            where = f"{setup.size}, {setup.corpus}, {comparison.length:g} tokens per parameter"
            lines += [f"{where}: {'; '.join(parts)}"] if parts else []
        return "<br>".join(lines)

    return [
        Claim(
            "Tapered models against the baseline's validation loss",
            "+0.7% to +1.8% (TinyStories, 1M to 30M parameters, 6 seeds)",
            told(_gap, TAPERED),
        ),
        Claim("Internal-Taper (+aux), the same", "+0.7% to +1.5%", told(_gap, ("internal", "internal_aux"))),
        Claim(
            "All-Taper (+aux) varies more between seeds: standard deviation of the gap",
            "more variance; one 9M seed an outlier",
            told(_spread, ("internal_aux", "all_aux")),
        ),
        Claim("Peers in the same harness", "none from scratch", told(_gap, PEERS)),
    ]


def _gap(comparison: Comparison, variant: str) -> str:
    """A variant's gap with its interval, and how many of its runs diverged."""
    gap = estimate(comparison.gaps(variant).values())
    lost, tried = len(comparison.lost(variant)), len(comparison.of(variant))
    if gap is None and not lost:
        return ""
    return (gap_cell(gap) or "no pair") + (f", {lost} of {tried} diverged" if lost else "")


def _spread(comparison: Comparison, variant: str) -> str:
    """The standard deviation of a variant's gap over the seeds."""
    gaps = [*comparison.gaps(variant).values()]
    return f"{statistics.stdev(gaps):.2%}{few(len(gaps))}" if len(gaps) > 1 else ""


def _draw(comparisons: Sequence[Comparison], path: Path) -> None:
    with canvas(path, len(comparisons), 2, 3.7) as (_, panels):
        for (losses, gaps), comparison in zip(panels, comparisons, strict=True):
            _draw_losses(losses, comparison)
            _draw_gaps(gaps, comparison)


def _finite_curve(run: StoredRun) -> list[tuple[float, float]]:
    return [(step, loss) for step, loss in run.curve("val") if finite(loss)]


def _draw_losses(axis: Axes, comparison: Comparison) -> None:
    for variant in reversed(comparison.variants):  # the baseline on top
        runs = comparison.of(variant)
        for run in runs:
            curve = _finite_curve(run)
            if curve:
                draw_seed(axis, curve, variant)
            if curve and not run.arrived:
                mark_lost(axis, curve[-1], variant)
        mean = mean_curve([_finite_curve(run) for run in runs if run.arrived])
        if mean:
            draw_line(axis, mean, variant)
    seen = [loss for line in axis.lines for loss in line.get_ydata()]
    first = [loss for run in comparison.runs if run.variant == BASELINE for _, loss in _finite_curve(run)]
    if seen and first:  # a peak would flatten all else; what is above the axis is in the other panel
        axis.set_ylim(0.97 * min(seen), min(1.03 * max(seen), 1.3 * max(first)))
    axis.set_title(f"loss: {comparison.setup.size}, {comparison.length:g} tokens per parameter")
    axis.set_xlabel("optimizer step")
    gate_marks(axis, comparison.runs[0].steps)


def _gap_curves(comparison: Comparison, variant: str) -> list[list[tuple[float, float]]]:
    curves = []
    for run in comparison.arrived(variant):
        other = comparison.run(BASELINE, run.seed)
        if other is not None and other.arrived:
            base = dict(_finite_curve(other))
            curves.append([(step, loss / base[step] - 1) for step, loss in _finite_curve(run) if base.get(step)])
    return [curve for curve in curves if curve]


def _draw_gaps(axis: Axes, comparison: Comparison) -> None:
    axis.axhline(0, color=color_of(BASELINE), linewidth=1.2)
    ends, late = [], [0.0]
    for variant in comparison.variants:
        curves = _gap_curves(comparison, variant) if variant != BASELINE else []
        for curve in curves:
            draw_seed(axis, curve, variant)
            late += [gap for step, gap in curve if step >= comparison.runs[0].steps / 2]
        mean = mean_curve(curves)
        if mean:
            draw_line(axis, mean, variant)
            ends.append((*mean[-1], variant))
    gap_scale(axis, min(late), max(late))  # what happens after half of the run, when the gate is closed
    axis.set_title("gap to the baseline")
    axis.set_xlabel("optimizer step")
    gate_marks(axis, comparison.runs[0].steps)
    name_ends(axis, [*ends, *([(axis.get_xlim()[1], 0.0, BASELINE)] if ends else [])])
