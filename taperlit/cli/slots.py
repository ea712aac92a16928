"""Which callbacks a run has: ``model.taper`` says it, slots override, and every run has a few of its own."""

import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from taperlit.callbacks import (
    AlignmentFreeze,
    BoundedWrites,
    DecayWithGate,
    EqualRows,
    FakeLNSchedule,
    FiniteGuard,
    FirstPosition,
    FoldOnEnd,
    GateHold,
    GateSchedule,
    LearningRateDip,
    LossTails,
    RngState,
    RunCheckpoint,
    ScaleAnchor,
    ShrinkMassive,
    StepProgressBar,
    TailPenalty,
    TaperMonitor,
    TokenThroughput,
)
from taperlit.callbacks.predictions import PredictionWriter
from taperlit.callbacks.run_summary import RunSummary
from taperlit.cli.overlays import walk
from taperlit.errors import TaperlitError
from taperlit.training.policy import POLICIES

Spec = dict[str, Any]  # class_path and init_args, as in YAML


class Slot(NamedTuple):
    """A callback that overlays and flags reach by name; a list, such as ``trainer.callbacks``, is only replaced whole.

    Args:
        purpose: for the help.
        kind: the callback that runs unless another is given.
        init_args: what it gets unless other values are given.
        tapers: it runs only where ``model.taper`` is one of these.
        on: it runs unless it is turned off; else only where it is turned on.
    """

    purpose: str
    kind: type[Callback]
    init_args: dict[str, Any]
    tapers: tuple[str, ...] = POLICIES
    on: bool = True

    @property
    def spec(self) -> Spec:
        """The default as in YAML."""
        return {"class_path": f"taperlit.{self.kind.__name__}", "init_args": dict(self.init_args)}


_GATED = ("attention", "internal", "all")  # a gate moves
SLOTS = {
    "gate": Slot("moves the gate", GateSchedule, {}, _GATED),
    "hold": Slot("lets the gate wait when training leaves its band", GateHold, {}, _GATED, on=False),
    "alignment": Slot("freezes the alignment scalars", AlignmentFreeze, {}, _GATED),
    "lr_dip": Slot("dips the learning rate where the taper begins", LearningRateDip, {}, _GATED, on=False),
    "decay": Slot("lets the weight decay go with the gate", DecayWithGate, {}, _GATED, on=False),
    "first": Slot("gives position 0 a scalar of its own for a while", FirstPosition, {}, _GATED, on=False),
    "massive": Slot("shrinks the units that write massive activations", ShrinkMassive, {}, _GATED, on=False),
    "rows": Slot("keeps the rows of the token embedding at one norm", EqualRows, {}, on=False),
    "writes": Slot("bounds what one direction writes to the residual stream", BoundedWrites, {}, on=False),
    "anchor": Slot("adds the scale loss", ScaleAnchor, {"module": "model.final_norm", "fade": 0.5}, _GATED),
    "tail": Slot(
        "holds down tokens of many times the mean scale",
        TailPenalty,
        {"residual": "model.final_norm"},
        _GATED,
        on=False,
    ),
    "fakeln": Slot("freezes the denominators, one norm after the other", FakeLNSchedule, {}, ("fakeln",)),
    "fold": Slot("writes the folded model at the end", FoldOnEnd, {"module": "model"}, (*_GATED, "fakeln")),
    "monitor": Slot("logs the taper's traces", TaperMonitor, {"residual": "model.final_norm", "logits": "model.head"}),
    "guard": Slot("stops at, or skips, a step that is not finite", FiniteGuard, {}),
    "tails": Slot("reports the tails of the token losses when a model is evaluated", LossTails, {}),
}
_AVERAGING = ("alignment", "anchor")  # the slots that taper.ema_rate is for
_NEEDED = {"gate": ("gate", "alignment", "fold"), "fakeln": ("fakeln", "fold")}  # what moves a taper, and its company


