"""Which norms of our transformer a run tapers: ``model.taper`` as a policy of names."""

from typing import Literal

from taperlit.errors import TaperlitError
from taperlit.surgery import taper
from taperlit.transformer import Transformer

Policy = Literal["none", "internal", "all"]

TAPER_NAMES: dict[Policy, tuple[str, ...]] = {"none": (), "internal": ("blocks.*",), "all": ("*",)}
"""The policies, and the names of the norms that each tapers, as patterns."""


def apply_policy(model: Transformer, policy: Policy) -> None:
    """Taper a transformer's norms in place, as ``taperlit.taper`` does for any model.

    Args:
        model: plain.
        policy: ``none`` leaves it so; ``internal`` (Internal-Taper of arXiv:2602.10408) takes the norms in the blocks,
            and the final norm stays to anchor the scale; ``all`` (All-Taper) takes the final norm too.

    Raises:
        TaperlitError: there is no such policy.
    """
    check_policy(policy)
    if names := TAPER_NAMES[policy]:
        taper(model, names)


def check_policy(policy: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        TaperlitError: names it.
    """
    if policy not in TAPER_NAMES:
        raise TaperlitError(f"model.taper is {policy!r}; choose {', '.join(TAPER_NAMES)}.")
