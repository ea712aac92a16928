"""Line charts as inline SVG, which need no script to be read; one adds the values under the pointer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from taperlit.report.markup import Child, el, folding
from taperlit.report.phases import Zone
from taperlit.report.scales import Scale, axis, figure, short
from taperlit.report.traces import Points

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 393, 18, 190  # of the plot within
MOST_POINTS = 800  # per line: more than the picture has columns
MOST_OF_ALL = 16_000  # points of a chart of many lines, but for a few of each
LEAST_POINTS = 120
MARKED = 40  # points of a line that get a dot each
COLUMNS = 4  # lines that are named one after the other; more stand in columns
WIDE = 14  # characters of a name that takes a row of its own then
LEGEND = 16  # lines that are named at once


@dataclass(frozen=True)
class Series:
    """A line.

    Args:
        name: in the legend.
        points: as logged: step 0 is the first optimizer step.
        look: classes of ``page.css``: a colour (``s0`` to ``s7``, ``r0`` to ``r11``), maybe dashes (``d1``, ``d2``).
        dots: mark the points, where they are few.
        quiet: draw it thin.
    """

    name: str
    points: Points
    look: str
    dots: bool = False
    quiet: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    zones: Sequence[Zone] = (),
    log: bool = False,
    note: str = "",
    last_step: int = 0,
    percent: bool = False,
) -> Element | None:
    """A figure with a chart of lines over optimizer steps, counted from 1.

    Values that are not finite, or at or below 0 on a logarithmic axis, break a line; the first are counted in words.

    Args:
        title: above it.
        series: the lines; those without points are left out.
        zones: phases that are shaded.
        log: take logarithms where values differ enough.
        note: beside the title.
        last_step: where the axis of steps ends at least.
        percent: values are shown as percentages.

    Returns:
        None where there is nothing to draw.
    """
    series = [each for each in series if each.points]
    if not series:
        return None
    finite = [value for each in series for _, value in each.points if math.isfinite(value)]
    last = max(last_step, *(each.points[-1][0] + 1 for each in series))
    x = Scale(0, max(last, 1), LEFT, RIGHT)
    y = axis(finite, BOTTOM, TOP, log)
    most = max(LEAST_POINTS, min(MOST_POINTS, MOST_OF_ALL // len(series)))
    drawn = [thin(each.points, most) for each in series]
    parts: list[Child] = [
        [_zone(zone, x) for zone in zones],
        _grid(x, y, percent),
        [_line(i, each, points, x, y) for i, (each, points) in enumerate(zip(series, drawn, strict=True))],
        el("line", class_="cursor", y1=TOP, y2=BOTTOM, x1=LEFT, x2=LEFT),
    ]
    lines = "1 line" if len(series) == 1 else f"{len(series)} lines"
    picture = el(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {lines} over {last:,} optimizer steps",
    )
    words = [note, "logarithmic" if y.log else "", *_remarks(series, y, most)]
    caption = el("figcaption", el("b", title), [[" ", el("span", word)] for word in words if word])
    return el(
        "figure",
        caption,
        picture,
        _legend(series, percent),
        data(_for_script(series, drawn, zones, x, y, percent)),
        class_="chart",
    )


def thin(points: Points, most: int) -> Points:
    """The points that a picture can show: of each stretch of steps the first, last, lowest and highest value, and the
    first that is not finite."""
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 4))
    kept: Points = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        ordered = sorted((point for point in part if math.isfinite(point[1])), key=lambda point: point[1])
        wild = [point for point in part if not math.isfinite(point[1])]
        kept += sorted({part[0], part[-1], *ordered[:1], *ordered[-1:], *wild[:1]})
    return kept


def data(content: Any) -> Element:
    """Plain data for the page's script, in which nothing can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return el("script", text, type="application/json")


def key(look: str) -> Element:
    """A short piece of a line, for a legend."""
    return el("svg", el("path", d="M1 5H23"), class_=f"key {look}", viewBox="0 0 24 10", aria_hidden="true")


def _zone(zone: Zone, x: Scale) -> list[Element]:
    left, right = x(zone.first), x(zone.last)
    shade = el("rect", class_=f"zone {zone.name}", x=_n(left), y=TOP, width=_n(right - left), height=BOTTOM - TOP)
    if right - left < 7 * len(zone.name):
        return [shade]
    return [shade, el("text", zone.name, class_="zone-name", x=_n((left + right) / 2), y=TOP - 6)]


