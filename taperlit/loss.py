"""Next-token cross-entropy, as a mean or per token, that never holds the logits of a whole batch."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from taperlit.autograd import only_backward
from taperlit.errors import TaperlitError

# Below so many logits the plain loss is as fast (CPU: 1024 tokens by 2048 entries, both 14 ms; at twice as many 49 ms
# against 27), and it can do all that autograd can.
FEW_LOGITS = 2**21
# Tokens whose logits a CPU's caches hold: twice as fast as a whole batch of 2048 (10,000 entries, width 64).
CACHED_TOKENS = 512
# torch's tables of hooks that every module runs; it has no public way to ask for them.
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def chunked_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
    """Mean cross-entropy of ``head(x)`` against ``targets``, in float32.

    The tokens are taken in chunks, so that peak memory holds ``chunk_tokens * vocab_size`` logits, whatever the batch.
    A head that is just ``nn.Linear`` gets its gradients while a chunk's logits are there, in the forward pass; they
    take as much memory as the head and ``x``. Any other head (one with hooks, wrapped, sharded over processes, of
    another class) is called as a module, and called again for each chunk in the backward pass where there are several.

    Args:
        head: maps (n, d_model) to (n, vocab_size).
        x: (..., d_model).
        targets: (...) token ids; -100 does not count.
        chunk_tokens: most tokens whose logits are held at once.

    Returns:
        0-d float32 mean over the targets that count; 0 where none does.

    Raises:
        TaperlitError: in the backward pass, if it is to be differentiated itself (``create_graph=True``) and the
            gradients were made in the forward pass.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    count = (targets != -100).sum().clamp(min=1)
    return _summed(head, x, targets, chunk_tokens) / count


@torch.no_grad()
def token_losses(head: nn.Module, x: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
    """The cross-entropy of ``head(x)`` at each target, in float32 and without a graph: for evaluation.

    The head is called as a module, chunk by chunk, so that peak memory holds ``chunk_tokens * vocab_size`` logits (on a
    CPU no more than :data:`CACHED_TOKENS` rows). The mean over the targets that count is
    :func:`chunked_cross_entropy`, to float32 rounding.

    Args:
        head: maps (n, d_model) to (n, vocab_size).
        x: (..., d_model).
        targets: (...) token ids; -100 does not count.
        chunk_tokens: most tokens whose logits are held at once.

    Returns:
        (...) float32 losses in nats; 0 where the target does not count.
    """
    chunk = min(chunk_tokens, CACHED_TOKENS) if x.device.type == "cpu" else chunk_tokens
    parts = [
        _module_loss(head, part, target, "none") for part, target in _chunks(x.flatten(0, -2), targets.flatten(), chunk)
    ]
    return torch.cat(parts).view(targets.shape)


def _summed(head: nn.Module, x: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    linear = head if isinstance(head, nn.Linear) and _is_plain(head, x) else None
    if linear is not None and not (len(x) <= chunk_tokens and len(x) * linear.out_features <= FEW_LOGITS):
        chunk = min(chunk_tokens, CACHED_TOKENS) if x.device.type == "cpu" else chunk_tokens
        if _torch_has_it(linear, x):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
            loss = F.linear_cross_entropy(
                x, linear.weight, targets, linear_bias=linear.bias, reduction="sum", options=options
            )
        else:
            loss = _GradientsInForward.apply(x, targets, linear.weight, linear.bias, chunk)  # type: ignore[no-untyped-call]
        if loss.requires_grad:
            loss.register_hook(_refuse_second_order)
        return loss.float()
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for part, target in _chunks(x, targets, chunk_tokens):
        # The backward pass holds one chunk's logits in any case: making the only chunk's anew would save nothing.
        if torch.is_grad_enabled() and len(part) < len(x):
            total = total + checkpoint(_module_loss, head, part, target, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _module_loss(head, part, target)
    return total


def _chunks(x: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), targets.split(size), strict=True)


def _module_loss(head: nn.Module, x: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(head(x).float(), targets, reduction=reduction)


def _is_plain(head: nn.Linear, x: Tensor) -> bool:
    """Whether ``head(x)`` is ``F.linear`` of its weight and bias and nobody asked to see it happen.

    Hooks, an own or wrapped forward and a parametrization want the module called. float16 gradients want the loss
    scale, which only the backward pass knows.
    """
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
    return (
        type(head).forward is nn.Linear.forward
        and type(head).__call__ is nn.Module.__call__
        and not {"forward", "_call_impl"} & head.__dict__.keys()
        and head._compiled_call_impl is None
        and not any(hooks)
        and not any(getattr(every_module, name) for name in GLOBAL_HOOKS)
        and not is_parametrized(head)
        and dtype is not torch.float16
        and only_backward(x, head.weight, head.bias)
    )


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _torch_has_it(head: nn.Linear, x: Tensor) -> bool:
    """Whether ``torch.nn.functional.linear_cross_entropy`` serves: torch 2.13, on the CPU, in one precision.

    It returns bfloat16 losses for bfloat16 inputs, does not know autocast, and adds up in no fixed order on CUDA.
    """
    return (
        hasattr(torch.nn, "LinearCrossEntropyOptions")
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(p is None or p.dtype == x.dtype for p in (head.weight, head.bias))
        and not _autocast(x)
    )


def _refuse_second_order(gradient: Tensor) -> None:
    """A hook on a loss whose gradients are numbers already, which torch would take for constants."""
    if torch.is_grad_enabled():  # in a backward pass: with create_graph
        raise TaperlitError(
            "The gradients of this loss were made in the forward pass and cannot be differentiated again; take "
            "torch.nn.functional.cross_entropy of the model's logits instead."
        )


class _GradientsInForward(torch.autograd.Function):
    """Sum of the cross-entropies of ``F.linear(x, weight, bias)``, each chunk's logits made once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        shared = [
            p if p is None else p.detach().requires_grad_(need)
            for p, need in zip((weight, bias), wanted[1:], strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        of_x: list[Tensor] = []
        of_shared: list[Tensor] = []
        for part, target in _chunks(x, targets, chunk):
            part = part.detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                logits = F.linear(part, *shared)  # type: ignore[arg-type]
                loss = F.cross_entropy(logits.float(), target, reduction="sum")
            leaves = [p for p in (part, *shared) if p is not None and p.requires_grad]
            gradients = list(torch.autograd.grad(loss, leaves)) if leaves else []
            total += loss.detach()
            if wanted[0]:
                of_x.append(gradients.pop(0))
            of_shared = [a.add_(b) for a, b in zip(of_shared, gradients, strict=True)] if of_shared else gradients
        saved = iter([torch.cat(of_x), *of_shared] if wanted[0] else of_shared)
        ctx.save_for_backward(*(next(saved) if need else None for need in wanted))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias = (None if g is None else g * outer[0].to(g.dtype) for g in ctx.saved_tensors)
        return of_x, None, of_weight, of_bias, None
