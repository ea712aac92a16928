"""FakeLN (arXiv:2507.02559): norms whose denominators are frozen at a number, one norm after the other.

A frozen norm is ``y = (x - mean) / sigma * gamma + beta``, in the RMSNorm kind ``y = x / sigma * gamma``; gains and
biases stay the norm's own. That is the linear phase of a TaperNorm with ``c = 1 / sigma``, so a model whose norms are
all frozen has its gate at 0 and folds as any tapered one.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from taperlit.baselines.attention_paths import FusedPath, SeparatePath, find_paths, hooks_on
from taperlit.baselines.roles import Role, claim_norms, own_class
from taperlit.errors import TaperlitError
from taperlit.norm import Gate, Phase, TaperNorm, tapered_class, tapered_norms

EPS = 1e-5  # FakeLN's, in the standard deviations of single tokens

Measure = Literal["no", "together", "per token"]
"""What a norm measures while it trains: nothing; the standard deviation over channels and positions together; or the
mean over tokens of each token's own."""

_OPEN, _HALF, _FROZEN = 0.0, 0.5, 1.0


class FakeLN(TaperNorm):
    """A norm that can be frozen at a number, whole or for the q and k path of attention first.

    Until it is frozen it computes what it did, bit for bit. A half-frozen norm gives its q and k projections the frozen
    output and everything else the norm's own. The gate, which all norms of a model share, is 1 until each is frozen and
    then 0; at 0 every norm computes its linear map, as in a TaperNorm.

    Attributes:
        alignment: ``1 / sigma``, 0-d float32; 1 until it is measured.
        alignment_ema: (3,) float32: what was measured (see :meth:`take`), and 1 once it was.
        frozen: 0-d float32: 0, 0.5 while the q and k path alone is frozen, 1.
        pending: (3,) float32 sums of measurements, and how many there are, since they were last taken.
        role: what the norm is for.
        measure: what it measures in training; nothing until somebody asks.
        why_whole: why it cannot be frozen in halves, or None where it can.
    """

    role: Role
    measure: Measure
    why_whole: str | None

    def _become(self, role: Role) -> None:
        self.role, self.measure, self.why_whole = role, "no", "it feeds no attention"
        self.paths = 0  # modules that ask for the q and k path's output in a forward pass
        self._share = _OPEN  # the buffer's value as Python's, so that forward never syncs
        self._output: Tensor | None = None  # of a half-frozen norm, until each path has taken its own
        self._frozen_output: Tensor | None = None
        self._waiting = 0

    @property
    def taper_weight(self) -> nn.Parameter | None:  # type: ignore[override]
        """The gain of the linear map: the norm's own."""
        return self.own("weight")

    @property
    def taper_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias of the linear map: the norm's own."""
        return self.own("bias")

    @property
    def alignment_estimate(self) -> Tensor:
        """``1 / sigma``, frozen or as measured so far. 0-d float32."""
        return self.alignment

    @property
    def sigma(self) -> float:
        """The number in the denominator's place; waits for the device."""
        return 1.0 / self.alignment.item()

    @property
    def has_sigma(self) -> bool:
        """Whether ``sigma`` was measured; waits for the device."""
        return bool(self.alignment_ema[2] > 0)

    @property
    def is_frozen(self) -> bool:
        """Whether all that it feeds gets the frozen output."""
        return self._share == _FROZEN

    @property
    def is_half_frozen(self) -> bool:
        """Whether the q and k path alone gets the frozen output."""
        return self._share == _HALF

    @property
    def own_share(self) -> float:
        """How much of its output is the norm's own, as a gate would say it: 1, or 0 where it is frozen.

        Raises:
            TaperlitError: it is half frozen, so that there is no one answer.
        """
        if self.is_half_frozen and not self._gate_is_closed():
            raise TaperlitError(
                f"{self.label} is half frozen: q and k get another output than v. Train on until it is frozen whole."
            )
        return 0.0 if self.is_frozen or self._gate_is_closed() else 1.0

    def separate_first(self) -> None:
        """Refuse: one number is for all positions.

        Raises:
            TaperlitError: always.
        """
        raise TaperlitError("FakeLN has one sigma for all positions; leave FirstPosition out.")

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """None: gains and biases are in use in every state."""
        return iter(())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the norm, forget what was measured and open the gate."""
        super().reset_parameters()
        self.refresh()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., *shape) to the same shape: by the norm itself, or by the linear map."""
        if x.is_nested:
            parts = [self.forward(part[None])[0] for part in x.unbind()]  # of a sequence each
            return torch.nested.as_nested_tensor(parts, layout=x.layout)
        if self._share == _FROZEN or self._gate_is_closed():
            return self._linear(x, self.alignment)
        if self.measure != "no" and self.training and torch.is_grad_enabled():
            self._measure(x)
        y = cast(Tensor, super(TaperNorm, self).forward(x))  # type: ignore[misc]
        if self._share == _HALF:
            self.require_taken()
            self._output, self._frozen_output, self._waiting = y, self._linear(x, self.alignment), self.paths
        return y

    def _gate_is_closed(self) -> bool:
        return cast(Gate, self._modules["gate"]).phase is Phase.LINEAR  # past nn.Module's slower look-up

    def for_path(self, name: str, x: Tensor | None) -> Tensor | None:
        """The frozen output for the q and k path, in place of ``x``; None while they are not to differ.

        Raises:
            TaperlitError: ``x`` is not what this norm has just returned.
        """
        if self._share != _HALF or self._gate_is_closed():
            return None
        if x is None or x is not self._output:
            raise TaperlitError(
                f"{name} is not called with the very tensor that {self.label} returned, so that norm cannot be frozen "
                "in halves; freeze it at once (FakeLNSchedule's halves=False)."
            )
        frozen = self._frozen_output
        self._waiting -= 1
        if not self._waiting:
            self._output = self._frozen_output = None
        return frozen

    def require_taken(self) -> None:
        """Refuse to go on where the q or k path did not ask for its output: it would be the norm's own, unseen.

        Raises:
            TaperlitError: a half-frozen norm ran, and a projection of its attention was not called.
        """
        if self._output is not None:
            raise TaperlitError(
                f"{self.label} is half frozen and its q or k projection was not called, so it cannot be frozen in "
                "halves; freeze it at once (FakeLNSchedule's halves=False)."
            )

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        """Add this micro-batch to ``pending``."""
        h = x.detach().float()
        if self.measure == "per token":
            h = self._centre(h)
            s = (h.square().mean(self._dims) + EPS).sqrt()
            values = (s.mean(), torch.zeros_like(s.sum()))
        else:
            if h.dim() > len(self.kind.shape) + 1:  # (B, T, *shape): position 0 is another world
                h = h.narrow(h.dim() - len(self.kind.shape) - 1, 1, h.shape[-len(self.kind.shape) - 1] - 1)
            values = (h.mean(), h.square().mean())
        if h.numel():
            self.pending.add_(torch.stack((*values, torch.ones_like(values[0]))))

    @torch.no_grad()
    def take(self, batch: Tensor, momentum: float = 0.0) -> None:
        """Take a measurement as ``sigma``, or into its moving average; one that is not finite is left out.

        Args:
            batch: (2,) float32 as ``pending`` has it, over its count. Measured together, the mean of ``x`` and of
                ``x^2``, which give ``sigma``: the standard deviation, or the root mean square in the RMSNorm kind.
                Measured per token, the mean of ``sqrt(var + 1e-5)``.
            momentum: of the moving average, which begins with its first measurement; 0 takes this one alone.
        """
        old, had = self.alignment_ema[:2], self.alignment_ema[2]
        new = torch.where(had > 0, batch.lerp(old, momentum), batch) if momentum else batch
        if self.measure == "per token":
            sigma = new[0]
        else:
            sigma = (new[1] - new[0].square() if self.centred else new[1]).clamp(min=0.0).sqrt()
        good = sigma.isfinite() & (sigma > 0)
        self.alignment.copy_(torch.where(good, sigma.reciprocal(), self.alignment))
        self.alignment_ema.copy_(torch.where(good, torch.cat((new, torch.ones_like(new[:1]))), self.alignment_ema))

    @torch.no_grad()
    def forget(self) -> None:
        """Forget what was measured, where nothing is frozen yet."""
        if self._share == _OPEN:
            self.alignment.fill_(1.0)
            self.alignment_ema.zero_()
        self.pending.zero_()

    @torch.no_grad()
    def freeze(self, half: bool = False) -> None:
        """Freeze the denominator at ``sigma``; a norm that is frozen already stays so.

        Args:
            half: for the q and k path only.

        Raises:
            TaperlitError: ``sigma`` was not measured, or the norm cannot be frozen in halves.
        """
        if half and self.why_whole is not None:
            raise TaperlitError(f"{self.label} cannot be frozen in halves ({self.why_whole}); freeze it at once.")
        if not self.has_sigma:
            raise TaperlitError(
                f"No sigma of {self.label} was measured that is finite and not 0; train a step before it is frozen."
            )
        self._share = max(self._share, _HALF if half else _FROZEN)
        self.frozen.fill_(self._share)
        self.measure = "no"
        self._output = self._frozen_output = None

    def refresh(self) -> None:
        """Read from the buffer how much is frozen; waits for the device."""
        if not self.frozen.is_meta:
            self._share = self.frozen.item()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so no importer finds it by name. A half's outputs are of a pass that is over.
        return _new_fake, (own_class(self),), {**self.__dict__, "_output": None, "_frozen_output": None}


