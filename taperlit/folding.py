"""Fold norms whose gate is 0 into the linear maps they feed (arXiv:2602.10408, section 3).

``c h P D W = h W'`` with ``W' = c P D W``, and the bias ``beta~ W + b``; ``P`` centres in the LayerNorm kind and is the
identity in the RMSNorm kind. Computed in float64, stored in the weights' own dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from taperlit.consumers import Consumer, Feeds, find_consumers
from taperlit.errors import TaperlitError
from taperlit.norm import Affine, Phase, TaperNorm, shared_gate
from taperlit.surgery import require_tapered

TOLERANCE = 1e-3  # largest relative difference of outputs before and after folding that is still rounding


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that is gone.

    Args:
        name: of the norm.
        consumers: names of the weights that absorbed it.
        parameters: how many the norm had.
        scale: it was replaced by an explicit affine map and not absorbed.
    """

    name: str
    consumers: tuple[str, ...]
    parameters: int
    scale: bool = False

    def __str__(self) -> str:
        if self.scale:
            return f"{self.name} -> kept as an explicit scale"
        return f"{self.name} -> {', '.join(self.consumers)}"


@torch.no_grad()
def fold(model: nn.Module, run: Callable[[], object], *, tied: Literal["untie", "scale"] = "untie") -> list[FoldedNorm]:
    """Fold every TaperNorm of a model, in place. Nothing is changed if any of them cannot be folded.

    Args:
        model: its gate must be 0.
        run: runs the model once, so that what each norm feeds is seen and not guessed.
        tied: what to do with a norm whose consumer's matrix is used elsewhere too (a head tied to the embedding):
            give the consumer a copy of its own, or keep the norm's map as an explicit scale.

    Returns:
        What was folded into what.

    Raises:
        TaperlitError: the gate is not 0, or a norm feeds something that is not a linear map (the norm is named).
    """
    norms = require_tapered(model, "fold")
    check_gate(model)
    feeds = find_consumers(model, run)
    for name, feed in feeds.items():
        _check_foldable(name, feed)
    folded = []
    for name, norm in norms.items():
        parameters = sum(p.numel() for p in norm.parameters(recurse=False))
        consumers = feeds[name].consumers
        scale = bool(feeds[name].shared) and tied == "scale"
        if scale:
            replacement = _explicit(norm)
        else:
            for weight in feeds[name].shared:
                _untie(model, weight)
            for consumer in consumers:
                _absorb(model, norm, consumer)
            replacement = nn.Identity()
        model.set_submodule(name, replacement.train(norm.training))
        folded.append(FoldedNorm(name, tuple(c.weight for c in consumers), parameters, scale))
    return folded


def check_gate(model: nn.Module) -> None:
    """Refuse a model whose gate is not 0.

    Raises:
        TaperlitError: names the gate's value.
    """
    gate = shared_gate(model)
    if gate.phase is not Phase.LINEAR:
        raise TaperlitError(
            f"The gate is {gate.value.item():.6g}, not 0: the norms are still in use. "
            "Train to the end of the taper before folding."
        )


def _check_foldable(name: str, feed: Feeds) -> None:
    if not feed.consumers and not feed.others:
        raise TaperlitError(
            f"{name} did not run in the forward pass, so what it feeds is unknown; it cannot be folded."
        )
    if feed.others:
        kinds = ", ".join(dict.fromkeys(feed.others))
        raise TaperlitError(
            f"{name} feeds something that is not a linear map of its own ({kinds}), so it cannot be folded; "
            "leave it untapered."
        )


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    module, _, leaf = parameter.rpartition(".")
    return model.get_submodule(module), leaf


def _untie(model: nn.Module, weight: str) -> None:
    module, leaf = _owner(model, weight)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))


def _absorb(model: nn.Module, norm: TaperNorm, consumer: Consumer) -> None:
    module, leaf = _owner(model, consumer.weight)
    parameter = getattr(module, leaf)
    weight = parameter.double().T if consumer.transposed else parameter.double()  # (d_out, d_in)
    gain, bias = norm.linear_map()
    folded = weight * gain
    if norm.centred:
        folded = folded - folded.mean(dim=1, keepdim=True)
    if bias is not None:
        _, bias_leaf = _owner(model, consumer.bias)
        old = getattr(module, bias_leaf, None)
        new = (weight @ bias + (0 if old is None else old.double())).to(parameter.dtype)
        setattr(module, bias_leaf, nn.Parameter(new, requires_grad=parameter.requires_grad))
    parameter.copy_(folded.T if consumer.transposed else folded)


def _explicit(norm: TaperNorm) -> Affine:
    gain, bias = norm.linear_map()
    reference = norm.taper_weight if norm.taper_weight is not None else norm.alignment
    module = Affine(math.prod(norm.normalized_shape), norm.centred).to(reference.device, reference.dtype)
    module.weight.copy_(gain)
    if bias is not None:
        module.bias.copy_(bias)
    return module


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest ``|a - b|`` relative to the largest ``|a|``, in float64."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
