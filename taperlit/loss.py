"""Next-token cross-entropy that never holds the logits of a whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _sum_of_losses(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


def chunked_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
    """Mean cross-entropy of ``head(x)`` against ``targets``, in float32.

    The tokens are taken in chunks; each chunk's logits are dropped after the forward pass and computed again in the
    backward pass, so peak memory holds ``chunk_tokens * vocab_size`` logits, whatever the batch.

    Args:
        head: maps (n, d_model) to (n, vocab_size).
        x: (..., d_model).
        targets: (...) token ids; -100 does not count.
        chunk_tokens: tokens a chunk.

    Returns:
        0-d float32 mean over the targets that count; 0 where none does.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for part, target in zip(x.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(
                _sum_of_losses, head, part, target, use_reentrant=False, preserve_rng_state=False
            )
        else:
            total = total + _sum_of_losses(head, part, target)
    return total / (targets != -100).sum().clamp(min=1)
