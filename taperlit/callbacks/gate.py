"""Drive the global gate from 1 to 0."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from taperlit.callbacks.drift import Drift
from taperlit.callbacks.plan import forget_plan
from taperlit.callbacks.stages import stages_of
from taperlit.distributed import mean_over_ranks, reshard
from taperlit.errors import TaperlitError
from taperlit.norm import Gate, GatePlan, Phase, Stage, TaperNorm, shared_gate
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.surgery import missing_gains, require_tapered


class GateSchedule(L.Callback):
    """Holds the gate at 1 during warm-up, then takes it to 0 (arXiv:2602.10408, section 3).

    During optimizer step k, counted from 1: ``g = 1`` for ``k <= warmup``, ``g = 0`` for ``k >= end``, and between them
    ``(1 + cos(pi (k - warmup) / (end - warmup))) / 2``, or a straight line. It also takes the parameters that the
    current phase leaves idle out of the optimizer's reach, so that they neither decay nor gather moments; but for those
    that another module has too and still uses.

    Steps are those that ``trainer.global_step`` and ``max_steps`` count. With manual optimization these are the steps
    of all optimizers together, so that a batch in which two optimizers step is two steps; the gate moves between
    batches only. Under ``fast_dev_run`` the warm-up is the first step and the end the last, so that every phase is
    tried.

    Another callback may delay it, see :class:`taperlit.GateHold`: the formula's ``k`` is then the step less the delay.

    With ``warmup="auto"`` the gate is held at 1 until the estimates of the alignment scalars have settled: after the
    first step, from ``least`` to ``latest``, in which none drifts by more than ``settle``, relative and per step, on
    average over about the last ten steps. While the residual still grows ``c`` drifts by several percent per step, and
    a ``c`` that is frozen then does not fit later. ``end`` stays where it is. The decision is told in a line, and the
    callbacks that freeze something at the end of the warm-up wait for it.

    With ``stages`` the norms do not fall together: each has a gate of its own, which goes from 1 to 0 while the global
    gate goes from the stage's ``high`` to its ``low``. ``depth`` gives the blocks equal parts of the way, one after the
    other, the first block first and the final norm last: what a block without norms lets through still meets the norms
    of those behind it. ``kind`` does so with the norms before the MLPs, then those before attention, then the final
    one, as FakeLN removes them. A mapping gives stages by patterns of names; the first that matches counts, and a norm
    that none matches falls with the global gate. Every norm's scalar is frozen, and its gains copied, where its own
    gate begins to fall. Stages are saved with the norms.

    A resumed run keeps the boundaries it began with, and the delay. A new run never raises the gate of weights that
    are tapered already, see ``closed``.

    It needs somebody to freeze the alignment scalars at the end of the warm-up: an AlignmentFreeze beside it.

    Example::

        taperlit.taper(model)
        trainer = Trainer(max_steps=1000, callbacks=[GateSchedule(warmup=0.05, end=0.5), AlignmentFreeze()])

    Args:
        warmup: last step at 1, in steps (int) or as a fraction of ``max_steps`` (float), or ``auto``.
        end: first step at 0, in steps (int) or as a fraction of ``max_steps`` (float).
        shape: ``cosine`` or ``linear``.
        closed: what to do with a gate that is lower than the schedule begins, as in weights of a run that is over:
            ``refuse`` them, or ``keep`` the gate as it is until the schedule falls below it.
        settle: with ``auto``, the drift of ``c`` per step below which it counts as settled.
        least: with ``auto``, the warm-up is no shorter, in steps (int) or as a fraction of ``max_steps`` (float).
        latest: with ``auto``, the warm-up is no longer, likewise.
        stages: None, ``depth``, ``kind``, or ``(high, low)`` by glob patterns over the norms' names.

    Raises:
        TaperlitError: a value out of its range, or boundaries out of order; before the first step, if the model has no
            TaperNorm, nobody will freeze its alignment scalars, the optimizers miss parameters of the linear branch,
            the gate is lower than the schedule begins, the boundaries are out of order or beyond the run, a stage
            cannot be told, or a resumed run has others.
    """

    def __init__(
        self,
        warmup: int | float | Literal["auto"] = 0.05,
        end: int | float = 0.5,
        shape: Literal["cosine", "linear"] = "cosine",
        closed: Literal["refuse", "keep"] = "refuse",
        settle: float = 0.01,
        least: int | float = 0.05,
        latest: int | float = 0.3,
        stages: Literal["depth", "kind"] | dict[str, tuple[float, float]] | None = None,
    ) -> None:
        if isinstance(stages, str) and stages not in ("depth", "kind"):
            raise TaperlitError(f"GateSchedule.stages is {stages!r}; choose depth or kind, or give patterns of names.")
        if isinstance(warmup, str) and warmup != "auto":
            raise TaperlitError(f"GateSchedule.warmup is {warmup!r}; give steps, a fraction of the run, or auto.")
        self._check_steps(warmup, end, least, latest)
        require_range("GateSchedule.settle", settle, above=0)
        if isinstance(stages, Mapping):
            for pattern, (high, low) in stages.items():
                if not 0 <= low < high <= 1:
                    raise TaperlitError(
                        f"GateSchedule.stages has {(high, low)} for {pattern!r}; it must be 0 <= low < high <= 1."
                    )
        if shape not in ("cosine", "linear"):
            raise TaperlitError(f"GateSchedule.shape is {shape!r}; choose cosine or linear.")
        if closed not in ("refuse", "keep"):
            raise TaperlitError(f"GateSchedule.closed is {closed!r}; choose refuse or keep.")
        self.warmup, self.end, self.shape, self.closed = warmup, end, shape, closed
        self.settle, self.least, self.latest, self.stages = settle, least, latest, stages
        self._forget()

    @staticmethod
    def _check_steps(warmup: int | float | str, end: int | float, least: int | float, latest: int | float) -> None:
        """What is wrong in a run of any length; two boundaries can be compared where both are steps or fractions."""
        require_steps("GateSchedule.end", end, least=1)
        require_steps("GateSchedule.least", least)
        require_steps("GateSchedule.latest", latest)
        longest = latest
        if not isinstance(warmup, str):
            require_steps("GateSchedule.warmup", warmup)
            longest = warmup
        elif isinstance(least, float) == isinstance(latest, float):
            require_range("GateSchedule.latest", latest, least=least, mend="raise it, or lower least")
        if isinstance(longest, float) == isinstance(end, float):
            lower = "latest" if isinstance(warmup, str) else "warmup"
            require_range("GateSchedule.end", end, above=longest, mend=f"lower {lower}, or raise end")

    def _forget(self) -> None:
        self._boundaries: tuple[int, int] | None = None
        self._longest: int | None = None  # the warm-up may be, while it waits for the scalars to settle
        self._drift = Drift()
        self._begun = 0  # the global step as the batch under way began
        self._norms: list[TaperNorm] = []
        self._owners: Counter[nn.Parameter] = Counter()  # how many modules have a parameter
        self._stages: dict[str, Stage | None] = {}  # asked for, by norm
        self._ceiling = 1.0  # the gate of weights that were tapered before, if it is kept
        self._plan = GatePlan()  # of this fit; what others write there is read here also when the fit is over
        self._delay = self._used = 0  # that a checkpoint brings: from its next step on, and in its last one

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()
            forget_plan(pl_module)

    @property
    def _gate(self) -> Gate:
        return self._norms[0].gate

    def boundaries(self, trainer: L.Trainer) -> tuple[int, int]:
        """Last step at 1, as far as it is known, and first step at 0, in optimizer steps."""
        if self._boundaries is None:
            if trainer.fast_dev_run:
                self._boundaries = (1, max(2, trainer.max_steps))
                return self._boundaries
            end = resolve_steps(self.end, trainer.max_steps, "GateSchedule.end")
            if isinstance(self.warmup, str):
                warmup = resolve_steps(self.least, trainer.max_steps, "GateSchedule.least")
                longest = resolve_steps(self.latest, trainer.max_steps, "GateSchedule.latest")
                if longest < warmup:
                    raise TaperlitError(
                        f"GateSchedule's warm-up takes {warmup} steps at least and {longest} at most; raise latest."
                    )
                self._longest = longest
            else:
                warmup = longest = resolve_steps(self.warmup, trainer.max_steps, "GateSchedule.warmup")
            if end <= longest:
                raise TaperlitError(f"GateSchedule ends at step {end}, not after its warm-up of {longest}; raise end.")
            self._boundaries = (warmup, end)
        return self._boundaries

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and the boundaries, and announce the warm-up at the gate."""
        self._norms = list(require_tapered(pl_module, "GateSchedule").values())
        shared_gate(pl_module)  # there is one
        self._set_stages(trainer, pl_module)
        self._announce(*self.boundaries(trainer))

    def _set_stages(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the norms of a new run their stages; one that goes on has them, or gets them from its checkpoint."""
        norms = require_tapered(pl_module, "GateSchedule")
        self._stages = stages_of(pl_module, norms, self.stages)
        if self._gate.phase is not Phase.NORMALIZE:
            return
        for name, norm in norms.items():
            stage = self._stages[name]
            late = (norm.stage is None) != (stage is None)
            if late and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
                raise TaperlitError(
                    f"The weights that are averaged were copied before GateSchedule could set the stage of {name}; "
                    f"call set_stage({stage}) of the norm right after taperlit.taper(model)."
                )
            if norm.stage is not None or stage is not None:
                norm.set_stage(stage)

    def _check_stages(self, pl_module: L.LightningModule) -> None:
        for name, norm in require_tapered(pl_module, "GateSchedule").items():
            has = None if norm.stage is None else norm.stage.tolist()
            asked = self._stages[name]
            if has != (None if asked is None else torch.tensor(asked, dtype=torch.float32).tolist()):
                raise TaperlitError(
                    f"The run to resume has the stage {has} for {name} and GateSchedule.stages asks for {asked}; give "
                    "it the stages that the run began with."
                )

    def _announce(self, warmup: int, end: int) -> None:
        plan = self._plan = self._gate.plan
        plan.warmup, plan.end, plan.shape, plan.delay = warmup, end, self.shape, self._delay

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what only now is there in every strategy: the others' announcements, the optimizers, the weights."""
        if not self._gate.plan.alignment and not all(norm.frozen for norm in self._norms):
            raise TaperlitError("GateSchedule without AlignmentFreeze: add AlignmentFreeze() to the callbacks.")
        reshard(trainer)  # of the sanity check
        if missing := missing_gains(pl_module, trainer.optimizers):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise TaperlitError(
                f"No optimizer holds {', '.join(missing[:3])}{more}, which remain when the norms are gone: taper the "
                "model before configure_optimizers gathers its parameters, or give taper the optimizers, "
                "taper(model, optimizers=...)."
            )
        self._check_stages(pl_module)
        # Module by module, for one that stands in two places uses its parameters in one phase.
        self._owners = Counter(p for module in pl_module.modules() for p in module.parameters(recurse=False))
        g, planned = self._gate.value.item(), self._plan.gate(trainer.global_step + 1)
        # What a resumed run left may be lower than it goes on with, if the gate has just been sent back.
        left = min(planned, self._plan.gate(trainer.global_step + self._plan.delay - self._used))
        if g < left - 1e-6:  # more than float32's rounding
            if self.closed == "refuse":
                raise TaperlitError(
                    f"The gate is {g:.3g} already and GateSchedule would set it to {planned:.3g} again: resume the run "
                    'with ckpt_path, or train on with the gate as it is with GateSchedule(closed="keep").'
                )
            self._ceiling = g

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set the gate for the optimizer step that this batch belongs to."""
        self._begun = trainer.global_step
        self._used = self._plan.delay
        self._gate.set(min(self._plan.gate(trainer.global_step + 1), self._ceiling))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """After an optimizer step of a warm-up that waits: see whether the scalars have settled."""
        if self._longest is None or trainer.global_step == self._begun:
            return
        step, (warmup, end) = trainer.global_step, self.boundaries(trainer)
        self._drift.update(torch.stack([norm.alignment_estimate for norm in self._norms]))
        # Averaged, so that no rounding lets one process begin without the others.
        drift = mean_over_ranks(trainer, self._drift.largest.to(trainer.strategy.root_device)).item()
        if step >= warmup and (drift <= self.settle or step >= self._longest):
            rank_zero_info(
                f"GateSchedule: the gate begins to fall after step {step}, "
                + ("its latest: " if drift > self.settle else "")
                + f"the alignment scalars drift by up to {drift:.2%} per step."
            )
            self._longest, warmup = None, step
        else:
            warmup = max(warmup, step + 1)  # the next step is at 1 too
        self._boundaries = warmup, end
        self._plan.warmup = warmup

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hide the idle parameters: an optimizer skips what has no gradient, its decay and moments included."""
        idle = Counter(parameter for norm in self._norms for parameter in norm.idle_parameters())
        for parameter, times in idle.items():
            if times >= self._owners[parameter]:  # else a module that is not idle has it too, such as a tied norm
                parameter.grad = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the phase follow averaged weights, which Lightning's WeightAveraging swaps in through ``.data``."""
        if batch_idx == 0:
            self._refresh()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the phase follow the weights of training, swapped back in."""
        self._refresh()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the phase follow the weights that the fit leaves."""
        self._refresh()

    def _refresh(self) -> None:
        if self._norms:
            self._gate.refresh()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model, and take the announcement back."""
        self._norms = []
        self._owners.clear()
        forget_plan(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The boundaries, the delays of the step to come and of the last, and what an auto warm-up waits for."""
        return {
            "boundaries": list(self._boundaries or ()),
            "delay": [self._plan.delay, self._used],
            "longest": self._longest,
            "drift": self._drift.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the boundaries and the delay of the resumed run, and announce them.

        Some strategies restore only after ``on_fit_start``.
        """
        self._delay, self._used = state_dict.get("delay", (0, 0))
        self._longest = state_dict.get("longest")
        self._drift = Drift(**state_dict.get("drift", {}))
        if state_dict["boundaries"]:
            self._boundaries = warmup, end = tuple(state_dict["boundaries"])
            if self._norms:
                self._announce(warmup, end)
