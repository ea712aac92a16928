"""What callbacks ask of gradients."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from taperlit.distributed import local


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer would change anything.

    It would not where ``training_step`` returned None for every micro-batch, or where a guard took the gradients away.
    That is no step, and its statistics do not count.
    """
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def numbers(tensor: Tensor) -> Tensor:
    """The numbers that a gradient stores: itself, or of a sparse one (``nn.Embedding(sparse=True)``) the rows it has.

    Their norms are the gradient's, and one of them is not finite exactly where one of the gradient's is not.
    """
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor


def any_bad(tensors: Iterable[Tensor | None], order: float = math.inf) -> Tensor | bool:
    """Whether any number in this process's part of the tensors is not finite: a 0-d tensor, so that nothing waits.

    It is so exactly with the infinity norm; another order may overflow.
    """
    parts = [numbers(local(tensor)) for tensor in tensors if tensor is not None]
    parts = [part for part in parts if part.numel() and (part.is_floating_point() or part.is_complex())]
    return ~torch.nn.utils.get_total_norm(parts, order).isfinite() if parts else False