_FAKE_CLASS: dict[type[nn.Module], type[FakeLN]] = {}


def _fake_class(own: type[nn.Module]) -> type[FakeLN]:
    if own not in _FAKE_CLASS:
        bases = (FakeLN, tapered_class(own))
        _FAKE_CLASS[own] = type(f"Fake{own.__name__}", bases, {"__doc__": f"A {own.__name__} that can be frozen."})
    return _FAKE_CLASS[own]


def _new_fake(own: type[nn.Module]) -> FakeLN:
    cls = _fake_class(own)
    return cls.__new__(cls)


def apply_fakeln(model: nn.Module, names: Iterable[str] = ("*",)) -> list[str]:
    """Make each norm of a model one that can be frozen, in place; it computes what it did until it is.

    Example::

        apply_fakeln(model)
        trainer = Trainer(max_steps=300, callbacks=[FakeLNSchedule()])

    Args:
        model: changed in place; any whose norms :func:`taperlit.taper` knows and whose names are known. If it is to get
            adapters on its q, k and v projections, give it these before.
        names: glob patterns over module names; a norm with a name that matches one can be frozen.

    Returns:
        The names of these norms.

    Raises:
        TaperlitError: no norm matches, one is of unknown use, or the model is tapered; it is then as it was.
    """
    norms = claim_norms(model, names, "apply_fakeln")
    for name, (norm, role) in norms.items():
        for twin in ("taper_weight", "taper_bias"):
            del norm._parameters[twin]
        norm.__class__ = _fake_class(own_class(norm))
        fake = cast(FakeLN, norm)
        fake._become(role)
        fake.label = name
        if role == "attention":
            _halve(model, name, fake)
    return list(norms)


