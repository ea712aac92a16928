"""The sections of a page that are about one run."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from taperlit.report import commands
from taperlit.report.facts import facts_of
from taperlit.report.markup import Child, el, folding, missing, table
from taperlit.report.parts import Parts
from taperlit.report.run import Run
from taperlit.report.section_bench import bench_section
from taperlit.report.section_model import fold_section, samples_section, tails_section
from taperlit.report.section_traces import traces_section

LONG = 36  # characters of a fact that gets twice the width
EXPORTS = ("onnx", "transformers", "transformer-lens")  # ends of the names that `taperlit export` gives


def run_section(number: int, name: str, run: Run, parts: Parts, samples: bool) -> Element:
    """All about one run.

    Args:
        number: of the run on the page.
        name: above it; empty where the page is about this run alone.
        run: its traces and configs.
        parts: what else it has.
        samples: texts of its model were wanted.
    """
    problems = [missing(line) for line in run.problems]
    facts = [
        el("div", el("dt", what), el("dd", how), class_="long" if len(how) > LONG else None)
        for what, how in facts_of(run)
    ]
    head = el("header", el("h2", name) if name else None, el("p", str(run.folder), class_="path"), problems)
    body = [
        el("dl", facts, class_="facts") if facts else None,
        phase_strip(run),
        part("Traces", traces_section(run)),
        part("Fold", fold_section(run, parts)),
        part("Tails", tails_section(run, parts)),
        part("Samples", samples_section(run, parts, samples)),
        part("Bench", bench_section(run, parts)),
        part("Exports", exports(run)),
        part("Config", config(run)),
    ]
    return el("section", head, body, class_="run", id=f"run-{number}")


def part(title: str, content: Child) -> Element:
    """A titled part of a run's section."""
    return el("section", el("h3", title), content, class_="part")


def phase_strip(run: Run) -> Element | None:
    """The phases as a strip, with the steps at which they begin and end."""
    if run.phases is None or not run.zones:
        return None
    last, bars, names = run.steps, [], []
    for zone in run.zones:
        left, width = 1000 * zone.first / last, 1000 * (zone.last - zone.first) / last
        bars.append(el("rect", class_=f"zone {zone.name}", x=f"{left:.1f}", y=0, width=f"{width:.1f}", height=10))
        # A boundary belongs to the phase before it where the gate is 1, and to the one after it where it is 0.
        first = int(zone.first) + (zone.name != "linear")
        end = int(zone.last) - (zone.name == "taper" and zone.last == run.phases.end)
        steps = f" steps {first:,} to {end:,}" if end > first else f" step {first:,}"
        names.append(el("li", el("i", class_=f"swatch {zone.name}"), el("b", zone.name), steps))
    strip = el("svg", bars, viewBox="0 0 1000 10", preserveAspectRatio="none", aria_hidden="true")
    source = el("li", f"boundaries by {run.phases.source}", class_="quiet")
    return el("div", strip, el("ul", names, source), class_="phases")


def exports(run: Run) -> Iterator[Element]:
    """What was written for other programs."""
    found = sorted(path for end in EXPORTS for path in run.folder.rglob(f"*-{end}") if path.is_dir())
    if found:
        sizes = [sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in found]
        names = [str(path.relative_to(run.folder)) for path in found]
        rows = zip(names, [f"{size / 1e6:.1f} MB" for size in sizes], strict=True)
        yield table(["folder", "size"], rows)
    elif run.folded:
        yield missing("Nothing was exported. For transformers:", commands.export(run))
    else:
        yield missing("Nothing was exported: that takes a folded model.")


def config(run: Run) -> Iterator[Element]:
    """The configs as they stand in the folder."""
    for name, text in run.configs.items():
        yield folding(name, el("pre", text))
    if "config.yaml" not in run.configs:
        yield missing("There is no config.yaml; `taperlit fit` writes one, other programs' runs have none.")
