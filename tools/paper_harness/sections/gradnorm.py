"""`gradnorm`: gradient norms per weight type over the steps, of the paper's five variants (its figure 4)."""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from paper_harness.comparison import Comparison, compare, finite
from paper_harness.experiments import FIVE
from paper_harness.figures import canvas, draw_line, gate_marks, legend_of, log_scale
from paper_harness.records import BASELINE, StoredRun, title
from paper_harness.statistics import Estimate, at_the_end, mean_curve
from paper_harness.tables import Claim, Section, few, markdown, number_cell

PREFIX = "grad_norm/"
COLUMNS = (
    "run", "size", "corpus", "lr", "tokens_per_parameter", "variant", "seed", "weight_type", "norm_at_the_end",
    "over_the_baseline",
)  # fmt: skip
PANELS = 4  # in a row
ORDER = (
    "tok_embed", "attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "gate_proj", "up_proj", "down_proj",
    "final_norm", "head",
)  # fmt: skip
GAIN, TWIN = "_norm.weight", "_norm.taper_weight"  # the gains of the two branches


def weight_types(runs: Sequence[StoredRun]) -> list[str]:
    """The weight types whose gradients were recorded, from the input to the output; a norm's gains are one."""
    tags = {tag for run in runs for tag in run.result.get("traces", {}) if tag.startswith(PREFIX)}

    def place(tag: str) -> tuple[int, str]:
        return next((i for i, part in enumerate(ORDER) if f".{part}." in tag), len(ORDER)), tag

    return sorted((tag for tag in tags if not tag.endswith(TWIN)), key=place)


def short(tag: str) -> str:
    """A weight type without what all have in common."""
    return tag.removeprefix(PREFIX).removeprefix("model.").removeprefix("blocks.").removesuffix(".weight")


def section(runs: Sequence[StoredRun]) -> Section:
    """The table, the rows and the figure of the runs."""
    comparisons, left_out = compare([run for run in runs if run.variant in FIVE])
    lines = [
        "Norm of the gradient of all weights of one type, before clipping: the mean over the last fifth of the steps, "
        "over the baseline's of the same seed, as the mean over the seeds. The gains of a tapered norm's two branches "
        "are taken together. A run that diverged has no end and is left out; it is named below the table.",
        "",
    ]
    rows, drawn, claims = [], [], []
    for comparison in comparisons:
        types = weight_types(comparison.of(BASELINE)) or weight_types(comparison.runs)
        if not types:
            continue
        lines += [f"### {comparison.heading()}", "", *_table(comparison, types), *comparison.fates()]
        rows += _rows(comparison, types)
        drawn.append((comparison, types))
        claims.append(_claim(comparison, types))
    return Section(
        name="gradnorm",
        title="Gradient norms per weight type (the paper's figure 4)",
        lines=[*lines, *left_out],
        columns=COLUMNS,
        rows=rows,
        caption="Mean over the seeds that arrived. Between the dotted lines the gate closes.",
        draw=partial(_draw, *drawn[0]) if drawn else None,
        claims=[claim for claim in claims[:1] if claim is not None],
    )


def _curve(run: StoredRun, tag: str) -> list[tuple[float, float]]:
    """The norms of a weight type's gradient: of a tapered norm, of the gains of both branches together.

    The one has no gradient at a gate of 0, the other none at 1; a baseline has the one alone.
    """
    curve = run.curve(tag)
    twins = dict(run.curve(tag.replace(GAIN, TWIN))) if GAIN in tag else {}
    return [(step, math.hypot(value, twins.get(step, 0.0))) for step, value in curve]


def _end(run: StoredRun, tag: str) -> float | None:
    return at_the_end(_curve(run, tag), run.steps)


def _ratio(comparison: Comparison, variant: str, tag: str) -> Estimate | None:
    return comparison.ratios(variant, lambda run: _end(run, tag))


def _table(comparison: Comparison, types: Sequence[str]) -> list[str]:
    variants = [variant for variant in comparison.variants if variant != BASELINE]
    rows = []
    for tag in types:
        base = comparison.mean(BASELINE, lambda run, tag=tag: _end(run, tag))
        cells = [number_cell(_ratio(comparison, variant, tag), after="x") for variant in variants]
        rows.append([f"`{short(tag)}`", number_cell(base, ".3g"), *cells])
    medians = [_median(comparison, variant, types) for variant in variants]
    rows.append(["median of the types", "", *(f"{value:.2f}x{few(n)}" if n else "" for value, n in medians)])
    return markdown(["weight type", "baseline's norm", *(title(variant) for variant in variants)], rows)


def _median(comparison: Comparison, variant: str, types: Sequence[str]) -> tuple[float, int]:
    """The median of the types' ratios, and the fewest seeds that one of them rests on."""
    ratios = [ratio for tag in types if (ratio := _ratio(comparison, variant, tag)) is not None]
    if not ratios:
        return math.nan, 0
    return statistics.median(ratio.mean for ratio in ratios), min(ratio.n for ratio in ratios)


def _rows(comparison: Comparison, types: Sequence[str]) -> list[list]:
    rows = []
    for run in comparison.runs:
        if not run.arrived:
            continue
        base = comparison.run(BASELINE, run.seed)
        for tag in types:
            own = _end(run, tag)
            other = _end(base, tag) if base is not None and base.arrived else None
            ratio = own / other if own is not None and other else None
            setup = run.setup
            head = [run.key, setup.size, setup.corpus, setup.lr, run.length, run.variant, run.seed]
            rows.append([*head, short(tag), own, ratio])
    return rows


def _claim(comparison: Comparison, types: Sequence[str]) -> Claim | None:
    told = []
    for variant in comparison.variants:
        value, n = _median(comparison, variant, types)
        if variant != BASELINE and n:
            told.append(f"{title(variant)} {value:.2f}x{few(n)}")
    if not told:
        return None
    return Claim(
        "Gradient norms split by the presence of the final norm, and the scale loss closes the gap",
        "drawn, without figures",
        f"{comparison.setup.size}, {comparison.setup.corpus}, median over the weight types, over the baseline's: "
        + ", ".join(told),
    )


def _draw(comparison: Comparison, types: Sequence[str], path: Path) -> None:
    columns = min(PANELS, len(types))
    rows = math.ceil(len(types) / columns)
    with canvas(path, rows, columns, 2.1 + (0.5 if rows == 1 else 0), sharex=True) as (figure, panels):
        for axis in panels.flat[len(types) :]:
            axis.set_visible(False)
        for axis, tag in zip(panels.flat, types, strict=False):
            for variant in comparison.variants:
                curves = [
                    [(step, value) for step, value in _curve(run, tag) if finite(value) and value > 0]
                    for run in comparison.arrived(variant)
                ]
                mean = mean_curve([curve for curve in curves if curve])
                if mean:
                    draw_line(axis, mean, variant, linewidth=1.3)
            log_scale(axis)
            axis.set_title(short(tag), fontsize=9, fontweight="normal")
            gate_marks(axis, comparison.runs[0].steps)
        for axis in panels[-1]:
            axis.set_xlabel("optimizer step")
        legend_of(figure, panels[0, 0], {variant: title(variant) for variant in comparison.variants})
