"""`logit_chasing`: how residual and logits grow, and the radial gradient, with and without the final norm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from paper_harness.comparison import Comparison, compare, finite
from paper_harness.experiments import FIVE
from paper_harness.figures import PLAIN, canvas, draw_line, draw_seed, gate_marks, legend_of, log_scale
from paper_harness.records import PAPERS, WITH_FINAL_NORM, StoredRun, title
from paper_harness.statistics import at_the_end, mean_curve
from paper_harness.tables import Claim, Section, few, markdown, number_cell

TRACES = {
    "taper/pre_logit_rms": "pre-logit RMS",
    "taper/logit_norm": "logit norm",
    "taper/radial_gradient": "radial gradient",
}
RADIAL = "taper/radial_gradient"
NOTHING = 1e-2  # of the radial gradient without a final norm: below it one with the norm counts as zero
COLUMNS = (
    "run", "size", "corpus", "lr", "tokens_per_parameter", "variant", "seed", "final_norm", "trace", "at_the_end",
    "least_after_the_gate", "largest_after_the_gate",
)  # fmt: skip


def section(runs: Sequence[StoredRun]) -> Section:
    """The table, the rows and the figure of the runs."""
    comparisons, left_out = compare([run for run in runs if run.variant in FIVE])
    lines = [
        "The residual before the head, the logits, and the radial gradient `<dL/dh, h> / ||h||` (mean over tokens) of "
        "that residual: means over the last fifth of the steps and the seeds that arrived. `least` and `largest` are "
        f"of all records after the gate closed, of any seed. Below {NOTHING:.0%} of what it is without a final norm a "
        "radial gradient counts as zero.",
        "",
    ]
    rows, drawn, claims = [], [], []
    for comparison in comparisons:
        if not any(run.curve(tag) for run in comparison.runs for tag in TRACES):
            continue
        claim = Propositions(*(_after(comparison, variants) for variants in _with_and_without(comparison)))
        lines += [f"### {comparison.heading()}", "", *_table(comparison), *claim.lines(), *comparison.fates()]
        rows += _rows(comparison)
        drawn.append(comparison)
        claims.append(claim)
    return Section(
        name="logit_chasing",
        title="Logit chasing (Propositions 4.1 and 4.2)",
        lines=[*lines, *left_out],
        columns=COLUMNS,
        rows=rows,
        caption="Means over the seeds that arrived, single seeds behind them. Between the dotted lines the gate "
        "closes; All-Taper's final norm goes with the others.",
        draw=partial(_draw, drawn[0]) if drawn else None,
        claims=claims[0].claims() if claims else [],
    )


@dataclass
class Propositions:
    """The radial gradients after the gate closed, with the final norm and without it.

    Args:
        anchored: those with it, of all records of all seeds.
        free: those without it.
    """

    anchored: list[float]
    free: list[float]

    def first(self) -> str:
        """What became of Proposition 4.1: no radial gradient with the final norm."""
        if not self.anchored:
            return ""
        largest = max(map(abs, self.anchored))
        told = f"at most {largest:.1e} in absolute value ({len(self.anchored)} records)"
        if not self.free:
            return f"{told}; no run without a final norm to hold it against"
        typical = float(np.median(np.abs(self.free)))
        share = largest / typical if typical else math.inf
        verdict = "holds" if share <= NOTHING else "does not hold"
        return f"{verdict}: {told}, {share:.1e} of the median without it"

    def second(self) -> str:
        """What became of Proposition 4.2: a negative one without the final norm."""
        if not self.free:
            return ""
        below = sum(value < 0 for value in self.free)
        verdict = "holds" if below == len(self.free) else "not always, in this mean over all tokens"
        span = f"from {min(self.free):.1e} to {max(self.free):.1e}"
        return f"{verdict}: negative in {below} of {len(self.free)} records, {span}"

    def lines(self) -> list[str]:
        """Both, as a list."""
        told = []
        if self.first():
            told.append(f"- Proposition 4.1, zero with the final norm (up to eps): {self.first()}.")
        if self.second():
            told.append(f"- Proposition 4.2, negative without it at tokens where the right one leads: {self.second()}.")
        return [*told, *([""] if told else [])]

    def claims(self) -> list[Claim]:
        """Rows of the page's first table."""
        both = (
            Claim("No radial gradient at the residual with a final norm", "Proposition 4.1 (eps = 0)", self.first()),
            Claim("Without one it is negative: logit chasing", "Proposition 4.2", self.second()),
        )
        return [claim for claim in both if claim.ours]


def _with_and_without(comparison: Comparison) -> tuple[list[str], list[str]]:
    anchored = [variant for variant in comparison.variants if variant in WITH_FINAL_NORM]
    return anchored, [variant for variant in comparison.variants if variant not in WITH_FINAL_NORM]


def _late(run: StoredRun, tag: str) -> list[float]:
    """A trace's finite values once the gate is closed, or would be."""
    return [value for step, value in run.curve(tag) if step >= PAPERS.end * run.steps and finite(value)]


def _after(comparison: Comparison, variants: Sequence[str]) -> list[float]:
    return [value for variant in variants for run in comparison.arrived(variant) for value in _late(run, RADIAL)]


def _table(comparison: Comparison) -> list[str]:
    header = ["variant", "final norm", *TRACES.values(), "least", "largest", "runs"]
    rows = []
    for variant in comparison.variants:
        cells = []
        for tag in TRACES:
            mean = comparison.mean(variant, lambda run, tag=tag: at_the_end(run.curve(tag), run.steps))
            cells.append(number_cell(mean, ".2e" if tag == RADIAL else ".4g"))
        radial = _after(comparison, [variant])
        arrived, tried = len(comparison.arrived(variant)), len(comparison.of(variant))
        span = [f"{min(radial):.2e}{few(arrived)}", f"{max(radial):.2e}{few(arrived)}"] if radial else ["", ""]
        runs = f"{arrived}" if arrived == tried else f"{arrived} of {tried}"
        rows.append([title(variant), "yes" if variant in WITH_FINAL_NORM else "no", *cells, *span, runs])
    return markdown(header, rows, left=2)


def _rows(comparison: Comparison) -> list[list]:
    rows = []
    for run in comparison.runs:
        for tag in TRACES:
            if not run.arrived or not run.curve(tag):
                continue
            late = _late(run, tag)
            setup = run.setup
            rows.append([
                run.key, setup.size, setup.corpus, setup.lr, run.length, run.variant, run.seed,
                run.variant in WITH_FINAL_NORM, tag, at_the_end(run.curve(tag), run.steps),
                min(late, default=None), max(late, default=None),
            ])  # fmt: skip
    return rows


def _draw(comparison: Comparison, path: Path) -> None:
    with canvas(path, 1, 3, 3.5) as (figure, (panels,)):
        for axis, (tag, name) in zip(panels, TRACES.items(), strict=True):
            for variant in reversed(comparison.variants):
                curves = [
                    curve
                    for run in comparison.arrived(variant)
                    if (curve := [(step, value) for step, value in run.curve(tag) if finite(value)])
                ]
                for curve in curves:
                    draw_seed(axis, curve, variant)
                mean = mean_curve(curves)
                if mean:
                    draw_line(axis, mean, variant)
            axis.set_title(name)
            axis.set_xlabel("optimizer step")
            gate_marks(axis, comparison.runs[0].steps)
            if tag == RADIAL:
                axis.axhline(0, color="#444444", linewidth=0.8, zorder=0.6)
                axis.yaxis.set_major_formatter(PLAIN)
            else:
                log_scale(axis)
        legend_of(figure, panels[0], {variant: title(variant) for variant in comparison.variants})
