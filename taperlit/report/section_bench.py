"""The section of what was measured of a run's model."""

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from taperlit.report import commands
from taperlit.report.bars import Bar, bar_chart
from taperlit.report.benches import Bench
from taperlit.report.markup import el, missing, table
from taperlit.report.parts import Parts
from taperlit.report.run import Run
from taperlit.report.scales import figure

CELLS = ("preset", "backend", "batch", "prompt", "block", "dtype")  # rows that differ in one are not compared
SPREAD = ("low", "high")  # of a ratio: they stand in its cell


def bench_section(run: Run, parts: Parts) -> Iterator[Element]:
    """Measurements that lie in the run's folder."""
    yield from parts.complaints("bench")
    for each in parts.benches:
        yield from _bench(each)
    if not parts.benches and not parts.problems.get("bench"):
        if run.folded and run.checkpoint is not None and run.checkpoint.name == "last.ckpt":
            yield missing("Nothing was measured. Measure decoding before and after folding:", commands.measure(run))
        else:
            yield missing("Nothing was measured: that takes a folded model and last.ckpt, which it was made of.")


def _bench(each: Bench) -> Iterator[Element]:
    yield el("p", el("code", str(each.about.get("command", each.path.name))), class_="quiet")
    rows = each.rows
    yield el("div", [*_ratios(rows)], class_="charts")
    keys = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None and key not in SPREAD))
    keys.sort(key=lambda key: key != "variant")
    yield table([key.replace("_", " ") for key in keys], [[_cell(row, key) for key in keys] for row in rows])
    versions = each.about.get("versions")
    names = [f"{name} {version}" for name, version in versions.items() if version] if isinstance(versions, dict) else []
    where = [str(each.about[key]) for key in ("device", "commit") if each.about.get(key)]
    yield el("p", "; ".join([*where, *names]), class_="quiet")


def _ratios(rows: list[dict[str, Any]]) -> Iterator[Element | None]:
    """The rates against the first variant's, a chart for each setting that was measured."""
    several = [key for key in CELLS if len({str(row.get(key)) for row in rows}) > 1]
    settings: dict[str, list[Bar]] = {}
    for number, row in enumerate(rows):
        ratio, low, high = (row.get(key) for key in ("ratio", *SPREAD))
        if isinstance(ratio, int | float) and ratio >= 0:
            setting = ", ".join(f"{key} {row.get(key)}" for key in several)
            bar = Bar(str(row.get("variant", number)), ratio, f"{ratio:.2f}x", low, high)
            settings.setdefault(setting, []).append(bar)
    for setting, bars in settings.items():
        against = f"against {bars[0].name}: median, lowest and highest round"
        yield bar_chart("rate", bars, 1.0, f"{setting}; {against}" if setting else against)


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if key == "ratio" and isinstance(value, int | float):
        low, high = row.get("low"), row.get("high")
        return f"{value:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else "")
    return figure(value, 4) if isinstance(value, int | float) else "" if value is None else str(value)
