"""Where values stand on an axis, which of them are labelled, and how numbers are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

STEEP = 8  # times the smallest value is the largest, from where on a logarithm shows more


@dataclass(frozen=True)
class Scale:
    """An axis.

    Args:
        low: the value at ``start``.
        high: the value at ``end``.
        start: in the picture's units.
        end: likewise.
        log: distances are of logarithms.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value stands, in the picture's units."""
        low, high, at = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About so many round values within the axis."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def axis(values: Iterable[float], start: float, end: float, log: bool = False) -> Scale:
    """An axis that shows values with a little room around them.

    Args:
        values: finite numbers, of which a logarithmic axis shows those above 0.
        start: in the picture's units.
        end: likewise.
        log: take logarithms, if there is a value above 0, and they spread enough to need it.
    """
    shown = list(values)
    positive = [value for value in shown if value > 0]
    log = log and len(positive) > 0 and max(positive) / min(positive) >= STEEP
    if log:
        room = (max(positive) / min(positive)) ** 0.04
        return Scale(min(positive) / room, max(positive) * room, start, end, True)
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    room = 0.05 * (high - low)
    if not room > 1e-9 * max(abs(low), abs(high)):  # all of them are the same
        room = 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    return [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, thinned out, or 1, 2 and 5 times such where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round((last - first) / count))
    ticks = [10.0**k for k in range(first, last + 1) if k % every == 0 and low <= 10.0**k <= high]
    if len(ticks) < 3:
        ticks = [f * 10.0**k for k in range(first, last + 1) for f in (1, 2, 5) if low <= f * 10.0**k <= high]
    return ticks


def short(value: float) -> str:
    """A number as it stands at an axis."""
    if value == 0:
        return "0"
    size = abs(value)
    if 1e3 <= size < 1e12:
        for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:.4g}{letter}"
    if size < 1e-4 or size >= 1e12:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "\u2212")
    return f"{value:.4g}".replace("-", "\u2212")


def figure(value: float | int | None, digits: int = 5) -> str:
    """A number as it stands in a table; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", "\u2212")
    if math.isfinite(value) and abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", "\u2212")
    return f"{value:.{digits}g}".replace("-", "\u2212")
