"""A short measurement: which of some alternatives is fastest here."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=str)

SECONDS = 0.01  # for each alternative, so that building an engine takes no time that a user sees
TURNS = 5


def fastest(alternatives: Mapping[Name, Callable[[], Any]], device: torch.device) -> Name:
    """Run alternatives in turns for a hundredth of a second each.

    Args:
        alternatives: by name, functions that do the same work.
        device: that they work on; it is waited for.

    Returns:
        The name whose fastest turn was fastest.
    """

    def seconds(work: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once = {name: max(min(seconds(work, 1) for _ in range(3)), 1e-7) for name, work in alternatives.items()}
    times = max(1, round(SECONDS / TURNS / max(once.values())))
    best = {name: float("inf") for name in alternatives}
    for _ in range(TURNS):
        for name, work in alternatives.items():
            best[name] = min(best[name], seconds(work, times))
    return min(best, key=lambda name: best[name])
