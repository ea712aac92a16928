"""Which part of the gate's way each norm falls on, where they do not fall together."""

import fnmatch
from collections.abc import Mapping
from typing import Literal

from torch import nn

from taperlit.baselines.roles import role_of
from taperlit.errors import TaperlitError
from taperlit.norm import Stage, TaperNorm

Stages = Literal["depth", "kind"] | Mapping[str, Stage] | None
ORDER = ("mlp", "attention", "final")  # as FakeLN removes them


def stages_of(model: nn.Module, norms: Mapping[str, TaperNorm], stages: Stages) -> dict[str, Stage | None]:
    """Every norm's stage, see :meth:`taperlit.norm.TaperNorm.set_stage`; None is the global gate.

    Args:
        model: whose norms they are.
        norms: by name.
        stages: as GateSchedule takes them.

    Raises:
        TaperlitError: a norm's place is not known, or a pattern matches no norm.
    """
    if stages is None:
        return dict.fromkeys(norms)
    if isinstance(stages, Mapping):
        return _by_pattern(norms, stages)
    if stages == "depth":
        places = {name: _block(name) for name in norms}
        if all(place is None for place in places.values()):
            raise TaperlitError(
                f"GateSchedule.stages is depth, and no name of a norm has a block's number, such as "
                f"{next(iter(norms))}; give it patterns of names."
            )
        last = max(place for place in places.values() if place is not None) + 1
        return _shares({name: last if place is None else place for name, place in places.items()})
    return _shares({name: ORDER.index(_role(model, name)) for name in norms})


def _shares(places: Mapping[str, int]) -> dict[str, Stage | None]:
    """Equal parts of the gate's way, one after the other, for equal places in ascending order."""
    order = sorted(set(places.values()))
    count = len(order)
    stage = {place: ((count - i) / count, (count - i - 1) / count) for i, place in enumerate(order)}
    return {name: stage[place] for name, place in places.items()}


def _by_pattern(norms: Mapping[str, TaperNorm], stages: Mapping[str, Stage]) -> dict[str, Stage | None]:
    for pattern in stages:
        if not fnmatch.filter(norms, pattern):
            raise TaperlitError(
                f"GateSchedule.stages has {pattern!r}, which matches no tapered norm; they are {', '.join(norms)}."
            )

    def first(name: str) -> Stage | None:
        match = next((stage for pattern, stage in stages.items() if fnmatch.fnmatchcase(name, pattern)), None)
        return None if match is None else (match[0], match[1])

    return {name: first(name) for name in norms}


def _block(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _role(model: nn.Module, name: str) -> str:
    try:
        return role_of(model, name)
    except TaperlitError as error:
        raise TaperlitError(
            f"GateSchedule.stages is kind, and {name} is none of the attention, MLP and final norms whose names are "
            "known; give it patterns of names."
        ) from error
