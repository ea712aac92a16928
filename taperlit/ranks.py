"""What the processes of a run ask of each other; every process must ask."""

from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from taperlit.sharding import total_norm

T = TypeVar("T")


def data_rank(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's number among those that see different data, and how many these are.

    Processes that share one model by tensor parallelism see the same.
    """
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None) if trainer else None
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


def mean_over_ranks(trainer: L.Trainer, value: Tensor) -> Tensor:
    """The value averaged over all processes."""
    return trainer.strategy.reduce(value, reduce_op="mean")


def gather(value: T) -> list[T]:
    """Every process's value (a Python object), by rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gradient_norms(trainer: L.Trainer, groups: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The 2-norm of each group of gradients, 0-d, however the strategy spreads them; a group without any has 0."""
    device = trainer.strategy.root_device
    norms = torch.stack([total_norm(gradients).to(device) for gradients in groups.values()])
    if isinstance(trainer.strategy, FSDPStrategy):  # FSDP1's gradients are plain tensors, each rank's own part
        norms = trainer.strategy.reduce(norms.square(), reduce_op="sum").sqrt()
    return dict(zip(groups, norms, strict=True))
