"""TaperNorm: a normalization layer that one shared gate turns into a linear map (arXiv:2602.10408, section 3).

With ``h`` a token's vector, ``r(h)`` the norm's denominator, ``c`` the alignment scalar and ``g`` the gate::

    RMSNorm kind    y = g * h / r(h) * gamma + (1 - g) * c * h * gamma~
    LayerNorm kind  y = g * ((h - mean) / s(h) * gamma + beta) + (1 - g) * (c * (h - mean) * gamma~ + beta~)

``gamma`` and ``beta`` are ``weight`` and ``bias``, as in torch; ``gamma~`` and ``beta~`` are ``taper_weight`` and
``taper_bias``. Nothing here knows of Lightning.
"""

import enum
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError


class Phase(enum.Enum):
    """What a TaperNorm computes. It follows from the gate alone, and is a Python value so that forward never syncs."""

    NORMALIZE = "normalize"  # g = 1: the torch norm, bit for bit
    BLEND = "blend"  # 0 < g < 1
    LINEAR = "linear"  # g = 0: an affine map with no per-token statistic


def plain_name(name: str) -> str:
    """A parameter's or module's name without the marks of the wrappers around it (FSDP1)."""
    return name.replace("_fsdp_wrapped_module.", "")


class Float32State(nn.Module):
    """A module whose tensors named in ``float32_state`` stay float32 when the module is cast to another dtype."""

    float32_state: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.float32_state}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name] if name in self._buffers else fn(old)
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        return self


class Gate(Float32State):
    """The global gate ``g`` in [0, 1], shared by every TaperNorm of a model.

    ``value`` is a 0-d float32 buffer, so a moving gate neither syncs nor recompiles; ``phase`` is derived from it.
    """

    float32_state = ("value",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones((), dtype=torch.float32))
        self.phase = Phase.NORMALIZE

    def reset_parameters(self) -> None:
        """Open the gate: ``g = 1``."""
        self.set(1.0)

    @torch.no_grad()
    def set(self, g: float) -> None:
        """Set the gate.

        Raises:
            TaperlitError: ``g`` is not in [0, 1].
        """
        if not 0.0 <= g <= 1.0:
            raise TaperlitError(f"The gate must be between 0 and 1, not {g}.")
        self.value.fill_(g)
        self.phase = self._phase_of(torch.tensor(g, dtype=torch.float32).item())

    @staticmethod
    def _phase_of(g: float) -> Phase:
        return Phase.NORMALIZE if g == 1.0 else Phase.LINEAR if g == 0.0 else Phase.BLEND

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.value.is_meta:
            self.phase = self._phase_of(self.value.item())

    def extra_repr(self) -> str:
        """The phase."""
        return self.phase.value


