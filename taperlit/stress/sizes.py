"""How much a stress test runs, and which tokens it takes where it cannot take all."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BRIEF_FLOPS = 1e11  # of the passes of each case: a few seconds on two CPU cores


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Args:
        singles: tokens tried as contexts of one token; None is the whole vocabulary.
        tokens: of each case of longer contexts, at most (but for one context).
        steps: of decoding with a cache, at most.
        length: of the longest context; None is the model's own.
        lengths: try contexts of all lengths.
    """

    singles: int | None = None
    tokens: int = 1 << 16
    steps: int = 1024
    length: int | None = None
    lengths: bool = True


FULL = Sizes()
QUICK = Sizes(singles=1 << 12, tokens=1 << 13, steps=64)


def brief_sizes(model: nn.Module) -> Sizes:
    """What takes no more than a few seconds, whatever the model's size."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens = int(min(max(BRIEF_FLOPS / (2 * max(parameters, 1)), 64), 1 << 12))
    return Sizes(singles=tokens, tokens=tokens, steps=0, length=min(128, max(tokens // 8, 8)), lengths=False)


def spread_lengths(longest: int, tokens: int) -> list[int]:
    """Lengths from 1 to ``longest``: all where they add up to no more than ``tokens``, else as many as do.

    The first ones, those around the powers of two, where kernels change, and the last two always are among them.
    """
    if longest * (longest + 1) // 2 <= tokens:
        return list(range(1, longest + 1))
    powers = [1 << k for k in range(longest.bit_length())]
    first = {*range(1, 9), *(p + d for p in powers for d in (-1, 0, 1)), longest - 1, longest}
    chosen = {length for length in first if 1 <= length <= longest}
    more = max(0, (tokens - sum(chosen)) * 2 // (longest + 1))  # of a mean length of half the longest
    if more:
        chosen |= {round(1 + k * (longest - 1) / more) for k in range(more)}
    return sorted(chosen)


def cache_runs(longest: int, steps: int) -> list[tuple[int, int]]:
    """Prompts' lengths and the steps after each, so that the cache has all lengths, or as many as there are steps."""
    if longest - 1 <= steps:
        return [(1, longest - 1)]
    each = min(4, longest - 1)
    count = max(2, steps // each)
    starts = {1 + round(k * (longest - 1 - each) / (count - 1)) for k in range(count)}
    return [(start, each) for start in sorted(starts)]


def likeliest_tokens(model: nn.Module, vocab_size: int, count: int | None, generator: torch.Generator) -> Tensor:
    """Token ids to try one by one, (n,) int64: all, or half those with the longest embeddings and half at random.

    A token that explodes mostly begins large. The embedding is the first table with a row per token, if there is any.
    """
    if count is None or count >= vocab_size:
        return torch.arange(vocab_size)
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= vocab_size)
    table = next(tables, None)
    shuffled = torch.randperm(vocab_size, generator=generator)
    if table is None or table.is_meta:
        return shuffled[:count]
    lengths = torch.linalg.vector_norm(table.detach()[:vocab_size].float(), dim=-1).nan_to_num(torch.inf)
    longest = lengths.topk((count + 1) // 2).indices.cpu()
    rest = shuffled[~torch.isin(shuffled, longest)]
    return torch.cat((longest, rest[: count - len(longest)]))
