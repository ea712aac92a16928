"""Which norms a run tapers, and how: ``model.taper`` as a policy of names."""

from typing import Literal, get_args

from torch import nn

from taperlit.baselines import BASELINES
from taperlit.baselines.roles import role_of
from taperlit.errors import TaperlitError
from taperlit.foldable import foldable_norms
from taperlit.hub.causal_lm import CausalLM
from taperlit.surgery import taper
from taperlit.transformer import Transformer

Policy = Literal["none", "attention", "internal", "all", "fakeln", "dyt", "derf"]
POLICIES: tuple[str, ...] = get_args(Policy)


def apply_policy(model: Transformer | CausalLM, policy: Policy, bias: bool = False) -> dict[str, list[str]]:
    """Taper a model's norms in place, as ``taperlit.taper`` does for any model, or replace them by a peer's layers.

    Args:
        model: plain, with its weights.
        policy: ``none`` leaves it so; ``internal`` (Internal-Taper of arXiv:2602.10408) takes the norms in the blocks,
            and the final norm stays to anchor the scale; ``all`` (All-Taper) takes the final norm too; ``attention``
            takes only those before attention, for models whose MLPs do not bear it. In a pretrained model only norms
            that can be folded are taken, so no QK-norm and no post-norm. ``fakeln``, ``dyt`` and ``derf`` are the
            peers, see :mod:`taperlit.baselines`.
        bias: give the linear branch a bias where the norm has none, see :func:`taperlit.taper`; policies that have no
            such branch have none.

    Returns:
        The norms in the blocks that are left as they are, by their name in a block, with what reads them.

    Raises:
        TaperlitError: there is no such policy, or no norm that it could take.
    """
    check_policy(policy)
    if policy == "none":
        return {}
    if policy in BASELINES:
        BASELINES[policy](model)
        return {}
    if isinstance(model, Transformer):
        taper(model, {"attention": ["blocks.*.attn_norm"], "internal": ["blocks.*"], "all": ["*"]}[policy], bias=bias)
        return {}
    names, left = foldable_norms(model, bias)
    if policy == "attention":
        names = [name for name in names if role_of(model, name) == "attention"]
    if policy == "all":
        names.append(f"lm.{model.names.final_norm}")
    if not names:
        reasons = "; ".join(f"{name} is read by {', '.join(others)}" for name, others in left.items())
        raise TaperlitError(f"No norm in the blocks of {type(model.lm).__name__} can be folded ({reasons}).")
    taper(model, names, bias=bias)
    return left


def taper_as_saved(model: nn.Module, policy: Policy, saved: set[str]) -> None:
    """Give a model without values the norms that a checkpoint's weights are of.

    Args:
        model: plain, hollow.
        policy: the run's.
        saved: names in the checkpoint's state dict.
    """
    check_policy(policy)
    if policy == "none":
        return
    if policy in BASELINES:
        BASELINES[policy](model)
    elif names := [name.removesuffix(".alignment") for name in sorted(saved) if name.endswith(".alignment")]:
        taper(model, names)


def check_policy(policy: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        TaperlitError: names it.
    """
    if policy not in POLICIES:
        raise TaperlitError(f"model.taper is {policy!r}; choose {', '.join(POLICIES)}.")
