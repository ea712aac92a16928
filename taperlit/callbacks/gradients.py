"""What callbacks ask of gradients."""

import torch
from torch import Tensor


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
