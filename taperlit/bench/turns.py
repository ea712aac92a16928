"""Alternatives take turns in one process, and what is told is the ratio of the same round with its spread.

A machine's speed drifts; two alternatives measured one after the other are compared with its drift as well. In turns
each round sees about the same machine, and the spread over the rounds says how true that was.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """The median of some values, and how far they lie apart.

    Args:
        median: of the values.
        low: smallest of them.
        high: largest of them.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of some values."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], first: Sequence[float]) -> Spread:
    """The spread of ``values`` by ``first``, each by the value of the same round."""
    return spread([value / base for value, base in zip(values, first, strict=True)])


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long some work takes; on a GPU until its last kernel is done."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    works: Mapping[str, Callable[[], Result]], rounds: int = 7, warmup: int = 1, pause: float = 0.0
) -> dict[str, list[Result]]:
    """Let alternatives take turns, in another order each round.

    What one leaves behind, in caches or in threads that are still awake, then does not always meet the same one.

    Args:
        works: by name, functions that do some work and return what they measured of it.
        rounds: times that the results of each are kept.
        warmup: times that each runs before.
        pause: seconds before each turn.

    Returns:
        The results of each, by round.
    """
    results: dict[str, list[Result]] = {name: [] for name in works}
    for turn in range(-warmup, rounds):
        for name in random.Random(turn).sample(list(works), len(works)):
            time.sleep(pause)
            result = works[name]()
            if turn >= 0:
                results[name].append(result)
    return results
