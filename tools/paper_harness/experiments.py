"""What each experiment needs: lists of runs, or a command of ours."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paper_harness.ideas import OURS
from paper_harness.runs import POLICIES, Run
from paper_harness.sizes import SIZES

FIVE = ("baseline", "internal", "internal_aux", "all", "all_aux")
"""The variants of the paper's figure 4."""
PEERS = ("fakeln", "dyt", "derf")
"""Other ways to a model without norms."""
DRAW_LRS = (3e-4, 4e-3)
"""Least and most of ``short``'s learning rates."""


@dataclass(frozen=True)
class Options:
    """What was asked for; None is the size's own.

    Args:
        size: name in ``SIZES``.
        corpus: name in ``CORPORA``.
        seeds: of all but ``short``; ``schedule`` takes the first.
        lengths: of ``length``, ``ideas`` and ``ours``, in tokens per parameter.
        tokens_per_parameter: of ``pretrain`` and its views, and of ``ideas``.
        lr: peak learning rate of all runs but the map of ``schedule``, which has multiples of it, ``short``, and the
            plain size in ``ours``, which keeps its own.
        variants: none but these, and the baseline.
        ideas: of ``ideas`` and ``short``, names in ``IDEAS``; None is the size's, and of ``short`` none.
    """

    size: str = "nano"
    corpus: str = "gcide"
    seeds: tuple[int, ...] | None = None
    lengths: tuple[float, ...] | None = None
    tokens_per_parameter: float | None = None
    lr: float | None = None
    variants: tuple[str, ...] | None = None
    ideas: tuple[str, ...] | None = None

    def run(self, variant: str, seed: int, length: float, lr: float | None = None, **method: Any) -> Run:
        """A run of these options."""
        return Run(self.size, self.corpus, variant, seed, length, lr or self.lr, method)

    def pick(self, variants: Sequence[str]) -> list[str]:
        """Those of the variants that were asked for."""
        return [v for v in variants if self.variants is None or v == "baseline" or v in self.variants]

    def pick_seeds(self) -> tuple[int, ...]:
        """Those that were asked for, or the size's."""
        return SIZES[self.size].seeds if self.seeds is None else self.seeds


def pretrain(options: Options, variants: Sequence[str] = tuple(POLICIES)) -> list[Run]:
    """All variants, paired by seed, at one length."""
    length = options.tokens_per_parameter or SIZES[options.size].tokens_per_parameter
    return [options.run(v, seed, length) for seed in options.pick_seeds() for v in options.pick(variants)]


def views(options: Options) -> list[Run]:
    """``pretrain``'s runs of the paper's five variants."""
    return pretrain(options, FIVE)


def length(options: Options) -> list[Run]:
    """The gap against tokens per parameter."""
    lengths = options.lengths or SIZES[options.size].lengths
    variants = options.pick(("baseline", "internal_aux", "all_aux"))
    return [options.run(v, seed, each) for seed in options.pick_seeds() for each in lengths for v in variants]


def schedule(options: Options) -> list[Run]:
    """Where runs diverge: warm-up by end at each learning rate, then the other settings one at a time.

    All at one seed; the baseline of each learning rate is beside them.
    """
    size, seed = SIZES[options.size], options.pick_seeds()[0]
    base = options.lr or size.lr
    variants = [v for v in options.pick(("baseline", "all_aux", "internal_aux")) if v != "baseline"]
    grid = [(warmup, end) for warmup, end in itertools.product(size.warmups, size.ends) if end > warmup]
    found = []
    for lr in (base * factor for factor in size.lrs):
        found.append(options.run("baseline", seed, size.schedule_tokens, lr))
        for variant, (warmup, end) in itertools.product(variants, grid):
            found.append(options.run(variant, seed, size.schedule_tokens, lr, warmup=warmup, end=end))
    for variant, (name, values) in itertools.product(variants, size.others.items()):
        found += [options.run(variant, seed, size.schedule_tokens, base, **{name: value}) for value in values]
    return found


def ideas(options: Options) -> list[Run]:
    """Each idea and the paper's own settings, paired by seed, at one length or several."""
    size = SIZES[options.size]
    lengths = options.lengths or (options.tokens_per_parameter or size.tokens_per_parameter,)
    variants = options.pick(("baseline", "internal_aux", "all_aux"))
    names = (None, *(size.ideas if options.ideas is None else options.ideas))
    return [
        Run(options.size, options.corpus, variant, seed, each, options.lr, idea=idea)
        for seed, each, idea, variant in itertools.product(options.pick_seeds(), lengths, names, variants)
    ]


def ours(options: Options) -> list[Run]:
    """Ours and its baseline, and beside them the paper's own settings in the plain model of the same size; at the first
    length its peers too."""
    size = SIZES[options.size]
    variants = options.pick(("baseline", "internal_aux", "all_aux"))
    lengths = options.lengths or size.lengths[-2:]
    found = []
    for seed, each in itertools.product(options.pick_seeds(), lengths):
        found += [Run(options.size, options.corpus, v, seed, each, options.lr, idea=OURS) for v in variants]
        if each == lengths[0]:
            found += [options.run(v, seed, each) for v in options.pick(PEERS)]
        if size.plain is not None:
            found += [Run(size.plain, options.corpus, v, seed, each) for v in variants]
    return found


def short(options: Options) -> list[Run]:
    """Runs as users begin them: short ones of any length, learning rate and corpus, drawn at random but each always the
    same, with the paper's own settings and with each idea that is named.

    Steps and learning rate are uniform in their logarithms.
    """
    size = SIZES[options.size]
    found = []
    for draw in range(size.draws):
        dice = random.Random(draw)
        steps, lr = (math.exp(dice.uniform(math.log(low), math.log(high))) for low, high in (size.draw_steps, DRAW_LRS))
        corpus = dice.choice(size.draw_corpora)
        length = round(steps * size.tokens_per_step / size.parameters, 3)
        for idea in (None, *(options.ideas or ())):
            for variant in options.pick(("baseline", "internal_aux", "all_aux")):
                found.append(Run(options.size, corpus, variant, draw, length, float(f"{lr:.2g}"), idea=idea, draw=draw))
    return found


EXPERIMENTS: dict[str, Callable[[Options], list[Run]]] = {
    "pretrain": pretrain,
    "length": length,
    "gradnorm": views,
    "logit_chasing": views,
    "schedule": schedule,
    "ideas": ideas,
    "ours": ours,
    "short": short,
}
"""Those that are made of runs; see :mod:`paper_harness.commands` for the others."""