def _grid(x: Scale, y: Scale, percent: bool) -> list[Element]:
    parts = []
    for value in y.ticks(5):
        at = _n(y(value))
        zero = " zero" if value == 0 else ""
        parts += [el("line", class_=f"grid{zero}", x1=LEFT, x2=RIGHT, y1=at, y2=at)]
        label = f"{100 * value:+.3g}%".replace("+0%", "0%").replace("-", "\u2212") if percent else short(value)
        parts += [el("text", label, class_="y", x=LEFT - 6, y=_n(y(value) + 4))]
    parts.append(el("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    for value in x.ticks(5):
        if value == int(value):
            parts += [el("line", class_="axis", x1=_n(x(value)), x2=_n(x(value)), y1=BOTTOM, y2=BOTTOM + 4)]
            parts += [el("text", short(value), class_="x", x=_n(x(value)), y=BOTTOM + 18)]
    return parts


def _line(number: int, each: Series, points: Points, x: Scale, y: Scale) -> Element:
    d, dots, pen_down = [], [], False
    marked = each.dots and len(points) <= MARKED
    for i, (step, value) in enumerate(points):
        if not _shown(value, y):
            pen_down = False
            continue
        at = f"{_n(x(step + 1))} {_n(y(value))}"
        d.append(f"{'L' if pen_down else 'M'}{at}")
        alone = not pen_down and (i + 1 == len(points) or not _shown(points[i + 1][1], y))
        if marked or alone:
            cx, cy = at.split()
            dots.append(el("circle", cx=cx, cy=cy, r="2.6"))
        pen_down = True
    bad = [step for step, value in points if not math.isfinite(value)]
    crosses = [el("path", d=f"M{_n(x(s + 1) - 3)} {TOP + 1}l6 6m0 -6l-6 6", class_="bad") for s in bad[:20]]
    classes = f"series {each.look}{' quiet' if each.quiet else ''}"
    return el("g", el("path", d="".join(d)), dots, crosses, class_=classes, data_series=number)


def _shown(value: float, y: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not y.log)


def _remarks(series: Sequence[Series], y: Scale, most: int) -> list[str]:
    """What the picture cannot show."""
    remarks = []
    for each in series:
        bad = [step + 1 for step, value in each.points if not math.isfinite(value)]
        if bad:
            values = "1 value" if len(bad) == 1 else f"{len(bad):,} values"
            remarks.append(f"{each.name}: {values} not finite, from step {bad[0]:,} on")
    if y.log and any(value <= 0 for each in series for _, value in each.points):
        remarks.append("a line is missing where it is 0")
    longest = max(len(each.points) for each in series)
    if longest > most:
        remarks.append(f"lowest and highest of each stretch of {longest:,} points")
    return remarks


def _legend(series: Sequence[Series], percent: bool) -> Element:
    def item(number: int, each: Series) -> Element:
        value = each.points[-1][1]
        shown = f"{100 * value:+.2f}%".replace("-", "\u2212") if percent else figure(value, 4)
        wide = "wide" if len(each.name) > WIDE else None
        return el("li", key(each.look), el("span", each.name), " ", el("b", shown), data_series=number, class_=wide)

    items = [item(i, each) for i, each in enumerate(series)]
    names = el("ul", items, class_="legend columns" if len(series) > COLUMNS else "legend")
    if len(series) <= LEGEND:
        return names
    return folding(f"{len(series)} lines, with their last values", names)


def _for_script(
    series: Sequence[Series], drawn: Sequence[Points], zones: Sequence[Zone], x: Scale, y: Scale, percent: bool
) -> dict[str, Any]:
    return {
        "x": [x.low, x.high, x.start, x.end],
        "y": [y.low, y.high, y.start, y.end, y.log],
        "percent": percent,
        "zones": [list(zone) for zone in zones],
        "series": [
            {
                "name": each.name,
                "look": each.look,
                "steps": [step + 1 for step, _ in points],
                "values": [float(f"{value:.6g}") if math.isfinite(value) else str(value) for _, value in points],
            }
            for each, points in zip(series, drawn, strict=True)
        ],
    }


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
