"""The section of a run's traces: charts, and every trace in figures."""

import math
from collections.abc import Iterator
from itertools import chain
from xml.etree.ElementTree import Element

from taperlit.report import commands
from taperlit.report.charts import line_chart
from taperlit.report.groups import MAIN, OTHERS, Group, rest_of, series_of
from taperlit.report.markup import Child, el, folding, missing, table
from taperlit.report.run import Run
from taperlit.report.scales import figure

OF_A_GATE = ("gate g", "alignment scalars c")
WITHOUT_A_GATE = ("none", "dyt", "derf", "fakeln")  # values of model.taper


def traces_section(run: Run) -> Iterator[Element]:
    """The charts, one line on what was not logged, and every trace in figures."""
    if not run.traces:
        yield missing("There are no traces: no logger of the run wrote TensorBoard's files or metrics.csv.")
        return
    main = [(group, _chart(group, run)) for group in MAIN]
    yield el("div", [chart for _, chart in main], class_="charts")
    lacking = [group for group, chart in main if chart is None and _expected(group, run)]
    if lacking:
        unwatched = any(group.monitored for group in lacking) and "config.yaml" in run.configs
        watch = commands.watch(run) if unwatched and not run.option("taper.monitor") else None
        yield missing(f"Not logged in this run: {', '.join(group.title for group in lacking)}.", watch)
    used = chain.from_iterable(series_of(group, run.traces) for group in (*MAIN, *OTHERS))
    more = [_chart(group, run) for group in (*OTHERS, *rest_of(run.traces, used))]
    if any(chart is not None for chart in more):
        yield folding("More traces", el("div", more, class_="charts"))
    yield folding(f"All {len(run.traces)} traces in figures", in_figures(run))


def _chart(group: Group, run: Run) -> Element | None:
    lines = [*series_of(group, run.traces).values()]
    return line_chart(group.title, lines, run.zones, group.log, group.note, run.steps)


def _expected(group: Group, run: Run) -> bool:
    return group.title not in OF_A_GATE or run.option("model.taper") not in WITHOUT_A_GATE


def in_figures(run: Run) -> Element:
    """A table of every trace."""
    rows: list[list[Child]] = []
    for tag, points in run.traces.items():
        finite = [value for _, value in points if math.isfinite(value)] or [math.nan]
        values = (points[0][1], min(finite), max(finite), points[-1][1])
        rows.append([tag, figure(len(points)), *(figure(value, 6) for value in values), figure(points[-1][0] + 1)])
    return table(["trace", "points", "first", "lowest", "highest", "last", "at step"], rows)
