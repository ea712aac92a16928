"""Steps and fractions of a run, and the two curves over them: the gate's and the learning rate's."""

import math

from taperlit.errors import TaperlitError
from taperlit.ranges import require_steps


def resolve_steps(value: int | float, max_steps: int, name: str) -> int:
    """A boundary given as steps (int) or as a fraction of the run (float), in optimizer steps.

    Raises:
        TaperlitError: negative, a fraction above 1, a fraction of a run without ``max_steps``, or beyond the run.
    """
    require_steps(name, value)
    if isinstance(value, float):
        if max_steps < 1:
            raise TaperlitError(f"{name} is a fraction of the run: set trainer.max_steps, or give {name} in steps.")
        return round(value * max_steps)
    if 0 < max_steps < value:
        raise TaperlitError(f"{name} is {value} steps, longer than the run's {max_steps} (trainer.max_steps).")
    return value


def gate_at(step: int, warmup: int, end: int, shape: str = "cosine") -> float:
    """The gate during optimizer step ``step`` (the first is 1): 1 to ``warmup``, 0 from ``end``.

    Args:
        step: counts from 1.
        warmup: last step at 1 (the paper's k_w).
        end: first step at 0 (its k_t).
        shape: ``cosine``, as in the paper, or ``linear``.
    """
    if step <= warmup:
        return 1.0
    if step >= end:
        return 0.0
    progress = (step - warmup) / (end - warmup)
    return 1.0 - progress if shape == "linear" else (1.0 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, warmup: int, total: int, floor: float, decay_start: int = 0) -> float:
    """Learning-rate factor after ``step`` finished steps: up linearly to 1, then along a cosine to ``floor``.

    Where ``decay_start`` is after the warm-up, the factor stays 1 to that step: warm-up, stable, decay.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, decay_start)
    progress = min(1.0, max(0, step - start) / max(1, total - start))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