def _halve(model: nn.Module, name: str, norm: FakeLN) -> None:
    """Hang hooks on the projections of the attention that a norm feeds, or write down why it cannot be halved."""
    try:
        paths = find_paths(model, name)
    except TaperlitError as reason:
        norm.why_whole = str(reason)
        return
    norm.why_whole, norm.paths = None, len(paths)
    for path_name, path, values in paths:
        if values is None:
            path.register_forward_pre_hook(SeparatePath(norm, path_name))
        else:
            path.register_forward_hook(FusedPath(norm, path_name, values))


def check_halves(model: nn.Module, norm: FakeLN) -> None:
    """Refuse a norm that cannot be frozen in halves in its model as it is now.

    Args:
        model: that the norm is in.
        norm: itself.

    Raises:
        TaperlitError: its layout is not known, or something has taken a projection's place since ``apply_fakeln``.
    """
    reason = norm.why_whole
    if reason is None:
        name = next(name for name, module in model.named_modules() if module is norm)
        for path_name, path, _ in find_paths(model, name):
            if all(hook.norm is not norm for hook in hooks_on(path)):
                reason = f"{path_name} took the place of the projection that apply_fakeln found"
    if reason is not None:
        raise TaperlitError(f"{norm.label} cannot be frozen in halves ({reason}); freeze it at once, halves=False.")


def require_fakeln(model: nn.Module, who: str) -> dict[str, FakeLN]:
    """The FakeLN norms of a model.

    Raises:
        TaperlitError: it has none, or tapered norms that are something else.
    """
    norms = tapered_norms(model)
    fake = {name: norm for name, norm in norms.items() if isinstance(norm, FakeLN)}
    if other := next((name for name in norms if name not in fake), None):
        raise TaperlitError(f"{who} freezes all norms or none, and {other} is tapered; build the model anew.")
    if not fake:
        raise TaperlitError(
            f"{who} found no FakeLN in {type(model).__name__}; call taperlit.baselines.apply_fakeln(model) first."
        )
    return fake


def freezing_order(norms: dict[str, FakeLN], halves: bool = True) -> dict[str, list[tuple[str, bool]]]:
    """The stages of a run in their order: per stage the norms that it freezes, each with whether only its q and k path.

    Args:
        norms: by name, in the model's order.
        halves: freeze attention's norms for the q and k path first and for the v path after all of them; else each at
            once, in the first of these stages.
    """
    attention = [name for name, norm in norms.items() if norm.role == "attention"]
    return {
        "mlp": [(name, False) for name, norm in norms.items() if norm.role == "mlp"],
        "qk": [(name, halves) for name in attention],
        "v": [(name, False) for name in attention if halves],
        "final": [(name, False) for name, norm in norms.items() if norm.role == "final"],
    }
