"""When a run's norms were normalizing, being tapered, and linear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from taperlit.errors import TaperlitError
from taperlit.report.traces import Points
from taperlit.schedule import resolve_steps

ROUNDING = 1e-6  # of a gate in float32


class Zone(NamedTuple):
    """A phase as a stretch of optimizer steps, counted from 1.

    Args:
        name: ``warm-up``, ``taper`` or ``linear``.
        first: where it begins.
        last: where it ends.
    """

    name: str
    first: float
    last: float


@dataclass(frozen=True)
class Phases:
    """The boundaries of a run's gate.

    Args:
        warmup: last optimizer step at 1, counted from 1.
        end: first step at 0; None where the gate never got there and no schedule says when it would.
        source: what says so.
    """

    warmup: int
    end: int | None
    source: str

    def zones(self, last: int) -> list[Zone]:
        """The phases up to a step, as far as the run got."""
        end = last + 1 if self.end is None else self.end
        zones = [Zone("warm-up", 0, min(self.warmup, last)), Zone("taper", self.warmup, min(end, last))]
        zones = [zone for zone in zones if zone.last > zone.first]
        return [*zones, Zone("linear", end, last)] if last >= end else zones


def find_phases(config: Mapping[str, Any], saved: tuple[int, int] | None, gate: Points) -> Phases | None:
    """The boundaries of a run: from its checkpoint, else its config, else the gate's trace, which has the last word.

    A resumed run keeps the boundaries it began with, which its config may not tell.

    Args:
        config: the run's config.
        saved: the boundaries in its checkpoint, if it has any.
        gate: its trace.

    Returns:
        None of a run that has no gate, or whose trace begins after the taper and nothing else tells.
    """
    for pair, source in ((saved, "the checkpoint"), (_planned(config), "the config")):
        if pair is not None and _agrees(*pair, gate):
            return Phases(*pair, source)
    return _seen(gate)


def _planned(config: Mapping[str, Any]) -> tuple[int, int] | None:
    try:
        taper, trainer = config.get("taper") or {}, config["trainer"]
        specs = [taper.get("gate"), *(trainer.get("callbacks") or [])]
        gates = [spec for spec in specs if spec and spec["class_path"].rpartition(".")[2] == "GateSchedule"]
        if not gates:
            return None
        options = {"warmup": 0.05, "end": 0.5, **gates[0].get("init_args", {})}
        most = trainer["max_steps"]
        warmup, end = (resolve_steps(options[key], most, key) for key in ("warmup", "end"))
    except (KeyError, TypeError, AttributeError, TaperlitError):  # another program's config
        return None
    return warmup, end


def _agrees(warmup: int, end: int, gate: Points) -> bool:
    for step, g in gate:
        k = step + 1
        if (k <= warmup and g < 1 - ROUNDING) or (k >= end and g > ROUNDING):
            return False
        if warmup < k < end and g <= 0:
            return False
    return True


def _seen(gate: Points) -> Phases | None:
    """The boundaries as the trace has them, to the steps at which it was recorded."""
    ones = [step + 1 for step, g in gate if g >= 1 - ROUNDING]
    zeros = [step + 1 for step, g in gate if g <= ROUNDING]
    if not ones or ones[-1] == gate[-1][0] + 1:
        return None
    return Phases(ones[-1], zeros[0] if zeros else None, "the gate's trace, to the steps that it has")
