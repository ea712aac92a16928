"""Numbers that a user gives, checked where they enter: NaN and infinity are in no range."""

import math

from taperlit.errors import TaperlitError


def require_range(
    name: str,
    value: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    mend: str = "",
) -> None:
    """Refuse a number that is not finite or lies outside its range.

    Args:
        name: of the option, as the user writes it: ``model.lr``, ``TaperMonitor.every``.
        value: None is not checked: the option was left out.
        least: the smallest value that is allowed.
        above: allowed values are larger than this.
        most: the largest value that is allowed.
        below: allowed values are smaller than this.
        mend: what to do instead, added to the error.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    if value is None:
        return
    inside = (
        (isinstance(value, int) or math.isfinite(value))
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not inside:
        words = [("at least", least), ("above", above), ("at most", most), ("below", below)]
        bounds = " and ".join(f"{word} {bound:,}" for word, bound in words if bound is not None)
        raise TaperlitError(f"{name} is {value}; it must be {bounds or 'a finite number'}{mend and f': {mend}'}.")


def require_steps(name: str, value: int | float | None, *, least: int = 0) -> None:
    """Refuse what is neither a number of steps (int) nor a fraction of a run (float), whatever the run's length.

    What depends on it is checked where it is known, by :func:`taperlit.schedule.resolve_steps`.

    Args:
        name: of the option, as the user writes it: ``GateSchedule.warmup``.
        value: None is not checked: the option was left out.
        least: the smallest number of steps that is allowed; with 1 or more, a fraction must be above 0.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    if isinstance(value, float):
        bounds = {"above": 0} if least else {"least": 0}
        require_range(name, value, **bounds, most=1, mend="a fraction of the run, as steps are integers")
    else:
        require_range(name, value, least=least)


LARGEST_SEED = 2**32 - 1  # numpy's; torch takes more


def require_seed(name: str, value: int | None) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    require_range(name, value, least=0, most=LARGEST_SEED)
