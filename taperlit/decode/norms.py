"""What a norm is when a model decodes: a normalization, a linear map, a blend of them, or nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taperlit.baselines.fakeln import FakeLN
from taperlit.decode.clock import fastest
from taperlit.errors import TaperlitError
from taperlit.norm import Affine, TaperNorm

RmsForm = Literal["fused", "composed"]
"""``fused`` is :func:`torch.nn.functional.rms_norm`, one kernel on a GPU and when compiled, but six operations behind
one name on an eager CPU; ``composed`` is four: the vector's length, a hypotenuse, a division and the gain."""


@dataclass(frozen=True)
class FusedRmsNorm:
    """``y = x / sqrt(mean(x^2) + eps) * weight``, by torch's own function."""

    weight: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the rows of ``x`` (N, d_model)."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass(frozen=True)
class ComposedRmsNorm:
    """The same as ``y = x / hypot(||x||, root) * scale``.

    Args:
        scale: (d_model,) ``weight * sqrt(d_model)``.
        root: 0-d float32 ``sqrt(d_model * eps)``.
    """

    scale: Tensor
    root: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the rows of ``x`` (N, d_model), by a float32 length."""
        if x.dtype is torch.float32:  # the casts of the other line would cost a tenth of it
            return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.root) * self.scale
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self.root)).to(x.dtype) * self.scale


@dataclass(frozen=True)
class LayerNorm:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, by torch's one kernel."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize the rows of ``x`` (N, d_model)."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class LinearMap:
    """A tapered norm at ``g = 0`` that was not folded: ``y = x P * scale + bias`` with ``P`` the centring, if any."""

    scale: Tensor
    bias: Tensor | None
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Map the rows of ``x`` (N, d_model)."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * self.scale if self.bias is None else torch.addcmul(self.bias, x, self.scale)


Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Blend:
    """A norm on its way: ``y = gate * norm(x) + (1 - gate) * linear(x)``."""

    norm: Norm
    linear: LinearMap
    gate: float

    def __call__(self, x: Tensor) -> Tensor:
        """Map the rows of ``x`` (N, d_model)."""
        return torch.lerp(self.linear(x), self.norm(x), self.gate)


def read_norm(name: str, module: nn.Module, like: Tensor, form: RmsForm) -> Norm | None:
    """How the engine computes one norm of a model.

    Args:
        name: of the norm, for the error.
        module: a torch norm, a TaperNorm of ours, an :class:`taperlit.norm.Affine`, or the identity that folding
            leaves.
        like: (N, d_model) rows such as it will see; gives device and dtype.
        form: how an RMSNorm is computed.

    Returns:
        The norm, or None where nothing is left of it.

    Raises:
        TaperlitError: it is something else.
    """

    def cast(tensor: Tensor | None, times: Tensor | float = 1.0, plus: float = 0.0) -> Tensor | None:
        return None if tensor is None else ((tensor.detach().double() + plus) * times).to(like)

    def normalization(weight: Tensor | None, bias: Tensor | None, eps: float | None, centred: bool) -> Norm:
        eps = torch.finfo(like.dtype).eps if eps is None else eps
        return LayerNorm(weight, bias, eps) if centred else rms_norm(weight, eps, like, form)

    if type(module) is nn.Identity:
        return None
    if isinstance(module, Affine):
        return LinearMap(module.weight.detach().to(like), cast(module.bias), module.centred)
    if isinstance(module, nn.RMSNorm | nn.LayerNorm) and type(module) in (nn.RMSNorm, nn.LayerNorm):
        centred = isinstance(module, nn.LayerNorm)
        return normalization(cast(module.weight), cast(getattr(module, "bias", None)), module.eps, centred)
    if not isinstance(module, TaperNorm):
        raise TaperlitError(f"{name} is a {type(module).__name__}, which the decoding engine does not know.")
    kind, c = module.kind, module.alignment.double()
    own = cast(module.own("weight"), plus=kind.gain_offset)
    norm = normalization(own, cast(module.own("bias")), kind.eps, kind.centred)
    scale = cast(module.taper_weight, c, kind.gain_offset)
    linear = LinearMap(
        c.expand(like.shape[-1]).to(like) if scale is None else scale, cast(module.taper_bias), kind.centred
    )
    module.gate.refresh()
    g = module.own_share if isinstance(module, FakeLN) else module.own_gate.item()
    if g < 1 and module.gate.first is not None and module.gate.first.item() > 0:
        raise TaperlitError(
            f"{name} scales position 0 apart from the others, which decoding does not know; train on until "
            "FirstPosition ends."
        )
    return norm if g == 1 else linear if g == 0 else Blend(norm, linear, g)


def rms_norm(weight: Tensor | None, eps: float, like: Tensor, form: RmsForm) -> Norm:
    """An RMSNorm for rows such as ``like`` (N, d_model)."""
    if form == "fused":
        return FusedRmsNorm(weight, eps)
    d_model = like.shape[-1]
    scale = like.new_ones(d_model) if weight is None else weight
    # The root is float32: float16 would lose it.
    root = torch.tensor(math.sqrt(d_model * eps), device=like.device, dtype=torch.float32)
    return ComposedRmsNorm(scale * math.sqrt(d_model), root)


def fastest_rms_form(like: Tensor) -> RmsForm:
    """The faster form of an RMSNorm for rows such as ``like`` (N, d_model), by a short measurement."""
    fused, composed = (rms_norm(like[0], 1e-5, like, form) for form in ("fused", "composed"))
    with torch.inference_mode():
        return fastest({"fused": lambda: fused(like), "composed": lambda: composed(like)}, like.device)
