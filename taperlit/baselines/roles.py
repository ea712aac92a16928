"""What a norm is for, by the names that families of models give their norms."""

import fnmatch
from collections.abc import Iterable
from typing import Literal, cast

from torch import nn

from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, plain_name, tapered_norms
from taperlit.surgery import known_norms, taper

Role = Literal["attention", "mlp", "final"]
"""A norm that feeds attention (and, in a parallel block, the MLP too), the MLP, or the head."""

# Within a block, and after the last. GPT-2, ours, Llama's family, OPT, MPT, Falcon, in this order.
_IN_BLOCK: dict[str, Role] = {
    "ln_1": "attention", "attn_norm": "attention", "input_layernorm": "attention",
    "self_attn_layer_norm": "attention", "norm_1": "attention", "ln_attn": "attention",
    "ln_2": "mlp", "mlp_norm": "mlp", "post_attention_layernorm": "mlp", "pre_feedforward_layernorm": "mlp",
    "final_layer_norm": "mlp", "norm_2": "mlp", "ln_mlp": "mlp",
}  # fmt: skip
_AFTER_BLOCKS = ("ln_f", "final_norm", "norm", "final_layer_norm", "final_layernorm", "norm_f")
# Where a block has one of these, its post_attention_layernorm is on what attention returns.
_NORMS_AFTER = ("post_feedforward_layernorm", "pre_feedforward_layernorm")


def role_of(model: nn.Module, name: str) -> Role:
    """What a norm is for.

    Args:
        model: that it is in.
        name: the norm's own.

    Raises:
        TaperlitError: no table has its name.
    """
    parent, _, leaf = plain_name(name).rpartition(".")
    role: Role | None
    if any(part.isdigit() for part in parent.split(".")):
        role = _IN_BLOCK.get(leaf)
        block = model.get_submodule(name.rpartition(".")[0])
        if leaf == "post_attention_layernorm" and any(hasattr(block, other) for other in _NORMS_AFTER):
            role = None
    else:
        role = "final" if leaf in _AFTER_BLOCKS else None
    if role is None:
        raise TaperlitError(
            f"{name} is none of the attention, MLP and final norms whose names are known, so its place in the order "
            "and its initial values are not; choose another model.taper, or from Python names=[...] that leave it out."
        )
    return role


def claim_norms(model: nn.Module, names: Iterable[str], who: str) -> dict[str, tuple[TaperNorm, Role]]:
    """Find a model's norms as :func:`taperlit.taper` does, and make them TaperNorms on the way to something else.

    Args:
        model: changed in place; as it was if anything is raised.
        names: glob patterns over module names.
        who: asks, for the errors.

    Returns:
        By name, in the model's order: the TaperNorm, and what it is for.

    Raises:
        TaperlitError: the model has TaperNorms already, no norm matches, or one is of unknown use.
    """
    if before := next(iter(tapered_norms(model)), None):
        raise TaperlitError(f"{who} takes a plain model, and {before} is tapered already; build the model anew.")
    patterns = [names] if isinstance(names, str) else list(names)
    for name in known_norms(model):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            role_of(model, name)  # before anything is changed
    claimed = taper(model, patterns)
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: (cast(TaperNorm, modules[name]), role_of(model, name)) for name in claimed}


def own_class(norm: TaperNorm) -> type[nn.Module]:
    """The class that a norm had before it was tapered."""
    tapered = next(kind for kind in type(norm).__mro__ if TaperNorm in kind.__bases__ and len(kind.__bases__) == 2)
    return tapered.__bases__[1]
