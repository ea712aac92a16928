"""The peers of the taper, in the same harness: FakeLN, DyT and Derf, put into any model by the same surgery.

FakeLN (arXiv:2507.02559) freezes the denominators one by one; DyT (arXiv:2503.10622) and Derf put a squashing function
in a norm's place, for good.
"""

from collections.abc import Callable

from torch import nn

from taperlit.baselines.fakeln import FakeLN, apply_fakeln
from taperlit.baselines.pointwise import Derf, DyT, apply_derf, apply_dyt

BASELINES: dict[str, Callable[[nn.Module], list[str]]] = {
    "fakeln": apply_fakeln,
    "dyt": apply_dyt,
    "derf": apply_derf,
}
"""What each of the dials ``model.taper: fakeln | dyt | derf`` does to a plain model, in place."""

__all__ = ["BASELINES", "Derf", "DyT", "FakeLN", "apply_derf", "apply_dyt", "apply_fakeln"]
