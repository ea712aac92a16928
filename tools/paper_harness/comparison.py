"""Runs that share all but variant and seed, compared seed by seed."""

import math
from collections.abc import Callable, Iterable

from paper_harness.records import BASELINE, Setup, StoredRun, grouped, seeds_of, title, variants_of, without_doubles
from paper_harness.statistics import Estimate, estimate, relative_gaps


class Comparison:
    """The runs of one setup and one length.

    Args:
        runs: of equal ``setup`` and ``length``, at most one per variant and seed.
    """

    def __init__(self, runs: list[StoredRun]) -> None:
        self.runs = runs
        self.setup: Setup = runs[0].setup
        self.length: float = runs[0].length
        self.variants = variants_of(runs)
        self.seeds = seeds_of(runs)
        self._table = {(run.variant, run.seed): run for run in runs}

    def run(self, variant: str, seed: int) -> StoredRun | None:
        """One run, if it was done."""
        return self._table.get((variant, seed))

    def of(self, variant: str) -> list[StoredRun]:
        """The runs of a variant by seed, diverged ones too."""
        return [run for seed in self.seeds if (run := self.run(variant, seed)) is not None]

    def arrived(self, variant: str) -> list[StoredRun]:
        """Those that came to their end."""
        return [run for run in self.of(variant) if run.arrived]

    def lost(self, variant: str) -> list[StoredRun]:
        """Those that diverged."""
        return [run for run in self.of(variant) if not run.arrived]

    def gaps(self, variant: str) -> dict[int, float]:
        """The loss over the baseline's of the same seed, less 1, by seed."""
        losses = {name: {run.seed: run.loss for run in self.arrived(name)} for name in (variant, BASELINE)}
        return relative_gaps(losses[variant], losses[BASELINE])

    def ratios(self, variant: str, figure: Callable[[StoredRun], float | None]) -> Estimate | None:
        """A figure over the baseline's of the same seed: its mean over the seeds that both have."""
        values = []
        for run in self.arrived(variant):
            other = self.run(BASELINE, run.seed)
            if other is None or not other.arrived:
                continue
            own, base = figure(run), figure(other)
            if own is not None and base:
                values.append(own / base)
        return estimate(values)

    def mean(self, variant: str, figure: Callable[[StoredRun], float | None]) -> Estimate | None:
        """The mean of a figure over the runs that arrived and have it."""
        return estimate(value for run in self.arrived(variant) if (value := figure(run)) is not None)

    def heading(self) -> str:
        """What was run, and how long."""
        some = next((run for run in self.runs if run.result.get("tokens")), None)
        text = f"{self.setup.title()}, {self.length:g} tokens per parameter"
        if some is None:
            return text
        return (
            f"{text} ({some.result['parameters']:,} parameters, {some.result['tokens']:,} tokens, {some.steps:,} steps)"
        )

    def fates(self, where: str = "") -> list[str]:
        """A line on the runs that diverged, by name, if any did; ``where`` says which these are."""
        told = []
        for variant in self.variants:
            if lost := self.lost(variant):
                each = "; ".join(f"seed {run.seed} {run.fate}" for run in lost)
                told.append(f"{title(variant)} {len(lost)} of {len(self.of(variant))} ({each})")
        return [f"Diverged{where}: {'; '.join(told)}.", ""] if told else []


def compare(runs: Iterable[StoredRun]) -> tuple[list[Comparison], list[str]]:
    """The runs by setup and length, the largest comparison first, and a line on runs left out for newer ones."""
    picked = without_doubles(runs)
    comparisons = [Comparison(own) for own in grouped(picked.runs, lambda run: (run.setup, run.length)).values()]
    return comparisons, left_out(picked.superseded)


def left_out(superseded: list[StoredRun]) -> list[str]:
    """A line that names the runs that newer ones stand for, if there are any."""
    if not superseded:
        return []
    return [f"Left out, since a newer run has the same cell: {', '.join(sorted(run.key for run in superseded))}.", ""]


def finite(value: float | None) -> bool:
    """Whether there is a value, and it is a number."""
    return value is not None and math.isfinite(value)
