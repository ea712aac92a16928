"""Which norms of a model only linear maps read: what can be tapered, if it is to be folded later."""

import copy
from functools import partial

import torch
from torch import nn

from taperlit.compare import Run, in_a_line, outputs_of
from taperlit.conflicts import resolve
from taperlit.consumers import Watch
from taperlit.errors import TaperlitError
from taperlit.folding import places_of_a_bias
from taperlit.hub.causal_lm import CausalLM
from taperlit.surgery import known_norms, taper

PROBED_BLOCKS = 4
"""Blocks that are looked at, and more where a later one has norms that none of these has."""


def other_readers(model: nn.Module, run: Run) -> dict[str, list[str]]:
    """What reads each TaperNorm of a model besides linear maps that can absorb it.

    Args:
        model: tapered, at any gate.
        run: runs it once, see :func:`taperlit.fold`.

    Returns:
        By the norm's name; an empty list is a norm that folds.

    Raises:
        TaperlitError: a norm did not run, or the run does not in float64.
    """
    watch = Watch(model)
    try:
        outputs_of(model, partial(watch.returned, run), lambda: [watch.watching()])
    except TaperlitError:
        raise
    except Exception as error:  # whatever a stranger's forward raises
        raise TaperlitError(
            f"{type(model).__name__} does not run in float64, where folding is checked ({in_a_line(error)})."
        ) from error
    readers = {}
    for name, feed in resolve(watch).items():
        shared = [weight for weight, separable in feed.shared.items() if not separable]
        bare = [
            f"{watch.name_of(product.weight, product.module)}, which has no bias to take the norm's"
            for product in feed.products
            if product.bias is None and watch.has_bias(product) and not places_of_a_bias(model, watch, product)
        ]
        readers[name] = [*feed.others, *shared, *bare] or ([] if feed.products else ["nothing"])
    return readers


def foldable_norms(model: CausalLM, bias: bool = False) -> tuple[list[str], dict[str, list[str]]]:
    """The norms in the blocks of a pretrained model that can be folded, found by watching a copy of its first blocks.

    Args:
        model: plain, with its weights; it stays as it is.
        bias: as they are to be tapered, see :func:`taperlit.taper`.

    Returns:
        The names of the norms that fold, and, of the others, the names in a block with what reads them.
    """
    prefix = f"lm.{model.names.blocks}."
    first: dict[str, int] = {}  # the first block that has a norm of a name
    for name in known_norms(model):
        if name.startswith(prefix):
            block, _, place = name.removeprefix(prefix).partition(".")
            first[place] = min(int(block), first.get(place, int(block)))
    probe = _first_blocks(model, max([PROBED_BLOCKS, *(block + 1 for block in first.values())]))
    taper(probe, [f"{prefix}*"], bias=bias)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (1, 8), generator=generator)
    places: dict[str, list[str]] = {}  # a norm's name in its block, and what else reads it in any
    for name, others in other_readers(probe, lambda: probe(tokens)).items():
        places.setdefault(name.removeprefix(prefix).partition(".")[2], []).extend(others)
    known = {name for name, _ in model.named_modules()}
    names = [f"{prefix}{i}.{place}" for i in range(len(model.blocks)) for place, others in places.items() if not others]
    return [name for name in names if name in known], {
        place: list(dict.fromkeys(others)) for place, others in places.items() if others
    }


def _first_blocks(model: CausalLM, count: int) -> CausalLM:
    """A float32 copy of a model with its first blocks alone, which weighs little more than its embedding."""
    blocks = model.blocks
    every = dict(blocks._modules)
    blocks._modules = dict(list(every.items())[:count])
    try:
        return copy.deepcopy(model).float().eval()
    finally:
        blocks._modules = every