class _HoldIdle(torch.autograd.Function):
    """Identity on ``y`` that hands every idle parameter a zero gradient, so that DDP never waits for one."""

    @staticmethod
    def forward(ctx, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class TaperNorm(Float32State):
    """The part that both kinds share; use :class:`TaperRMSNorm` or :class:`TaperLayerNorm`.

    A norm that is given a ``gate`` borrows it and leaves it out of its state dict; one that is given none owns its
    own. In a model the first norm owns the gate that all share, see :func:`share_gate`. Alignment statistics are
    gathered in training while ``g = 1``: :func:`update_alignment` once an optimizer step, :meth:`freeze` at the
    boundary.

    ``pending`` holds the sums of the micro-batches since the last update. It is a plain tensor, not a buffer: DDP
    copies rank 0's buffers over the other ranks' before every forward, which would lose their statistics.
    """

    float32_state = ("alignment", "alignment_ema", "pending")
    centred: bool

    def _init_taper(self, gate: Gate | None, ema_rate: float) -> None:
        if not 0.0 < ema_rate <= 1.0:
            raise TaperlitError(f"ema_rate must be in (0, 1], not {ema_rate}.")
        self.ema_rate = ema_rate
        device = None if self.weight is None else self.weight.device
        # A norm without affine parameters has nothing to copy at the boundary: its linear map is c alone.
        for name, source in (("taper_weight", self.weight), ("taper_bias", getattr(self, "bias", None))):
            self.register_parameter(name, None if source is None else nn.Parameter(source.detach().clone()))
        self.register_buffer("alignment", torch.ones((), dtype=torch.float32, device=device))  # c
        self.register_buffer("alignment_ema", torch.zeros(2, dtype=torch.float32, device=device))
        self.register_buffer("alignment_updates", torch.zeros((), dtype=torch.int64, device=device))
        self.pending = torch.zeros(3, dtype=torch.float32, device=device)  # numerator, denominator, micro-batches
        # A child of owner and borrowers alike, so that torch.compile makes one graph for both.
        self.gate = Gate() if gate is None else gate
        self.owns_gate = gate is None

    def borrow(self, gate: Gate) -> None:
        """Use another norm's gate."""
        self.gate, self.owns_gate = gate, False

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict[str, Tensor]:
        """As torch's; a borrowed gate is left to its owner."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if not self.owns_gate:
            del state[f"{prefix}gate.value"]
        return state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both branches to ones and zeros, forget the statistics and open the gate."""
        super().reset_parameters()
        if "alignment" not in self._buffers:
            return  # called by torch's constructor, before the taper exists
        if self.taper_weight is not None:
            self.taper_weight.fill_(1.0)
        if self.taper_bias is not None:
            self.taper_bias.zero_()
        self.alignment.fill_(1.0)
        for statistic in (self.alignment_ema, self.alignment_updates, self.pending):
            statistic.zero_()
        self.gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., *normalized_shape) to the same shape and dtype."""
        phase = self.gate.phase
        if phase is Phase.NORMALIZE:
            if self.training and torch.is_grad_enabled():
                self._record(x)
            y = super().forward(x)
        elif phase is Phase.BLEND:
            y = self._blend(x)
        else:
            y = self._linear(x)
        if self.training and torch.is_grad_enabled():
            idle = [p for p in self.idle_parameters() if p.requires_grad]
            if idle:
                y = _HoldIdle.apply(y, *idle)
        return y

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the current phase does not use.

        Their gradient is zero, not None, so that DDP and FSDP see one fixed set. Set it to None before the optimizer
        steps (``GateSchedule`` does) and they get no decay and no moments either.
        """
        if self.gate.phase is Phase.NORMALIZE:
            names = ("taper_weight", "taper_bias")
        elif self.gate.phase is Phase.LINEAR:
            names = ("weight", "bias")
        else:
            names = ()
        for name in names:
            if (parameter := getattr(self, name, None)) is not None:
                yield parameter

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.normalized_shape), 0))

    def _denominator(self, x: Tensor) -> Tensor:
        """``r(h)``, or ``s(h)`` of the already centred ``h``: (..., 1) in the dtype of ``x``."""
        eps = self.eps if self.eps is not None else torch.finfo(x.dtype).eps
        return (x.square().mean(self._dims, keepdim=True) + eps).sqrt()

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(self._dims, keepdim=True) if self.centred else x

    def _blend(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)  # statistics in at least float32, whatever autocast says
        h = self._centre(x.to(dtype))
        normed, scaled = h / self._denominator(h), h * self.alignment
        if self.weight is not None:
            normed, scaled = normed * self.weight, scaled * self.taper_weight
        if getattr(self, "bias", None) is not None:
            normed, scaled = normed + self.bias, scaled + self.taper_bias
        return torch.lerp(scaled, normed, self.gate.value.to(dtype)).to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        gain = self.alignment if self.taper_weight is None else self.alignment * self.taper_weight
        y = self._centre(x) * gain.to(x.dtype)
        return y if self.taper_bias is None else y + self.taper_bias.to(x.dtype)

    @torch.no_grad()
    def _record(self, x: Tensor) -> None:
        """Add this micro-batch's means over tokens of ``||h D||^2 / r(h)`` and ``||h D||^2`` to ``pending``."""
        if x.numel() == 0:
            return
        h = self._centre(x.detach().float())
        scaled = h if self.weight is None else h * self.weight.float()
        energy = scaled.square().sum(self._dims, keepdim=True)  # (..., 1)
        mean = energy.mean()
        self.pending.add_(torch.stack(((energy / self._denominator(h)).mean(), mean, torch.ones_like(mean))))

    @property
    def alignment_moments(self) -> Tensor:
        """The two bias-corrected EMAs, ``E[||h D||^2 / r]`` and ``E[||h D||^2]``: (2,) float32."""
        return self.alignment_ema / (1 - (1 - self.ema_rate) ** self.alignment_updates)

    @property
    def alignment_estimate(self) -> Tensor:
        """``c``: the frozen one, or before the boundary what it would be by the statistics so far. 0-d float32."""
        if self.gate.phase is not Phase.NORMALIZE:
            return self.alignment
        numerator, denominator = self.alignment_moments
        return torch.where(self.alignment_updates > 0, numerator / denominator, self.alignment)

    @torch.no_grad()
    def freeze(self) -> None:
        """The boundary: set ``c`` to its least-squares value and copy ``gamma``, ``beta`` to ``gamma~``, ``beta~``.

        Raises:
            TaperlitError: no statistics were gathered, or they are zero or not finite.
        """
        numerator, denominator = self.alignment_moments.tolist()
        c = numerator / denominator if denominator else math.nan
        if not (math.isfinite(c) and c > 0):
            raise TaperlitError(
                f"No alignment scalar: the statistics are E[|hD|^2/r] = {numerator:.3g} and E[|hD|^2] = "
                f"{denominator:.3g} after {int(self.alignment_updates)} steps; train with the gate at 1 first."
            )
        self.alignment.fill_(c)
        if self.weight is not None:
            self.taper_weight.copy_(self.weight)
        if self.taper_bias is not None:
            self.taper_bias.copy_(self.bias)

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor | None]:
        """Gain ``c * gamma~`` and bias ``beta~`` of ``y = (h P) * gain + bias``, the linear phase: (d,) float64 each.

        ``P`` centres in the LayerNorm kind (``centred``) and is the identity in the RMSNorm kind.
        """
        width = math.prod(self.normalized_shape)
        gain = self.alignment.double().expand(width)
        if self.taper_weight is not None:
            gain = gain * self.taper_weight.double().flatten()
        return gain, None if self.taper_bias is None else self.taper_bias.double().flatten()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        own = {prefix + key: value for key, value in self.state_dict().items()}
        plain = {prefix + "weight", prefix + "bias"}
        if not any(key in state_dict for key in own.keys() - plain):
            # A torch norm's state dict: both branches start from its gain and bias, the rest stays as it is.
            for key, value in own.items():
                twin = key.replace(prefix + "taper_", prefix)
                if twin in state_dict or key not in plain:
                    state_dict.setdefault(key, state_dict.get(twin, value))
        if not self.owns_gate:
            state_dict[f"{prefix}gate.value"] = self.gate.value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class TaperRMSNorm(TaperNorm, nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm` (same constructor words, loads its state dict).

    Args:
        normalized_shape: the trailing shape that is normalized together.
        eps: added to the mean square; None is the input dtype's epsilon, as in torch.
        elementwise_affine: have gains.
        device: where the parameters live.
        dtype: of the parameters.
        gate: the model's shared gate; None makes one of this layer's own.
        ema_rate: rate of the two alignment EMAs, per optimizer step.
    """

    centred = False

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | None = None,
        ema_rate: float = 0.01,
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self._init_taper(gate, ema_rate)


class TaperLayerNorm(TaperNorm, nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm` (same constructor words, loads its state dict).

    Args:
        normalized_shape: the trailing shape that is normalized together.
        eps: added to the variance.
        elementwise_affine: have gains (and biases).
        bias: have biases, if ``elementwise_affine``.
        device: where the parameters live.
        dtype: of the parameters.
        gate: the model's shared gate; None makes one of this layer's own.
        ema_rate: rate of the two alignment EMAs, per optimizer step.
    """

    centred = True

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: Gate | None = None,
        ema_rate: float = 0.01,
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._init_taper(gate, ema_rate)


class Affine(nn.Module):
    """The linear phase as a module of its own, for a norm that cannot be folded: no statistic, no root, no gate.

    Args:
        d_model: width.
        centred: the LayerNorm kind, which centres and has a bias.
    """

    def __init__(self, d_model: int, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if centred else None

    def reset_parameters(self) -> None:
        """The identity (but for the centring)."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        y = x * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@torch.no_grad()
def update_alignment(norms: Iterable[TaperNorm], all_reduce_mean: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Fold the pending micro-batches of one optimizer step into every norm's EMAs, and clear them.

    Args:
        norms: the tapered norms, in the same order on every rank.
        all_reduce_mean: averages a (n_norm, 2) tensor over the ranks. EMAs are linear, so averaging each step's
            batch statistics keeps every rank at what one process that saw all batches would have.
    """
    norms = list(norms)
    if not norms:
        return
    pending = torch.stack([norm.pending for norm in norms])  # (n_norm, 3)
    seen = pending[:, 2] > 0
    batch = all_reduce_mean(pending[:, :2] / pending[:, 2:].clamp(min=1))
    for norm, statistics, gathered in zip(norms, batch, seen, strict=True):
        norm.alignment_ema.lerp_(statistics, gathered * norm.ema_rate)
        norm.alignment_updates.add_(gathered)
        norm.pending.zero_()


def tapered_norms(model: nn.Module) -> dict[str, TaperNorm]:
    """Every TaperNorm of a model by its name, in registration order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, TaperNorm)}


def share_gate(model: nn.Module) -> None:
    """Make all TaperNorms of a model use the first one's gate."""
    first, *others = tapered_norms(model).values()
    for norm in others:
        norm.borrow(first.gate)


def shared_gate(model: nn.Module) -> Gate | None:
    """The one gate behind a model's TaperNorms, or None where it has none.

    Raises:
        TaperlitError: the norms do not share one gate.
    """
    norms = tapered_norms(model)
    for (first, a), (second, b) in itertools.pairwise(norms.items()):
        if a.gate is not b.gate:
            raise TaperlitError(
                f"{first} and {second} have separate gates; call taperlit.norm.share_gate on the model."
            )
    return next(iter(norms.values())).gate if norms else None
