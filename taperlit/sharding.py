"""Tensors that are spread over processes (DTensor), for code that must not care whether they are."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    """A parameter's or module's name without the marks of the wrappers around it (FSDP1)."""
    return name.replace("_fsdp_wrapped_module.", "")


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm of all tensors taken together, 0-d; every process must ask.

    Those of one mesh are taken in one go: torch cannot mix meshes, as FSDP2 with tensor parallelism does.
    """
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in groups.values()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
