"""What the processes of a run ask of each other; FSDP2 and tensor parallelism, applied to our transformer from outside.

A tensor may be spread over processes (DTensor); code that asks here need not care whether it is.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.transformer import Transformer

T = TypeVar("T")


WHOLE_INPUT = (Replicate(), None)  # of Attention.forward: x is on every process, the rest no matter
# Heads and MLP channels are split over the processes; the norms and the residual stream are whole on each. Naming the
# input of the whole layer, and not of each projection, takes one all-reduce in the backward pass and not three.
BLOCK_PLAN = {
    "attn": PrepareModuleInput(input_layouts=WHOLE_INPUT, desired_input_layouts=WHOLE_INPUT),
    "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
    "attn.q_proj": ColwiseParallel(),
    "attn.k_proj": ColwiseParallel(),
    "attn.v_proj": ColwiseParallel(),
    "attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}
# Both split the vocabulary, so that a tied matrix is split once.
MODEL_PLAN = {
    "tok_embed": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm of all tensors taken together, 0-d; every process must ask.

    Those of one mesh are taken in one go: torch cannot mix meshes, as FSDP2 with tensor parallelism does.
    """
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in groups.values()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


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


def keep_buffers_float32(trainer: L.Trainer) -> None:
    """Call in ``setup``: FSDP1's mixed precision would round every buffer, the gate and the statistics among them."""
    if isinstance(trainer.strategy, FSDPStrategy) and trainer.strategy.mixed_precision_config is not None:
        config = trainer.strategy.mixed_precision_config
        trainer.strategy.mixed_precision = dataclasses.replace(config, buffer_dtype=torch.float32)


def reshard(trainer: L.Trainer) -> None:
    """Let each process hold its own part of every parameter again.

    After a pass without gradients, a validation's say, FSDP2 leaves those of the outermost module gathered. What is
    written to them then is lost, and they are other objects than the optimizer's.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        for module in cast(nn.Module, trainer.strategy.model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole_parameters(trainer: L.Trainer) -> AbstractContextManager:
    """Parameters may be copied into each other here: FSDP1's parts of two of them need not match."""
    reshard(trainer)
    if isinstance(trainer.strategy, FSDPStrategy):
        return FullyShardedDataParallel.summon_full_params(cast(nn.Module, trainer.strategy.model))
    return nullcontext()


def parallelize(model: Transformer | CausalLM, mesh: DeviceMesh) -> None:
    """Split a language model over the processes of Lightning's ``ModelParallelStrategy``, in place.

    Args:
        model: whole and with its initial values, which stay those of a run on one process.
        mesh: with the dimensions ``data_parallel`` (FSDP2) and ``tensor_parallel``.

    Raises:
        TaperlitError: heads, MLP channels or vocabulary cannot be split evenly, or a pretrained model is to be split
            by tensor parallelism.
    """
    tensor_mesh = mesh["tensor_parallel"]
    if tensor_mesh.size() > 1:
        if not isinstance(model, Transformer):
            raise TaperlitError(
                "Tensor parallelism knows our own transformer only; set strategy.tensor_parallel_size to 1 to train a "
                "pretrained model."
            )
        _split(model, tensor_mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def _split(model: Transformer, mesh: DeviceMesh) -> None:
    for name in ("n_head", "n_kv_head", "d_ff", "vocab_size"):
        if (size := getattr(model.config, name)) % mesh.size():
            raise TaperlitError(
                f"{name} {size} is not a multiple of the strategy's tensor_parallel_size {mesh.size()}."
            )
    for block in model.blocks:
        plan = {name: style for name, style in BLOCK_PLAN.items() if _has(block, name)}
        parallelize_module(block, mesh, plan)
    tied = model.head.weight is model.tok_embed.weight
    parallelize_module(model, mesh, MODEL_PLAN)
    # torch.compile takes a collective's unfinished output for a plain tensor, and its gradients are then wrong; any
    # operation on it waits.
    model.tok_embed.register_forward_hook(lambda module, args, output: output.clone())
    if tied:
        model.head.weight = model.tok_embed.weight


def _has(module: nn.Module, name: str) -> bool:
    try:
        return module.get_submodule(name) is not None
    except AttributeError:
        return False
