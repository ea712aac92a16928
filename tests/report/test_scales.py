"""Axes: where values stand and which are labelled."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taperlit.report.charts import thin
from taperlit.report.scales import axis, figure, short

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-12)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_value_is_within_the_axis_and_ticks_are_too(values, log):
    scale = axis(values, 200, 20, log)
    shown = [value for value in values if value > 0] if scale.log else values
    assert all(20 <= scale(value) <= 200 for value in shown)
    ticks = scale.ticks(5)
    assert ticks == sorted(ticks)
    assert all(20 - 1e-6 <= scale(tick) <= 200 + 1e-6 for tick in ticks)
    assert 1 <= len(ticks) <= 12
    assert len({short(tick) for tick in ticks}) == len(ticks) or max(map(abs, ticks)) > 1e3 * (ticks[1] - ticks[0])


@given(st.floats(1e-9, 1e9), st.floats(10, 1e9))
@settings(max_examples=50, deadline=None)
def test_a_logarithmic_axis_has_equal_ratios_at_equal_distances(low, times):
    scale = axis([low, low * times], 0, 100, log=True)
    assume(scale.log)
    middle = scale(low * math.sqrt(times))
    assert middle == pytest.approx((scale(low) + scale(low * times)) / 2, abs=1e-6)


@given(st.lists(st.floats(allow_infinity=True, allow_nan=True), min_size=1, max_size=3000), st.integers(20, 800))
@settings(max_examples=40, deadline=None)
def test_thinned_lines_keep_their_ends_and_extremes(values, most):
    points = [*enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= max(len(points) if len(points) <= most else 0, 1.25 * most + 5)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert (kept[0][0], kept[-1][0]) == (0, len(values) - 1)
    finite, left = ([v for _, v in some if math.isfinite(v)] for some in (points, kept))
    assert (min(finite, default=0), max(finite, default=0)) == (min(left, default=0), max(left, default=0))
    assert len(finite) == len(points) or len(left) < len(kept)  # what is not finite is still told


def test_numbers_are_short_and_right():
    assert [short(value) for value in (0, 0.002, 12, 1500, 2.5e6, 3e-7, -0.5)] == [
        "0", "0.002", "12", "1.5k", "2.5M", "3e\u22127", "\u22120.5",
    ]  # fmt: skip
    assert [figure(value) for value in (None, 3, 1234567, 0.123456, 1234567.8, math.nan, -1.0)] == [
        "", "3", "1,234,567", "0.12346", "1,234,568", "nan", "\u22121",
    ]  # fmt: skip
