"""The statistics of paired runs: means with intervals, gaps to a baseline, and where a gap changes its sign."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
Points = Sequence[Sequence[float]]  # of (step, value) or (x, y)


def t_probability(t: float, df: int) -> float:
    """P(abs(T) <= abs(t)) of Student's t, exactly: for whole degrees of freedom it is a finite sum.

    With theta = atan(t / sqrt(df)) it is, for even df, sin(theta) times a sum of even powers of cos(theta), and for odd
    df (2 / pi) (theta + sin(theta) times one of odd powers) (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: any number.
        df: degrees of freedom, at least 1.

    Raises:
        ValueError: ``df`` is below 1.
    """
    if df < 1:
        raise ValueError(f"Student's t has at least 1 degree of freedom, not {df}.")
    theta = math.atan(abs(t) / math.sqrt(df))
    odd = df % 2
    power = math.cos(theta) ** odd
    total = 0.0
    for k in range(1 + odd, df, 2):  # even df: 1, 1/2, 1 3 / 2 4, ...; odd df: 1, 2/3, 2 4 / 3 5, ...
        total += power
        power *= math.cos(theta) ** 2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with ``t_probability(t, df) == confidence``: the half-width of an interval, in standard errors.

    scipy has it, and nothing that this package depends on.

    Args:
        df: degrees of freedom, at least 1.
        confidence: above 0, below 1.

    Raises:
        ValueError: a value out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is between 0 and 1, not {confidence}.")
    low, high = 0.0, math.pi / 2  # of theta, in which the probability rises without a break
    for _ in range(100):
        middle = (low + high) / 2
        if t_probability(math.sqrt(df) * math.tan(middle), df) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval.

    Args:
        mean: of the values.
        low: the interval's lower end; None where a single value has no interval.
        high: its upper end, likewise.
        n: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def estimate(values: Iterable[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of independent values with Student's interval; None of no values."""
    array = np.asarray([*values], dtype=np.float64)
    if not len(array):
        return None
    mean = float(array.mean())
    if len(array) == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(len(array) - 1, confidence) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Estimate(mean, mean - half, mean + half, len(array))


def relative_gaps(losses: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """loss / baseline's loss - 1 by seed, of the seeds that both have.

    Seeds are paired since a seed fixes the initial weights and the order of the data: what is left of the difference
    is the variant's.
    """
    return {seed: loss / baseline[seed] - 1 for seed, loss in losses.items() if seed in baseline}


def at_the_end(points: Points, steps: int) -> float | None:
    """Mean of a trace's values over the last fifth of the steps; None where it has none there.

    Args:
        points: (step, value) pairs.
        steps: of the whole run.
    """
    values = [value for step, value in points if step >= 0.8 * steps]
    return float(np.mean(values, dtype=np.float64)) if values else None


def mean_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean over the curves at each step that all of them have."""
    if not curves:
        return []
    tables = [{step: value for step, value in curve} for curve in curves]
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    return [(step, float(np.mean([table[step] for table in tables]))) for step in steps]


@dataclass(frozen=True)
class Crossing:
    """A place where a curve changes its sign.

    Args:
        x: the place.
        rising: from below zero to above it.
    """

    x: float
    rising: bool


def crossings(points: Points) -> list[Crossing]:
    """Where a curve over x > 0 changes its sign, by straight lines over log(x) between its points.

    A curve that touches zero and turns back does not cross it; one that lies on zero between two points crosses it in
    the middle of them, in log(x).

    Args:
        points: (x, y) pairs in any order.
    """
    found: list[Crossing] = []
    last: tuple[float, float] | None = None  # log(x) and y, where the sign was last known
    zeros: list[float] = []  # log(x) of the zeros since then
    for x, y in sorted((float(x), float(y)) for x, y in points):
        here = math.log(x)
        if y == 0:
            zeros.append(here)
            continue
        if last is not None and (last[1] < 0) != (y < 0):
            slope = (y - last[1]) / (here - last[0])
            at = (zeros[0] + zeros[-1]) / 2 if zeros else last[0] - last[1] / slope
            found.append(Crossing(math.exp(at), rising=y > 0))
        last, zeros = (here, y), []
    return found


def matching_crossing(of_seed: Points, mean: Crossing) -> float | None:
    """One seed's crossing in the mean's direction, the nearest to the mean's in log(x); None where it has none."""
    candidates = [one.x for one in crossings(of_seed) if one.rising == mean.rising]
    return min(candidates, key=lambda x: abs(math.log(x / mean.x)), default=None)