class Always(NamedTuple):
    """A callback that every run has, unless ``trainer.callbacks`` holds one of its kind.

    Args:
        kind: what counts as one.
        default: the class that runs.
        switch: the Trainer's option that turns it off, if there is one.
        only: the one command that it is for, or None.
    """

    kind: type[Callback]
    default: type[Callback]
    switch: str | None = None
    only: str | None = None


ALWAYS = (
    Always(ProgressBar, StepProgressBar, "enable_progress_bar"),
    Always(ModelSummary, RunSummary, "enable_model_summary"),
    Always(PredictionWriter, PredictionWriter, only="predict"),
    Always(TokenThroughput, TokenThroughput),
    Always(ModelCheckpoint, RunCheckpoint, "enable_checkpointing"),
    Always(RngState, RngState),
)


def add_slots(parser: LightningArgumentParser) -> None:
    """Add ``--taper.<slot>`` for every slot, and ``--taper.ema_rate``."""
    for name, slot in SLOTS.items():
        parser.add_argument(
            f"--taper.{name}",
            type=L.Callback | bool | None,
            default=slot.spec if slot.on else None,
            help=f"{slot.purpose}; true is {slot.kind.__name__}, false or null is none",
        )
    parser.add_argument(
        "--taper.ema_rate",
        type=float | None,
        default=None,
        help="of the moving averages of taper.alignment and taper.anchor; of this and a slot's own ema_rate the one "
        "that is given last counts, in one file the slot's own",
    )


class _Slots(NamedTuple):
    """What one option or file means for the slots.

    Args:
        arguments: as they were given.
        file: its name, where it is one.
        filled: slots that it gives options of, and that have no callback yet.
        off: those of them that stay off.
    """

    arguments: list[str]
    file: str | None
    filled: list[str]
    off: list[str]


def turn_on(args: Sequence[str]) -> list[str]:
    """The same arguments where an option of a slot's callback comes after the callback, also of a slot that is off.

    The parser knows a callback's options by its class. So a slot that has none when an option of it is given (it is off
    by default, or was given as true, false or null) is given its own callback first. But a file's options leave a slot
    off that was turned off before, unless they name its class, so that an overlay may say how a callback is without
    saying that it is there.

    Args:
        args: the command's arguments.
    """
    kept: list[str] = []
    for one in _slots(args):
        kept += [f"--taper.{name}={json.dumps(SLOTS[name].spec)}" for name in one.filled]
        kept += [*one.arguments, *(f"--taper.{name}=null" for name in one.off)]
    return kept


def stays_off(args: Sequence[str]) -> list[str]:
    """A line for each slot that a ``--config`` of a command has options of and that stays off."""
    return [
        f"taper.{slot} is off, so that its options in --config {one.file} have no effect."
        for one in _slots(args)
        for slot in one.off
    ]


def without_norms(args: Sequence[str], config: Namespace) -> list[str]:
    """A line for each slot that an option of a command turns on, and that ``model.taper`` keeps off.

    Args:
        args: the command's arguments.
        config: what they were parsed to.
    """
    given = {path[1] for _, file, leaves in walk(args) if file is None for path in leaves if path[0] == "taper"}
    policy = config.model.taper
    return [
        f"taper.{name} has no effect with model.taper {policy}: it is for {', '.join(slot.tapers)}."
        for name, slot in SLOTS.items()
        if name in given and policy not in slot.tapers and _spec(config.taper[name], slot) is not None
    ]


def _slots(args: Sequence[str]) -> Iterator[_Slots]:
    states = {name: "full" if slot.on else "empty" for name, slot in SLOTS.items()}
    for taken, file, leaves in walk(args):
        filled, off = [], []
        for name, slot in SLOTS.items():
            given = {path[2:]: value for path, value in leaves.items() if path[:2] == ("taper", name)}
            if ("class_path",) in given or isinstance(given.get(()), str):
                if states[name] != "full" and given.get(("class_path",)) == slot.spec["class_path"]:
                    filled.append(name)
                states[name] = "full"
            elif () in given:
                turned_off = given[()] is False or (given[()] is None and slot.on)
                states[name] = "off" if turned_off else "empty"
            elif given and states[name] != "full":
                filled.append(name)
                if states[name] == "off" and file is not None:
                    off.append(name)
                else:
                    states[name] = "full"
        yield _Slots(taken, file, filled, off)


