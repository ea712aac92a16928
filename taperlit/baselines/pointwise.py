"""DyT (arXiv:2503.10622) and Derf: a squashing function of each number alone, in a norm's place for good."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from taperlit.baselines.embedding_scale import scale_embedding, token_embedding
from taperlit.baselines.roles import Role, claim_norms
from taperlit.errors import TaperlitError
from taperlit.norm import NormKind
from taperlit.structure import replace
from taperlit.transformer import Transformer

# DyT's alpha at first, in attention's norms and in all others, from a width on.
_ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}


class Pointwise(nn.Module):
    """What DyT and Derf share: gains, biases and the scalar before the function.

    All of its parameters decay as weights do, ``alpha`` too.

    Args:
        shape: of the gains, the trailing shape of the input.
        bias: have biases.
        alpha: the scalar's first value.
        device: where the parameters live.
        dtype: of the parameters.
    """

    function = ""

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool = True,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.alpha_init = alpha
        # One dimension, since FSDP2 shards no scalars.
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Gains of 1, biases of 0, and the first ``alpha``."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def squash(self, x: Tensor) -> Tensor:
        """The function, of (..., *shape)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., *shape) to the same shape and dtype."""
        y = self.squash(x) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and first alpha."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, alpha={self.alpha_init}"


class DyT(Pointwise):
    """``y = gamma * tanh(alpha x) + beta`` with one scalar ``alpha`` per layer; see :class:`Pointwise`."""

    function = "tanh"

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool = True,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, bias, alpha, device, dtype)
        self.reset_parameters()

    def squash(self, x: Tensor) -> Tensor:
        """``tanh(alpha x)``."""
        return torch.tanh(self.alpha * x)


class Derf(Pointwise):
    """``y = gamma * erf(alpha x + s) + beta`` with scalars ``alpha`` and ``s`` per layer; see :class:`Pointwise`."""

    function = "erf"

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool = True,
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape, bias, alpha, device, dtype)
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains of 1, biases and shift of 0, and the first ``alpha``."""
        super().reset_parameters()
        nn.init.zeros_(self.shift)

    def squash(self, x: Tensor) -> Tensor:
        """``erf(alpha x + s)``."""
        return torch.erf(self.alpha * x + self.shift)


def first_alpha(width: int, role: Role) -> float:
    """DyT's ``alpha`` at first: of the widest entry of its table that is not wider than ``width``, or the first."""
    attention, others = _ALPHA[max((w for w in _ALPHA if w <= width), default=min(_ALPHA))]
    return attention if role == "attention" else others


def apply_dyt(model: nn.Module, names: Iterable[str] = ("*",)) -> list[str]:
    """Put a :class:`DyT` in the place of each norm of a model, and a learnable scalar after its token embedding.

    Gains begin at 1 and biases at 0, whatever the norm's own were; a norm without biases gets none.

    Example::

        apply_dyt(model)

    Args:
        model: changed in place; any whose norms :func:`taperlit.taper` knows and whose names are known.
        names: glob patterns over module names; a norm with a name that matches one is replaced.

    Returns:
        The names of the norms that were replaced.

    Raises:
        TaperlitError: no norm matches, one is of unknown use, or the model is tapered or has an ``embed_norm``; it is
            then as it was.
    """

    def build(kind: NormKind, role: Role, bias: bool, like: Tensor) -> DyT:
        alpha = first_alpha(math.prod(kind.shape), role)
        return DyT(kind.shape, bias, alpha, like.device, like.dtype)

    return _apply(model, names, build, "apply_dyt")


def apply_derf(model: nn.Module, names: Iterable[str] = ("*",)) -> list[str]:
    """Put a :class:`Derf` in the place of each norm of a model, and a learnable scalar after its token embedding.

    Example::

        apply_derf(model)

    Args:
        model: see :func:`apply_dyt`.
        names: see :func:`apply_dyt`.

    Returns:
        The names of the norms that were replaced.

    Raises:
        TaperlitError: as :func:`apply_dyt`.
    """

    def build(kind: NormKind, role: Role, bias: bool, like: Tensor) -> Derf:
        return Derf(kind.shape, bias, device=like.device, dtype=like.dtype)

    return _apply(model, names, build, "apply_derf")


def _apply(
    model: nn.Module,
    names: Iterable[str],
    build: Callable[[NormKind, Role, bool, Tensor], Pointwise],
    who: str,
) -> list[str]:
    embedding = token_embedding(model)
    if isinstance(model, Transformer) and model.config.embed_norm:
        raise TaperlitError(
            f"{who} trains a scalar after the embedding, which embed_norm would divide out again; set "
            "model.overrides.embed_norm to false."
        )
    norms = claim_norms(model, names, who)
    for name, (norm, role) in norms.items():
        like = next(norm.parameters(), embedding.weight)
        replace(model, name, build(norm.kind, role, norm.own("bias") is not None, like))
    scale_embedding(embedding)
    return list(norms)
