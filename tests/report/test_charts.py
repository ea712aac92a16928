"""What a chart draws, and what it says of the rest."""

import math
import re

from written import parsed

from taperlit.report.bars import Bar, bar_chart
from taperlit.report.charts import Series, line_chart
from taperlit.report.phases import Zone


def of_class(page, name):
    return [attributes for _, attributes in page.elements if name in (attributes.get("class") or "").split()]


def test_a_line_goes_through_its_points_and_phases_lie_behind():
    zones = [Zone("warm-up", 0, 10), Zone("taper", 10, 20)]
    page = parsed(line_chart("loss", [Series("train", [(0, 4.0), (9, 2.0), (19, 0.0)], "s0")], zones))
    low, high, start, end, log = page.charts[0]["y"]
    assert not log
    path = next(attributes["d"] for tag, attributes in page.elements if tag == "path" and "M1 5" not in attributes["d"])
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML](\S+) (\S+?)(?=[ML]|$)", path)]
    x = [attributes for attributes in of_class(page, "zone")]
    first, second = (float(each["x"]) for each in x)
    assert first < points[0][0] < second  # step 1 is within the first phase
    assert points[1][0] == second  # and step 10 is its end
    for (_, y), value in zip(points, (4.0, 2.0, 0.0), strict=True):
        assert abs(y - (start + (value - low) / (high - low) * (end - start))) < 0.1
    assert [text for tag, text in page.texts if tag == "text" and text in ("warm-up", "taper")] == ["warm-up", "taper"]


def test_what_cannot_be_drawn_is_said():
    wild = [(0, 1.0), (1, math.nan), (2, 100.0), (3, math.inf), (4, 50.0)]
    page = parsed(line_chart("norms", [Series("a", wild, "s0"), Series("b", [(0, 0.0), (4, 2.0)], "s1")], log=True))
    assert "a: 2 values not finite, from step 2 on" in page.words
    assert "a line is missing where it is 0" in page.words
    path = next(
        attributes["d"] for tag, attributes in page.elements if tag == "path" and attributes["d"].count("M") == 3
    )
    assert "nan" not in path
    assert len(of_class(page, "bad")) == 2
    assert page.lines("a") == [[(1, 1.0), (2, "nan"), (3, 100.0), (4, "inf"), (5, 50.0)]]


def test_lines_without_any_finite_value_are_still_a_chart():
    page = parsed(line_chart("loss", [Series("train", [(3, math.nan)], "s0")]))
    assert "train: 1 value not finite, from step 4 on" in page.words
    assert line_chart("loss", [Series("train", [], "s0")]) is None


def test_long_runs_are_thinned_and_say_so():
    points = [(k, math.sin(k / 50)) for k in range(20_000)]
    points[7_777] = (7_777, 3.5)
    page = parsed(line_chart("loss", [Series("train", points, "s0")]))
    (line,) = page.lines("train")
    assert len(line) < 1_100
    assert (7_778, 3.5) in line
    assert "of 20,000 points" in page.words


def test_bars_have_lengths_in_proportion_and_whiskers():
    page = parsed(bar_chart("rate", [Bar("before", 1.0, "1.00x"), Bar("after", 1.5, "1.50x", 1.25, 2.0)], mark=1.0))
    one, other = (float(attributes["width"]) for attributes in of_class(page, "bar"))
    assert abs(other / one - 1.5) < 0.01
    assert len(of_class(page, "whisker")) == 1
    assert bar_chart("rate", []) is None
