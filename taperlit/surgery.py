"""Put TaperNorm into any model: torch's norms, transformers' own, and whatever computes the same."""

import copy
import fnmatch
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taperlit.errors import TaperlitError
from taperlit.norm import NormKind, Phase, TaperNorm, become_tapered, shared_gate, tapered_norms

# Largest difference, relative to the largest output, that is still the rounding of a norm that computes in float32.
_SAME = 1e-4
_EPS_NAMES = ("eps", "variance_epsilon", "norm_eps", "layer_norm_eps")


def taper(
    model: nn.Module,
    names: Iterable[str] = ("*",),
    *,
    bias: bool = False,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
) -> list[str]:
    """Turn a model's norms into TaperNorms that share one gate, in place.

    The instances stay and change their class, so parameters, ties, hooks, training mode and every name of them stay
    too, and the model computes what it did, bit for bit, until the gate moves. What a module computes is found by
    trying it: torch's and transformers' RMSNorms and LayerNorms are known, with gains ``weight`` or ``1 + weight``, and
    anybody's that computes the same. The first norm owns the gate; :func:`taperlit.norm.shared_gate` finds it.

    Example::

        taper(model, ["model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm"])

    Args:
        model: changed in place.
        names: glob patterns over module names; a norm with a name that matches one is tapered. One that is tapered
            already is left as it is.
        bias: give the linear branch a trained bias, which starts at 0, where the norm has none
            (:meth:`taperlit.TaperNorm.add_bias`); folded, the maps that the norm feeds have biases.
        optimizers: that exist already; the new gains and biases join the groups that hold the norms' own, and a bias
            that the norm has not the group of its gain.

    Returns:
        The names of the norms that are newly tapered; of a norm with several names the first.

    Raises:
        TaperlitError: no norm matches, one would join norms whose gate is not 1 any more, or optimizers are given and
            none holds the gain whose group a new bias would join.

    Warns:
        UserWarning: modules called norms that match, but compute something else, are left alone; they are named.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    matching: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            matching.setdefault(module, name)
    tapered = [module for module in matching if isinstance(module, TaperNorm)]
    kinds, unknown = {}, {}
    for module, name in matching.items():
        if isinstance(module, TaperNorm) or not (_is_called_norm(module) or _has_a_norms_parameters(module)):
            continue
        try:
            kinds[module] = recognise(module)
        except _NotANorm as reason:
            if _is_called_norm(module):
                unknown[name] = f"{name} ({type(module).__name__}: {reason})"
    left = f"not tapered: {', '.join(unknown.values())}" if unknown else ""
    if not kinds and not tapered:
        known = [name for name, module in model.named_modules() if _is_called_norm(module)]
        raise TaperlitError(
            f"No norm to taper matches {patterns}; {left or f'the norms of the model are {known or None}'}."
        )
    gate = shared_gate(model)
    if kinds and gate is not None and gate.phase is not Phase.NORMALIZE:
        raise TaperlitError(
            f"The gate of the norms that are tapered already is {gate.value.item():.6g}; {matching[next(iter(kinds))]} "
            "would jump there. Taper all norms while the gate is 1."
        )
    if bias and optimizers:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for module in kinds:
            if getattr(module, "bias", None) is None and id(getattr(module, "weight", None)) not in held:
                raise TaperlitError(
                    f"No optimizer holds a gain of {matching[module]}, whose group its new bias would join; taper the "
                    "model before the optimizers are made."
                )
    if unknown:
        warnings.warn(f"taper: {left}.", stacklevel=2)
    device = next((p.device for p in model.parameters()), None)
    for module, kind in kinds.items():
        new = become_tapered(module, kind, gate, device)
        if bias:
            new.add_bias()
        gate = new.gate
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, TaperNorm) for m in encoder.modules()):
            # It would hand its layers a nested tensor, which only their fused path takes; a TaperNorm turns that off.
            encoder.use_nested_tensor = False
    _join(optimizers, [*tapered, *(cast(TaperNorm, module) for module in kinds)])
    return [matching[module] for module in kinds]


def _twins(norms: Iterable[TaperNorm]) -> Iterator[tuple[nn.Parameter | None, nn.Parameter]]:
    """Each trainable parameter of the linear branch after the norm's own that it began as, if there is one."""
    for norm in norms:
        for own, twin in ((norm.own("weight"), norm.taper_weight), (norm.own("bias"), norm.taper_bias)):
            if twin is not None and twin.requires_grad:
                yield own, twin