def own_rates(args: Sequence[str]) -> set[str]:
    """The slots that keep their own ``ema_rate``: it is given after ``taper.ema_rate``, or in the same file.

    Values cannot tell, since a run's own config has both.

    Args:
        args: the command's arguments.
    """
    own: set[str] = set()
    for _, _, leaves in walk(args):
        if ("taper", "ema_rate") in leaves:
            own.clear()
        for name in _AVERAGING:
            if ("taper", name, "ema_rate") in leaves:
                own.add(name)
            elif ("taper", name) in leaves:  # true, false or null: what it had is gone
                own.discard(name)
    return own


def settle(config: Namespace, command: str, own: Collection[str]) -> dict[str, Any]:
    """Decide which callbacks run.

    Args:
        config: the parsed options of one command; left as it is.
        command: its name.
        own: see :func:`own_rates`.

    Returns:
        The options ``taper`` and ``trainer`` to put in place of the config's. With them the config lists every callback
        that runs, once, and is settled: the same callbacks run when it is given again. A slot that ``model.taper``
        alone keeps off is not among them: null would keep it off when the config is given again with another taper.

    Raises:
        TaperlitError: norms would be tapered and nothing would move their gate, or freeze their denominators.
    """
    listed = _listed(config.trainer)
    kinds = [class_of(callback) for callback in listed]
    taper: dict[str, Any] = {}
    for name, slot in SLOTS.items():
        spec = _spec(config.taper[name], slot)
        if spec is None or _has(kinds, class_of(spec)):
            taper[name] = None
        elif config.model.taper in slot.tapers:
            taper[name] = spec
    for name, needed in _NEEDED.items():
        slot = SLOTS[name]
        runs = taper.get(name) is not None or _has(kinds, slot.kind)
        if command == "fit" and config.model.taper in slot.tapers and not runs:
            raise TaperlitError(
                f"model.taper is {config.model.taper} and taper.{name} is off, so that nothing {slot.purpose}: give "
                f"{' '.join(f'--taper.{one}=true' for one in needed)}, or --model.taper=none."
            )
    for name in _AVERAGING:
        if name not in own:
            _share_rate(config.taper.ema_rate, taper.get(name))
    for kind, default, switch, only in ALWAYS:
        wanted = (switch is None or config.trainer[switch] is not False) and only in (None, command)
        if not wanted:
            listed = [callback for callback in listed if class_of(callback) is not default]
        elif not _has(kinds, kind):
            listed.append({"class_path": _path_of(default)})
    return {"taper": taper, "trainer": {"callbacks": [_plain(callback) for callback in listed]}}


def _listed(trainer: Namespace) -> list[Any]:
    given = trainer.callbacks or []
    return list(given) if isinstance(given, list) else [given]


def _spec(value: Any, slot: Slot) -> Spec | None:
    if value is None or value is False:
        return None
    return slot.spec if value is True else _plain(value)


def _plain(spec: Any) -> Spec:
    return spec.as_dict() if isinstance(spec, Namespace) else spec


def class_of(spec: Any) -> type[Callback]:
    """The class that a callback's ``class_path`` names, which is imported."""
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)


def _path_of(kind: type[Callback]) -> str:
    package = kind.__module__.split(".")[0]
    return f"{'lightning.pytorch.callbacks' if package == 'lightning' else kind.__module__}.{kind.__name__}"


def _has(kinds: Iterable[type[Callback]], kind: type[Callback]) -> bool:
    return any(issubclass(one, kind) for one in kinds)


def _share_rate(rate: float | None, spec: Spec | None) -> None:
    if rate is not None and spec is not None and "ema_rate" in inspect.signature(class_of(spec)).parameters:
        spec.setdefault("init_args", {})["ema_rate"] = rate
