"""Shrink the few units that write massive activations, before the norms that hide them are tapered away."""

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from taperlit.callbacks.submodule import first_input
from taperlit.distributed import gather
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, plain_name, shared_gate
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.surgery import require_tapered


class Massive(NamedTuple):
    """The massive units of one linear map.

    Args:
        units: their indices, ascending.
        times: how often the residual's typical size they write together, at most.
        factor: that the columns of their weights shrink by in the end.
    """

    units: tuple[int, ...]
    times: float
    factor: float


class ShrinkMassive(L.Callback):
    """Takes massive activations out of a pretrained model while its norms are still there.

    In most pretrained models a few hidden units of one or two MLPs write a residual at the first token that is a
    hundred times the others' and that nothing but the norms takes out again. Norms only see its direction, so these
    units' outgoing weights can be made smaller almost without a change of the function, and training mends the rest; a
    linear map in the norms' place would pass the whole size on.

    In the steps up to ``begin`` it measures each unit of every linear map from more than ``d_model`` inputs to
    ``d_model`` outputs, which are the MLPs' second ones: the largest root mean square over tokens of what the unit
    alone writes, ``|a_j| ||w_j|| / sqrt(d_model)``, against the median over tokens of the residual's at the next
    tapered norm. Units above ``multiple`` times it are massive. Then, in equal factors per step, their columns shrink
    until the sum of what they write is ``multiple`` times it at step ``end``. Massive units of later blocks mostly take
    away what earlier ones wrote, so that each map's units shrink by no less than those before them.

    It changes weights, and these are saved as any; what is left to do is in the checkpoint. A step's factor is close to
    1, and bfloat16 would round it away: what rounding takes is kept, in the checkpoint too, and made good in the next
    step. It works beside DDP; the weights must be whole and trained on every process. Under ``fast_dev_run`` it
    measures in the first step and shrinks in the second.

    Example::

        Trainer(max_steps=300, callbacks=[GateSchedule(0.2, 0.6), AlignmentFreeze(), ShrinkMassive(end=0.1)])

    Args:
        multiple: of the residual's median root mean square: what is more is massive.
        begin: last step of measuring, in steps (int) or as a fraction of ``max_steps`` (float).
        end: step from which all is as small as it gets, likewise; within the gate's warm-up.

    Raises:
        TaperlitError: a value out of its range; before the first step, if the model has no TaperNorm or no linear map
            of that kind, ``end`` is not between ``begin`` and the end of the warm-up, the gate is below 1, or a resumed
            run is past ``begin`` and had no ShrinkMassive; in it,
            if a massive weight is sharded or not trained.
    """

    def __init__(self, multiple: float = 4.0, begin: int | float = 2, end: int | float = 0.1) -> None:
        require_range("ShrinkMassive.multiple", multiple, least=1)
        require_steps("ShrinkMassive.begin", begin, least=1)
        require_steps("ShrinkMassive.end", end, least=2)
        if isinstance(begin, float) == isinstance(end, float):
            require_range("ShrinkMassive.end", end, above=begin, mend="raise it, or lower begin")
        self.multiple, self.begin, self.end = multiple, begin, end
        self._forget()

    def _forget(self) -> None:
        self._stop_listening()
        self._deaf = False
        self._seen: dict[str, tuple[int, Tensor, float]] = {}  # batches, largest per unit, mean of the medians
        self._found: dict[str, Massive] | None = None  # once measured
        self._applied = 0  # the last optimizer step whose share of the shrinking is in the weights
        self._steps: tuple[int, int] | None = None
        self._lost: dict[str, Tensor] = {}  # by map, what rounding took from its massive columns: (d_model, units)
        self._peaks: dict[str, Tensor] = {}  # of the batch under way, likewise
        self._medians: dict[str, list[Tensor]] = defaultdict(list)
        self._since_norm: list[str] = []  # the maps that ran since the last norm did

    def _stop_listening(self) -> None:
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the boundaries, which the gate's schedule has announced by now, and listen if nothing is known yet."""
        norms = require_tapered(pl_module, "ShrinkMassive")
        gate = shared_gate(pl_module)
        if self._steps is None:
            self._steps = (
                (1, 2)
                if trainer.fast_dev_run
                else (
                    resolve_steps(self.begin, trainer.max_steps, "ShrinkMassive.begin"),
                    resolve_steps(self.end, trainer.max_steps, "ShrinkMassive.end"),
                )
            )
        begin, end = self._steps
        if not 1 <= begin < end:
            raise TaperlitError(f"ShrinkMassive ends at step {end} and begins after step {begin}; raise end.")
        if self._applied >= end:
            return
        warmup = None if gate is None else gate.plan.warmup
        if warmup is not None and end > warmup and not trainer.fast_dev_run:
            raise TaperlitError(
                f"ShrinkMassive ends at step {end}, and the gate begins to fall after step {warmup}: lower "
                "ShrinkMassive.end, or raise the gate's warmup."
            )
        if gate is not None and gate.value.item() < 1:
            raise TaperlitError(
                "ShrinkMassive came to a gate that is below 1 already; shrink before the taper, or go on without."
            )
        if self._found is None and not self._seen and trainer.global_step >= begin:
            raise TaperlitError(
                f"ShrinkMassive came after step {begin}, up to which it measures; begin anew with it, or go on without."
            )
        if self._found is None:
            self._listen(pl_module, norms)

    def _listen(self, pl_module: nn.Module, norms: dict[str, TaperNorm]) -> None:
        width = max(norm.kind.shape[-1] for norm in norms.values())

        def writes(module: nn.Module) -> bool:
            columns = _columns(module)
            return columns is not None and columns.dim() == 2 and columns.shape[0] == width < columns.shape[1]

        maps = {name: module for name, module in pl_module.named_modules() if writes(module)}
        if not maps:
            raise TaperlitError(
                f"ShrinkMassive finds no linear map from more than {width} inputs to {width} outputs; leave it out."
            )
        for name, module in maps.items():
            self._hooks.append(module.register_forward_pre_hook(partial(self._on_map, name), with_kwargs=True))
        for norm in norms.values():
            self._hooks.append(norm.register_forward_pre_hook(self._on_norm, with_kwargs=True))

    @torch.no_grad()
    def _on_map(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        columns = _columns(module)
        if columns is None or not module.training or self._deaf:
            return
        size = columns.detach().float().square().mean(0).sqrt()  # (d_in,), what a unit writes per activation
        peaks = first_input(module, args, kwargs).detach().float().flatten(0, -2).abs().amax(0) * size
        self._peaks[name] = torch.maximum(self._peaks.get(name, peaks), peaks)
        self._since_norm.append(name)

    @torch.no_grad()
    def _on_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._since_norm:
            median = first_input(norm, args, kwargs).detach().float().square().mean(-1).sqrt().median()
            for name in self._since_norm:
                self._medians[name].append(median.cpu())
            self._since_norm.clear()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stop listening: checkpointed blocks run forward again in the backward pass, the last one first."""
        self._deaf = True
        self._since_norm.clear()  # no tapered norm comes after the last

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Shrink once at the beginning of each optimizer step after ``begin``."""
        self._deaf = False
        step = trainer.global_step + 1
        begin, end = cast(tuple[int, int], self._steps)
        if not begin < step <= end or step <= self._applied:
            return
        if self._found is None:
            self._stop_listening()
            self._found = self._judge()
            self._tell(begin, end)
        for name, one in self._found.items():
            _shrink(pl_module, name, one.units, one.factor ** (1 / (end - begin)), self._lost)
        self._applied = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take in what every process saw in this batch, so that all shrink alike, and a checkpoint knows it."""
        if not self._hooks:
            return
        mine = ({name: peak.cpu() for name, peak in self._peaks.items()}, self._medians)
        self._peaks, self._medians = {}, defaultdict(list)
        for peaks, medians in gather(mine):
            for name, values in medians.items():
                before, peak, median = self._seen.get(name, (0, peaks[name], 0.0))
                count = before + len(values)
                median += (torch.stack(values).mean().item() - median) * len(values) / count
                self._seen[name] = count, torch.maximum(peak, peaks[name]), median

    def _judge(self) -> dict[str, Massive]:
        found: dict[str, Massive] = {}
        smallest = 1.0
        for name, (_, peak, median) in self._seen.items():  # in the order in which they run
            units = (peak > self.multiple * median).nonzero().flatten().tolist()
            if units and median > 0:
                times = peak[units].sum().item() / median
                smallest = min(smallest, self.multiple / times)
                found[name] = Massive(tuple(units), times, smallest)
        return found

    def _tell(self, begin: int, end: int) -> None:
        assert self._found is not None
        for name, (units, times, factor) in self._found.items():
            rank_zero_info(
                f"ShrinkMassive: {len(units)} of the inputs of {name} write up to {times:.0f} times the residual's "
                f"median; their weights shrink by {factor:.2g} in steps {begin + 1} to {end}."
            )
        if not self._found:
            rank_zero_info(f"ShrinkMassive: no unit writes {self.multiple:g} times the residual's median.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """What was seen and found, and how far the shrinking is."""
        found = self._found
        return {
            "seen": dict(self._seen),
            "found": None if found is None else {name: tuple(one) for name, one in found.items()},
            "applied": self._applied,
            "steps": self._steps,
            "lost": {name: lost.cpu() for name, lost in self._lost.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the resumed run was."""
        found = state_dict["found"]
        self._seen = dict(state_dict["seen"])
        self._found = None if found is None else {name: Massive(*one) for name, one in found.items()}
        self._applied, self._steps = state_dict["applied"], state_dict["steps"]
        self._lost = dict(state_dict.get("lost", {}))  # which checkpoints of before do not have


def _columns(module: nn.Module) -> Tensor | None:
    """The weight of a linear map as (d_out, d_in), a view; None of another module."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return weight
    # transformers' Conv1D, of GPT-2, keeps (d_in, d_out); its class would have to be imported to be asked.
    return weight.T if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) else None


@torch.no_grad()
def _shrink(pl_module: nn.Module, name: str, units: tuple[int, ...], factor: float, lost: dict[str, Tensor]) -> None:
    module = pl_module.get_submodule(name)
    columns = _columns(module)
    assert columns is not None
    if isinstance(columns, DTensor) or columns.dim() != 2 or not module.weight.requires_grad:
        raise TaperlitError(
            f"ShrinkMassive would shrink weights of {plain_name(name)}, which are sharded or not trained; run it on "
            "whole weights that are all trained (one process or DDP, no LoRA), or leave it out."
        )
    exact = columns[:, list(units)].to(torch.promote_types(columns.dtype, torch.float32))
    if name in lost:
        exact += lost[name].to(exact)
    exact *= factor
    columns[:, list(units)] = exact.to(columns.dtype)
    if exact.dtype != columns.dtype:
        lost[name] = exact - columns[:, list(units)]
