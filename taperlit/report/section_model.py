"""The sections of a run's model: how it was folded, the tails of its losses, and what it writes."""

import math
from collections.abc import Iterable, Iterator
from xml.etree.ElementTree import Element

from taperlit.report import commands
from taperlit.report.bars import Bar, bar_chart
from taperlit.report.folds import Fold
from taperlit.report.markup import Child, el, folding, missing, table
from taperlit.report.parts import Parts
from taperlit.report.run import Run
from taperlit.report.samples import Sample
from taperlit.report.scales import figure
from taperlit.report.tails import FIGURES, Tails
from taperlit.structure import describe

UNTAPERED = ("none", "dyt", "derf")  # values of model.taper without a norm that folds


def fold_section(run: Run, parts: Parts) -> Iterator[Element]:
    """What folding removed, and what it left; or why there is no folded model."""
    yield from parts.complaints("fold")
    gate = run.last("taper/gate")
    if parts.folds:
        counted = ["norms removed", "left as scales", "biases made", "untied", "difference in float64"]
        yield table(["folded model", *counted], [_fold_row(run, each) for each in parts.folds])
        for row in (row for each in parts.benches for row in each.rows if "logit_difference" in row):
            yield el(
                "p",
                f"Folded against unfolded in float32, on {figure(row.get('compared_tokens'))} validation tokens: the "
                f"largest difference of the logits is {figure(row['logit_difference'], 2)} of the largest logit.",
            )
        yield folding("What became of each norm", el("pre", "\n".join(describe(parts.folds[0].structure))))
    elif parts.problems.get("fold"):
        return
    elif run.option("model.taper") in UNTAPERED:
        yield missing(f"model.taper is {run.option('model.taper')}: there is nothing to fold.")
    elif run.checkpoint is None:
        yield missing("There is no folded model, and no checkpoint to fold.")
    elif gate is not None and gate > 0:
        line = f"There is no folded model: the gate ended at {figure(gate)}, not 0."
        yield missing(f"{line} Train on:", commands.go_on(run)) if commands.can_go_on(run) else missing(line)
    else:
        yield missing("There is no folded model. Make one:", commands.fold(run))


def _fold_row(run: Run, each: Fold) -> list[Child]:
    structure = each.structure
    parts = (structure["identities"], structure["scales"], structure["biases"], structure["untied"])
    name = f"{each.folder.relative_to(run.folder)}{run.earlier(each.step)}"
    return [name, *(figure(len(part)) for part in parts), figure(structure["difference"], 2)]


def tails_section(run: Run, parts: Parts) -> Iterator[Element]:
    """What the mean loss hides."""
    yield from parts.complaints("tails")
    if parts.tails:
        keys = [key for key in FIGURES if any(key in each.figures for each in parts.tails)]
        yield table(
            ["token losses in nats", *(FIGURES[key] for key in keys)],
            [_tails_row(run, each, keys) for each in parts.tails],
        )
        yield el("div", [by_position(each) for each in parts.tails], class_="charts")
    elif not commands.can_go_on(run):
        yield missing("There are no tails of the token losses: LossTails(during_fit=True) logs them.")
    elif not parts.problems.get("tails"):
        yield missing("There are no tails of the token losses. Make them:", commands.predict(run))


def _tails_row(run: Run, each: Tails, keys: Iterable[str]) -> list[Child]:
    return [each.source + run.earlier(each.step), *(figure(each.figures.get(key)) for key in keys)]


def by_position(each: Tails) -> Element | None:
    """The mean loss over ranges of positions in a block."""
    bars = [Bar(name, value, figure(value, 4)) for name, value in each.by_position.items() if math.isfinite(value)]
    return bar_chart("loss by position in the block", bars, note=f"mean, nats; {each.source}")


def samples_section(run: Run, parts: Parts, wanted: bool) -> Iterator[Element]:
    """What the model writes."""
    yield from parts.complaints("samples")
    if parts.samples:
        yield el("p", f"By {parts.sampled}; what it was given is grey.", class_="quiet")
        yield el("div", [_sample(each) for each in parts.samples], class_="samples")
    elif not wanted:
        yield missing("Samples were left out by --samples=false.")
    elif not parts.problems.get("samples"):
        yield missing("There is no checkpoint and no folded model to sample from.")


def _sample(each: Sample) -> Element:
    return el(
        "figure", el("figcaption", el("b", each.way)), el("pre", el("span", each.prompt, class_="prompt"), each.text)
    )
