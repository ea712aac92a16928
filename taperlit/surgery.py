"""Put TaperNorm into any model."""

import fnmatch
from collections.abc import Iterable

from torch import nn

from taperlit.errors import TaperlitError
from taperlit.norm import TaperLayerNorm, TaperNorm, TaperRMSNorm, share_gate, tapered_norms


def taper(model: nn.Module, names: Iterable[str] = ("*",), ema_rate: float = 0.01) -> list[str]:
    """Replace a model's ``nn.RMSNorm`` and ``nn.LayerNorm`` by TaperNorms that keep their parameters and share a gate.

    The first of them owns the gate; :func:`taperlit.norm.shared_gate` finds it.

    Args:
        model: changed in place.
        names: glob patterns over module names; a norm that matches one is replaced.
        ema_rate: rate of the alignment EMAs, per optimizer step.

    Returns:
        The names of the replaced norms.

    Raises:
        TaperlitError: no norm matches.
    """
    patterns = list(names)
    kinds = {nn.RMSNorm: TaperRMSNorm, nn.LayerNorm: TaperLayerNorm}
    plain = {name: module for name, module in model.named_modules() if type(module) in kinds}
    chosen = [name for name in plain if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise TaperlitError(f"No norm to taper matches {patterns}; the model's norms are {list(plain) or 'none'}.")
    for name in chosen:
        old = plain[name]
        new = kinds[type(old)](
            old.normalized_shape,
            eps=old.eps,
            elementwise_affine=old.elementwise_affine,
            device=None if old.weight is None else old.weight.device,
            dtype=None if old.weight is None else old.weight.dtype,
            ema_rate=ema_rate,
            **({"bias": old.bias is not None} if isinstance(old, nn.LayerNorm) else {}),
        )
        new.load_state_dict(old.state_dict())
        new.weight = old.weight  # the very parameters, so that ties and optimizers keep them
        if isinstance(old, nn.LayerNorm):
            new.bias = old.bias
        model.set_submodule(name, new.train(old.training))
    share_gate(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused inference path reads the norms' parameters and never calls the norms; this flag turns it off.
            module.activation_relu_or_gelu = 0
    return chosen


def require_tapered(model: nn.Module, who: str) -> dict[str, TaperNorm]:
    """The TaperNorms of a model.

    Raises:
        TaperlitError: it has none.
    """
    norms = tapered_norms(model)
    if not norms:
        raise TaperlitError(f"{who} found no TaperNorm in {type(model).__name__}; call taperlit.taper(model) first.")
    return norms