def _join(optimizers: Iterable[torch.optim.Optimizer], norms: list[TaperNorm]) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for norm in norms:
        for own, twin in _twins([norm]):
            beside = norm.own("weight") if own is None else own
            for group in groups:
                held = {id(parameter) for parameter in group["params"]}
                if id(beside) in held and id(twin) not in held:
                    group["params"].append(twin)


def missing_gains(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Trainable parameters of linear branches that no optimizer holds, though one holds the norm's own, if it has one.

    Args:
        model: tapered.
        optimizers: all that train it.

    Returns:
        The parameters' names; empty when nothing is missing.
    """
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    twins = _twins(tapered_norms(model).values())
    missing = {twin for own, twin in twins if (own is None or own in held) and twin not in held}
    return [name for name, parameter in model.named_parameters() if parameter in missing]


def require_tapered(model: nn.Module, who: str) -> dict[str, TaperNorm]:
    """The TaperNorms of a model.

    Raises:
        TaperlitError: it has none.
    """
    norms = tapered_norms(model)
    if not norms:
        raise TaperlitError(f"{who} found no TaperNorm in {type(model).__name__}; call taperlit.taper(model) first.")
    return norms


def known_norms(model: nn.Module) -> dict[str, NormKind]:
    """What every norm of a model computes that is a TaperNorm or could become one, by its (first) name."""
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, TaperNorm):
            kinds[name] = module.kind
        elif _is_called_norm(module) or _has_a_norms_parameters(module):
            with suppress(_NotANorm):
                kinds[name] = recognise(module)
    return kinds


def separate_first(model: nn.Module) -> None:
    """Give every TaperNorm of a model a scalar of its own for position 0, until its share is taken to 0.

    In most pretrained models the first token's residual is tens of times the others', and one scalar cannot fit both.
    With ``s``, the gate's :attr:`taperlit.Gate.first`, the linear branch scales position 0 by
    ``c_first^s * c^(1 - s)`` and the others by ``c``; ``c_first`` is fitted to position 0 alone and ``c`` to the
    others. At ``s = 0`` nothing is left of it; until then a model cannot be folded. :class:`taperlit.FirstPosition`
    does all this in a run. A model that is separated already is left as it is; one that loads the state of one that is
    becomes so by itself.

    Example::

        taper(model)
        separate_first(model)
        ...  # gather statistics at g = 1, freeze, take g to 0
        shared_gate(model).set_first(0.5)

    Args:
        model: tapered, and its gate at 1.

    Raises:
        TaperlitError: it has no TaperNorm, or the gate is below 1 and its scalars are fitted to all positions.
    """
    norms = require_tapered(model, "separate_first")
    for name, norm in norms.items():
        if norm.first_alignment is None and norm.gate.phase is not Phase.NORMALIZE:
            raise TaperlitError(
                f"The gate is {norm.gate.value.item():.3g} and {name} has one scalar for all positions already; "
                "separate the first position while the gate is 1."
            )
    for name, norm in norms.items():
        norm.separate_first()
        norm.label = name


class _NotANorm(Exception):
    """Why a module is none of the kinds that a TaperNorm can be."""


def _is_called_norm(module: nn.Module) -> bool:
    names = (cls.__name__.lower() for cls in type(module).__mro__)
    # A module of modules is only called after the norm within, unless it has parameters of its own.
    return bool(module._parameters or not module._modules) and any("norm" in name.removeprefix("_") for name in names)


def _has_a_norms_parameters(module: nn.Module) -> bool:
    """Whether a module is worth trying though its class is not called a norm: a leaf with gains, and maybe biases."""
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    gains = parameters.get("weight")
    return gains is not None and gains.dim() == 1 and parameters.keys() <= {"weight", "bias"} and not module._modules


@torch.no_grad()
def recognise(module: nn.Module) -> NormKind:
    """Find what a norm computes by running a copy of it, with random gains, on random inputs.

    Args:
        module: one with no required argument but its input; it is not changed. On the meta device too.

    Raises:
        _NotANorm: it computes nothing that a TaperNorm can; the message says why.
    """
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LocalResponseNorm | nn.CrossMapLRN2d):
        raise _NotANorm("its statistics are not one token's")
    if module._modules:
        raise _NotANorm(f"it has a module of its own, {next(iter(module._modules))}")
    if "forward" in module.__dict__:
        raise _NotANorm("its forward was replaced on the instance")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = getattr(module, "normalized_shape", None)
    shape = tuple(shape) if shape is not None else None if weight is None else tuple(weight.shape)
    if shape is None:
        raise _NotANorm("it has neither gains nor a normalized_shape")
    if shape[:1] in ((), (1,)) and not hasattr(module, "normalized_shape"):
        # Which axes it measures cannot be told: of one feature every norm of a vector looks like an RMSNorm.
        raise _NotANorm(f"its gains, of shape {shape}, do not say how many features it measures")
    if type(module) in (nn.RMSNorm, nn.LayerNorm):
        plain = cast("nn.RMSNorm | nn.LayerNorm", module)
        return NormKind(shape, isinstance(plain, nn.LayerNorm), 0.0, plain.eps)
    extra = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    if extra:
        raise _NotANorm(f"it has a parameter {min(extra)!r} too")
    arguments = list(inspect.signature(module.forward).parameters.values())
    if len(arguments) != 1 or arguments[0].kind is inspect.Parameter.VAR_KEYWORD:
        raise _NotANorm("its forward takes more than one tensor")
    return _match(_random_copy(module), shape, weight is not None, bias is not None)


def _random_copy(module: nn.Module) -> nn.Module:
    probe = copy.copy(module)  # the hooks of the original must not see the probing
    for hooks in [name for name in vars(module) if name.endswith("_hooks")]:
        setattr(probe, hooks, type(getattr(module, hooks))())
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64) * 2

    probe._parameters = {
        name: None if p is None else nn.Parameter(drawn(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    probe._buffers = {
        name: None
        if b is None
        else drawn(b)  # a gain too, if it is read: FalconMamba has norms that do not
        if name in ("weight", "bias")
        else torch.zeros_like(b, device="cpu")
        if b.is_meta
        else b.detach().cpu()
        for name, b in module._buffers.items()
    }
    return probe.eval()


def _match(probe: nn.Module, shape: tuple[int, ...], has_weight: bool, has_bias: bool) -> NormKind:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, *shape, generator=generator, dtype=torch.float64) + 0.7
    declared = [getattr(probe, name) for name in _EPS_NAMES if isinstance(getattr(probe, name, ""), float | None)]
    inputs = (x, x * 1e-3)  # the second's mean square is of the size of an epsilon
    try:
        outputs = [probe(value) for value in inputs]
    except Exception as error:  # whatever a stranger's forward raises
        raise _NotANorm(f"it cannot be tried: {' '.join(str(error).split())[:80]}") from error
    if any(not isinstance(y, Tensor) or y.shape != x.shape for y in outputs):
        raise _NotANorm("its output is not one tensor of its input's shape")
    weight = cast(Tensor, probe.weight) if has_weight else torch.ones(shape, dtype=torch.float64)
    bias = cast(Tensor, probe.bias) if has_bias else torch.zeros(shape, dtype=torch.float64)
    dims = tuple(range(-len(shape), 0))
    for centred, offset in itertools.product((False, True), (0.0, 1.0) if has_weight else (0.0,)):

        def scaled(value: Tensor, centred: bool = centred, offset: float = offset) -> tuple[Tensor, Tensor]:
            h = value - value.mean(dims, keepdim=True) if centred else value
            return h * (offset + weight), h.square().mean(dims, keepdim=True)

        for eps in declared or [_infer_eps(*scaled(inputs[1]), outputs[1] - bias)]:
            added = torch.finfo(x.dtype).eps if eps is None else eps
            expected = [h / (square + added).sqrt() + bias for h, square in map(scaled, inputs)]
            if all((y - e).abs().max() <= _SAME * e.abs().max() for y, e in zip(outputs, expected, strict=True)):
                return NormKind(shape, centred, offset, eps)
    raise _NotANorm("it computes neither an RMSNorm nor a LayerNorm")


def _infer_eps(scaled: Tensor, square: Tensor, output: Tensor) -> float:
    """The epsilon that the output speaks of, to the digits that float32 leaves."""
    eps = ((scaled / output).square() - square).median().item()
    rounded = float(f"{eps:.3g}")
    return 0.0 if eps <= 0 else rounded if abs(rounded - eps) < 1e-4 * eps else eps
