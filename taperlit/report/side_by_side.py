"""The section that compares several runs: their losses on one chart, and how far each is from the first."""

import math
from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from taperlit.report.charts import Series, line_chart
from taperlit.report.groups import COLOURS, DASHES
from taperlit.report.markup import Child, el, table
from taperlit.report.phases import Zone
from taperlit.report.run import Run
from taperlit.report.scales import figure
from taperlit.report.traces import Points

LOSS = "val/loss"
# What the validation text depends on: losses on two texts, or of two tokenizers, are no measure of the models.
_TEXT = ["files", "hub", "hub_config", "hub_split", "text_column", "tokenizer", "vocab_size", "block_size"]
_TEXT += ["val_fraction", "max_documents", "max_tokens"]


def relative_gap(run: Run, first: Run) -> tuple[int, float] | None:
    """How far a run's validation loss is from another's, at the last step at which both were validated.

    Returns:
        That step as it was logged, and the loss over the other's, less 1; None where there is no such step.
    """
    gaps = gap_points(run, first)
    return gaps[-1] if gaps else None


def gap_points(run: Run, first: Run) -> Points:
    """The relative gap at every step at which both runs were validated."""
    base = dict(first.traces.get(LOSS, []))
    pairs = [(step, loss, base[step]) for step, loss in run.traces.get(LOSS, []) if step in base]
    return [(step, loss / other - 1 if other else math.nan) for step, loss, other in pairs]


def other_text(run: Run, first: Run) -> str:
    """In words, in brackets, which options make another validation text of a run's than of the first's; often none."""
    if run.option("data") is None or first.option("data") is None:  # of no command of ours, or not to be read
        return ""
    names = [f"data.{name}" for name in _TEXT if run.option(f"data.{name}") != first.option(f"data.{name}")]
    return f" (other {', '.join(names)})" if names else ""


def comparison(names: Sequence[str], runs: Sequence[Run]) -> Element:
    """The section."""
    return el("section", el("h2", "Side by side"), _table(names, runs), _charts(names, runs), class_="run", id="runs")


def _charts(names: Sequence[str], runs: Sequence[Run]) -> Element:
    zones, last = _common_zones(runs), max(run.steps for run in runs)

    def lines(tag: str, quiet: bool = False) -> list[Series]:
        return [
            Series(name, run.traces.get(tag, []), _look(i), dots=not quiet, quiet=quiet)
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    gaps = [
        Series(name, gap_points(run, runs[0]), _look(i), dots=True)
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
        if i
    ]
    charts = [
        line_chart("validation loss", lines(LOSS), zones, note="nats per token", last_step=last),
        line_chart("gap of the validation loss", gaps, zones, False, f"relative to {names[0]}", last, percent=True),
        line_chart("training loss", lines("train/loss", quiet=True), zones, note="nats per token", last_step=last),
    ]
    return el("div", charts, class_="charts")


def _table(names: Sequence[str], runs: Sequence[Run]) -> Element:
    rows = [[el("a", name, href=f"#run-{i}"), *_cells(run, runs[0])] for i, (name, run) in enumerate(zip(names, runs))]  # noqa: B905
    headings = ["run", "tapered", "steps", "last validation loss", "at step", f"gap to {names[0]}", "lowest"]
    return table([*headings, "training loss", "gate"], rows)


def _cells(run: Run, first: Run) -> Iterator[Child]:
    points = run.traces.get(LOSS, [])
    yield str(run.option("model.taper") or "")
    yield figure(run.steps)
    yield f"{points[-1][1]:.4f}" if points else "not measured"
    yield figure(points[-1][0] + 1) if points else ""
    yield _gap_in_words(run, first)
    finite = [loss for _, loss in points if math.isfinite(loss)]
    yield f"{min(finite):.4f}" if finite else ""
    train = run.last("train/loss")
    yield f"{train:.4f}" if train is not None else ""
    yield figure(run.last("taper/gate"))


def _gap_in_words(run: Run, first: Run) -> str:
    if run is first:
        return ""
    found = relative_gap(run, first)
    if found is None:
        return "no step in common"
    step, gap = found
    last = {step for each in (run, first) for step, _ in each.traces[LOSS][-1:]}
    at = "" if last == {step} else f" at step {step + 1:,}"
    return f"{gap:+.2%}{at}".replace("-", "\u2212") + other_text(run, first)


def _common_zones(runs: Sequence[Run]) -> list[Zone]:
    """The phases of all tapered runs, if they are the same; else none can be shaded."""
    phases = {(run.phases.warmup, run.phases.end) for run in runs if run.phases is not None}
    longest = max(runs, key=lambda run: run.steps if run.phases is not None else -1)
    return longest.zones if len(phases) == 1 else []


def _look(number: int) -> str:
    return f"s{number % COLOURS} d{number // COLOURS % DASHES}"
