"""FSDP2 and tensor parallelism, applied to our transformer from outside."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer

WHOLE_INPUT = (Replicate(), None, None, None, None)  # of Attention.forward: x is on every process, the rest no matter
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


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Split a transformer over the processes of Lightning's ``ModelParallelStrategy``, in place.

    Args:
        model: whole and with its initial values, which stay those of a run on one process.
        mesh: with the dimensions ``data_parallel`` (FSDP2) and ``tensor_parallel``.

    Raises:
        TaperlitError: heads, MLP channels or vocabulary cannot be split evenly.
    """
    tensor_mesh = mesh["tensor_parallel"]
    if tensor_mesh.size() > 1:
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
