"""Side-by-side measurements: alternatives take turns in one process, and the result is a ratio with its spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from taperlit.decode.generate import decode
from taperlit.transformer import Transformer


@dataclass(frozen=True)
class Comparison:
    """Rates of one alternative against the first.

    Args:
        name: of the alternative.
        rate: median rate, in units a second.
        ratio: median over rounds of its rate by the first's in the same round.
        low: smallest of those ratios.
        high: largest of them.
    """

    name: str
    rate: float
    ratio: float
    low: float
    high: float


def compare(alternatives: dict[str, Callable[[], int]], rounds: int = 7, warmup: int = 1) -> list[Comparison]:
    """Run alternatives in turns.

    Args:
        alternatives: by name, functions that do some work and return how many units it was.
        rounds: times that each is measured.
        warmup: times that each runs unmeasured before.

    Returns:
        A comparison each, in the order given; the first has ratio 1.
    """
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_ in range(-warmup, rounds):
        for name, work in alternatives.items():
            start = time.perf_counter()
            units = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 0:
                rates[name].append(units / (time.perf_counter() - start))
    first = next(iter(rates.values()))
    results = []
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        results.append(Comparison(name, statistics.median(values), statistics.median(ratios), min(ratios), max(ratios)))
    return results


def compare_decoding(
    models: dict[str, Transformer], prompt_tokens: int = 32, new_tokens: int = 128, batch_size: int = 1, rounds: int = 7
) -> list[Comparison]:
    """Tokens a second of greedy KV-cached decoding, prefill included.

    Args:
        models: by name, in eval mode, of one vocabulary and context.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded.
        batch_size: sequences decoded together.
        rounds: times that each is measured.

    Returns:
        A comparison each; see :func:`compare`.
    """

    def worker(model: Transformer) -> Callable[[], int]:
        prompt = torch.zeros(batch_size, prompt_tokens, dtype=torch.int64, device=model.head.weight.device)

        def work() -> int:
            return batch_size * sum(1 for _ in decode(model, prompt, new_tokens, temperature=0))

        return work

    return compare({name: worker(model) for name, model in models.items()}, rounds)
