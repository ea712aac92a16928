"""Horizontal bars as inline SVG, with whiskers where there is a spread."""

from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from taperlit.report.markup import el
from taperlit.report.scales import linear_ticks, short

WIDTH, ROW = 400, 22
LEFT, RIGHT = 146, 340


class Bar(NamedTuple):
    """A bar.

    Args:
        name: before it.
        value: its length.
        shown: the value in words, after it.
        low: where its whisker begins, or None.
        high: where its whisker ends, or None.
    """

    name: str
    value: float
    shown: str
    low: float | None = None
    high: float | None = None


def bar_chart(title: str, bars: Sequence[Bar], mark: float | None = None, note: str = "") -> Element | None:
    """A figure with a bar per row, all from 0 on.

    Args:
        title: above it.
        bars: finite, none below 0.
        mark: a value at which a line is drawn through all.
        note: beside the title.

    Returns:
        None where there is no bar.
    """
    if not bars:
        return None
    most = max(max(bar.value, bar.high or 0) for bar in bars) or 1.0
    unit = (RIGHT - LEFT) / most
    height = ROW * len(bars) + 22
    parts = []
    for value in linear_ticks(0, most, 4):
        at = f"{LEFT + value * unit:.1f}"
        parts += [el("line", class_="grid", x1=at, x2=at, y1=0, y2=height - 18)]
        parts += [el("text", short(value), class_="x", x=at, y=height - 4)]
    for i, bar in enumerate(bars):
        middle = ROW * i + ROW / 2
        length = f"{bar.value * unit:.1f}"
        parts += [el("rect", class_="bar", x=LEFT, y=middle - 7, width=length, height=14)]
        end = LEFT + bar.value * unit
        if bar.low is not None and bar.high is not None:
            low, high = (LEFT + value * unit for value in (bar.low, bar.high))
            whisker = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
            parts += [el("path", class_="whisker", d=whisker)]
            end = max(end, high)
        parts += [el("text", bar.name, class_="y", x=LEFT - 8, y=middle + 4)]
        parts += [el("text", bar.shown, class_="value", x=f"{end + 6:.1f}", y=middle + 4)]
    if mark is not None:
        at = f"{LEFT + mark * unit:.1f}"
        parts += [el("line", class_="mark", x1=at, x2=at, y1=0, y2=height - 18)]
    label = f"{title}: " + ", ".join(f"{bar.name} {bar.shown}" for bar in bars)
    picture = el("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)
    caption = el("figcaption", el("b", title), [" ", el("span", note)] if note else None)
    return el("figure", caption, picture, class_="bars")
