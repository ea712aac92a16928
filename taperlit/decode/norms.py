"""What is left of a norm when a model decodes: a normalization, a linear map, or nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taperlit.decode.clock import fastest
from taperlit.errors import TaperlitError
from taperlit.norm import Affine, Phase, TaperNorm

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


def read_norm(name: str, module: nn.Module, like: Tensor, form: RmsForm) -> Norm | None:
    """How the engine computes one norm of a model.

    Args:
        name: of the norm, for the error.
        module: a torch norm, a TaperNorm of ours with its gate at 1 or 0, an :class:`taperlit.norm.Affine`, or the
            identity that folding leaves.
        like: (N, d_model) rows such as it will see; gives device and dtype.
        form: how an RMSNorm is computed.

    Returns:
        The norm, or None where nothing is left of it.

    Raises:
        TaperlitError: it is something else, or its gate is between 1 and 0.
    """

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(like)

    if type(module) is nn.Identity:
        return None
    if isinstance(module, Affine):
        scale = cast(module.weight)
        assert scale is not None
        return LinearMap(scale, cast(module.bias), module.centred)
    if isinstance(module, TaperNorm):
        module.gate.refresh()
        if module.gate.phase is Phase.BLEND:
            raise TaperlitError(
                f"{name} is half tapered (its gate is {module.gate.value.item():.4g}); decode with a checkpoint whose "
                "gate is 1 or 0."
            )
        weight, bias, eps = module.own("weight"), module.own("bias"), module.kind.eps
        if module.gate.phase is Phase.LINEAR:
            weight, bias = module.taper_weight, module.taper_bias
        if weight is not None:
            weight = weight.detach() + module.gain_offset  # type: ignore[assignment]
        if module.gate.phase is Phase.LINEAR:
            alignment = module.alignment.double()
            scale = alignment.expand(like.shape[-1]) if weight is None else alignment * weight.double()
            return LinearMap(scale.to(like), cast(bias), module.centred)
        centred = module.centred
    elif type(module) in (nn.RMSNorm, nn.LayerNorm):
        weight, bias, eps = module.weight, getattr(module, "bias", None), module.eps  # type: ignore[assignment]
        centred = type(module) is nn.LayerNorm
    else:
        raise TaperlitError(f"{name} is a {type(module).__name__}, which the decoding engine does not know.")
    eps = torch.finfo(like.dtype).eps if eps is None else eps
    if centred:
        return LayerNorm(cast(weight), cast(bias), eps)
    return rms_norm(cast(weight), eps, like, form)


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
