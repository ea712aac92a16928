"""AdamW and its learning rate: linear warm-up, then a cosine to the end of the run."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from taperlit.baselines.pointwise import Pointwise
from taperlit.schedule import warmup_cosine


class Settings(NamedTuple):
    """What the optimizer and its schedule are made with.

    Args:
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW; norms, biases and embeddings get none, but DyT's and Derf's parameters do.
        warmup: steps of the linear warm-up.
        total: step at which the cosine ends.
        min_lr_ratio: it ends at this fraction of ``lr``.
        decay_start: step at which the cosine begins, if it is after the warm-up.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: int
    total: int
    min_lr_ratio: float
    decay_start: int = 0


def build(model: nn.Module, settings: Settings, fused: bool) -> tuple[AdamW, LambdaLR]:
    """AdamW over a model's trainable parameters, with its states made already, and its schedule per optimizer step.

    Args:
        model: on its device. Its linear maps' matrices decay, those of a mixture's experts and router too, and all of a
            DyT's or Derf's; all else does not.
        settings: see :class:`Settings`.
        fused: torch's fused implementation, one pass over each parameter, for CPU and CUDA.
    """
    decay, keep = _groups(model.modules(), model.parameters())
    optimizer = AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": keep, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        fused=fused,
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            # What AdamW would make at the first gradient. Parameters that the taper leaves idle have none for long, and
            # a sharded checkpoint can only be read into an optimizer that has the same states.
            step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer, LambdaLR(optimizer, lambda step: _factor(step, settings))


def apply_settings(optimizer: Optimizer, schedule: LambdaLR, settings: Settings) -> None:
    """Let a restored optimizer and schedule go on with these settings, in place, at the step where they are.

    A checkpoint restores learning rate, betas and decay of the run that wrote it; what is asked for now would have no
    effect. With unchanged settings nothing changes, to the last bit.
    """
    lr = settings.lr * _factor(schedule.last_epoch, settings)
    for group, weight_decay in zip(optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
        group.update(lr=lr, initial_lr=settings.lr, betas=settings.betas, weight_decay=weight_decay)
    count = len(optimizer.param_groups)
    schedule.load_state_dict(
        {**schedule.state_dict(), "base_lrs": [settings.lr] * count, "_last_lr": [lr] * count},
    )


def _factor(step: int, settings: Settings) -> float:
    return warmup_cosine(step, settings.warmup, settings.total, settings.min_lr_ratio, settings.decay_start)


def _groups(
    modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that decay, and those that do not.

    By the kind of module, not by the number of dimensions: FSDP1's parameters are all flat.
    """
    modules = list(modules)
    embeddings = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    decays = {module.weight for module in modules if _is_linear(module)} - embeddings
    decays |= {p for module in modules if isinstance(module, Pointwise) for p in module.parameters(recurse=False)}
    for module in modules:  # transformers' mixtures have maps without a Linear
        own, kind = dict(module.named_parameters(recurse=False)), type(module).__name__
        if kind.endswith("Experts"):
            decays |= {p for name, p in own.items() if "bias" not in name}
        elif kind.endswith("Router"):
            decays |= {p for name, p in own.items() if name == "weight"}
    trainable = [p for p in parameters if p.requires_grad]
    return [p for p in trainable if p in decays], [p for p in trainable if p not in decays]


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D, of GPT-2, is a linear map by another name; its class would have to be imported to be asked.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
