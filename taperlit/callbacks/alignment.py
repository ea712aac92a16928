"""Gather the alignment statistics and freeze every layer's scalar at the boundary."""

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch

from taperlit.callbacks.gradients import has_gradients
from taperlit.callbacks.moments import carry_moments, check_optimizers
from taperlit.callbacks.plan import Boundary, find_boundary, forget_plan
from taperlit.distributed import keep_buffers_float32, mean_over_ranks, whole_parameters
from taperlit.errors import TaperlitError
from taperlit.norm import AlignmentFit, Gate, Phase, TaperNorm, set_alignment_fit, shared_gate, update_alignment
from taperlit.ranges import require_range, require_steps
from taperlit.surgery import require_tapered


class AlignmentFreeze(L.Callback):
    """Freezes ``c``, and copies gains and biases to the linear branch, when the gate's warm-up ends.

    Until then it updates every layer's moving averages once per optimizer step, from all its micro-batches and all
    ranks (arXiv:2602.10408, section 3). A step counts if it has gradients and its statistics are finite. With manual
    optimization that is once per batch in which an optimizer steps, be it one or several.

    With ``track`` the boundary only copies gains and biases. The moving averages are updated on while the gate falls,
    and every step uses the ``c`` that they give, until the step in which the gate is at ``track`` or below: after it
    ``c`` is frozen for good, also if the gate goes back. The residual may still grow when the warm-up ends, and a ``c``
    that is frozen then does not fit it later. It takes two passes over each norm's input per step of the taper.

    The optimizer's moments of gains and biases are zero in the linear branch when the boundary makes it, so that its
    first steps are as large as those of a run's beginning. With ``moments`` they are copied along, ``exp_avg``,
    ``exp_avg_sq`` and ``step``.

    A norm with a gate of its own (see GateSchedule's ``stages``) has its boundary where that begins to fall.

    Which scalars are frozen stands in the norms (``TaperNorm.frozen``) and is saved with them. Weights that are past
    the boundary stay as they are; those that begin a new run at gate 1 are measured and frozen anew, without what an
    earlier run that stopped on the way had measured.

    ``c`` is ``E[w / r] / E[w]`` with ``w`` by ``fit``, see :class:`taperlit.norm.AlignmentFit`: under the paper's, the
    few tokens of pretrained models that have a huge residual decide alone. Other fits set them free to explode, unless
    the first position has a scalar of its own: see :class:`taperlit.FirstPosition`.

    Example::

        Trainer(max_steps=1000, callbacks=[GateSchedule(), AlignmentFreeze()])
        # a pretrained model
        Trainer(max_steps=1000, callbacks=[GateSchedule(), AlignmentFreeze(), FirstPosition()])

    Args:
        at: freeze after this many steps (int) or fraction of ``max_steps`` (float); None is the end of the
            GateSchedule's warm-up.
        ema_rate: rate of the moving averages, per optimizer step.
        fit: ``energy`` is the paper's, ``w = ||h D||^2``; ``token`` weighs every token alike, ``w = 1``.
        skip: leave out this many positions at the beginning of each sequence; the norms' inputs must then be
            (B, T, *shape).
        track: the gate, in [0, 1), down to which ``c`` follows its statistics; None freezes it at the boundary, as the
            paper does.
        moments: give the linear branch the optimizer's moments of what it is copied from; the optimizers must be
            torch's Adam or AdamW, and not under FSDP1.

    Raises:
        TaperlitError: ``ema_rate`` is not in (0, 1], ``track`` not in [0, 1), there is no such fit, or ``skip`` is
            negative; a resumed run began with another fit, or was tracking and ``track`` is None; before the first
            step, if the model has no TaperNorm, the boundary is unknown or after the gate's warm-up, ``at`` is given
            and a norm has a gate of its own, the gate is below 1 and a norm was never frozen, the optimizers have no
            moments that could be copied, or the first position has a scalar of its own and there is no FirstPosition;
            at the boundary, if a layer has no usable statistics, or no moments (it is named).
    """

    def __init__(
        self,
        at: int | float | None = None,
        ema_rate: float = 0.01,
        fit: Literal["energy", "token"] = "energy",
        skip: int = 0,
        track: float | None = None,
        moments: bool = False,
    ) -> None:
        require_range("AlignmentFreeze.ema_rate", ema_rate, above=0, most=1)
        require_range("AlignmentFreeze.skip", skip, least=0)
        require_range("AlignmentFreeze.track", track, least=0, below=1)
        require_steps("AlignmentFreeze.at", at, least=1)
        self.at, self.ema_rate, self.fit = at, ema_rate, AlignmentFit(fit, skip)
        self.track, self.moments = track, moments
        self._norms: dict[str, TaperNorm] = {}
        self._forget()

    def _forget(self) -> None:
        self._stop_tracking(self._norms)
        self._norms = {}
        self.frozen = False  # every norm is past its boundary
        self._open: set[str] = set()  # the norms before their boundary
        self._tracked: set[str] = set()  # those after it whose scalars still follow
        self._boundary = Boundary()
        self._counts = False  # an optimizer stepped in this batch, and with gradients
        self._stepped = False
        self._updated: int | None = None  # the global step of the last update

    def _stop_tracking(self, names: Iterable[str]) -> None:
        for name in names:
            self._norms[name].tracks = False

    @property
    def _gate(self) -> Gate:
        return next(iter(self._norms.values())).gate

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit, and keep the statistics in float32 in every strategy."""
        keep_buffers_float32(trainer)
        if stage == "fit":
            self._forget()
            forget_plan(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model, tell its norms the fit, and announce at the gate that somebody will freeze."""
        self._norms = require_tapered(pl_module, "AlignmentFreeze")
        shared_gate(pl_module)  # there is one
        set_alignment_fit(pl_module, self.fit)
        self._gate.plan.alignment = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the boundary, see which scalars are frozen, and drop what a tuner's trial steps left behind."""
        gate = self._gate
        self._forget_batches()
        if gate.first is not None and gate.first.item() and not gate.plan.first:
            raise TaperlitError(
                "The first position has a scalar of its own, which nobody will take away: add FirstPosition() to the "
                "callbacks."
            )
        self._open = {name for name, norm in self._norms.items() if not norm.frozen}
        self.frozen = not self._open
        self._tracked -= self._open  # of a resumed run
        for name in self._tracked:
            self._norms[name].tracks = True
        if self.moments:
            check_optimizers(trainer, "AlignmentFreeze(moments=True)")
        if gate.phase is not Phase.NORMALIZE:
            for name, norm in self._norms.items():
                if name in self._open and norm.phase is not Phase.NORMALIZE:
                    raise TaperlitError(
                        f"{name} was never frozen and the gate is {gate.value.item():.3g}, where no statistics can be "
                        "gathered; begin with taperlit.norm.shared_gate(model).set(1.0)."
                    )
            return
        self._boundary = find_boundary(trainer, pl_module, self.at, "AlignmentFreeze")
        staged = next((name for name, norm in self._norms.items() if norm.stage is not None), None)
        if self.at is not None and staged is not None:
            raise TaperlitError(
                f"{staged} has a gate of its own and freezes where that begins to fall; leave AlignmentFreeze.at out."
            )
        if gate.plan.warmup is not None and self._boundary.step > gate.plan.warmup:
            raise TaperlitError(
                f"AlignmentFreeze.at is step {self._boundary.step}, after the gate's warm-up of {gate.plan.warmup} "
                "steps, when the scalars are in use already; leave at= out."
            )
        # A new run, where an earlier one that was stopped may have left averages, maybe of another fit; or an old one
        # whose boundary has moved on.
        if trainer.global_step == 0 or (not self._open and trainer.global_step < self._boundary.step):
            for norm in self._norms.values():
                norm.forget_alignment()
            self._stop_tracking(self._tracked)
            self._open, self._tracked, self.frozen = set(self._norms), set(), False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Freeze, once the warm-up's last step is done and before the first forward pass of the next."""
        if self.frozen or trainer.global_step < self._boundary.step:
            return
        # The gate of the step to come, which the schedule may have set by now or not.
        g = self._gate.plan.gate(trainer.global_step + 1)
        due = {n: norm for n, norm in self._norms.items() if n in self._open and _begins_to_fall(norm, g)}
        if not due:
            return
        with whole_parameters(trainer):
            for name, norm in due.items():
                try:
                    norm.freeze()
                except TaperlitError as error:
                    raise TaperlitError(f"{name}: {error}") from error
        if self.moments:
            carry_moments(due, trainer.optimizers)
        self._open -= due.keys()
        self.frozen = not self._open
        if self.track is not None:
            self._tracked |= due.keys()
            for norm in due.values():
                norm.tracks = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the moving averages from this step's batches."""
        self._stepped = True
        self._counts |= has_gradients(optimizer)
        if pl_module.automatic_optimization:  # the only optimizer; manual ones may go on
            self._end_step(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Update the moving averages after a batch in which the user's own code stepped."""
        if self._stepped:
            self._end_step(trainer)

    def _end_step(self, trainer: L.Trainer) -> None:
        # An optimizer such as LBFGS runs forward several times in one step: the first time counts.
        counts = self._counts and self._updated != trainer.global_step
        self._stepped = self._counts = False
        moving = [norm for name, norm in self._norms.items() if name in self._open or name in self._tracked]
        if not moving:
            return
        if counts:
            self._updated = trainer.global_step
            update_alignment(moving, lambda value: mean_over_ranks(trainer, value), self.ema_rate)
        else:
            self._forget_batches()
        if self._tracked:
            self._follow()

    def _follow(self) -> None:
        """Let the tracked scalars follow; those whose gate has come down to ``track`` did so for the last time."""
        g = self._gate.number()
        for name in self._tracked:
            self._norms[name].follow()
        ended = {n for n in self._tracked if self.track is None or self._norms[n].own_gate_at(g) <= self.track}
        self._stop_tracking(ended)
        self._tracked -= ended

    def _forget_batches(self) -> None:
        for norm in self._norms.values():
            norm.forget_pending()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model, and take the announcement back."""
        self._stop_tracking(self._norms)
        self._norms = {}
        forget_plan(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The fit of the statistics, which are saved with the norms, and the norms whose scalars still follow them."""
        return {"fit": self.fit.weight, "skip": self.fit.skip, "tracked": sorted(self._tracked)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on tracking where the resumed run was, but not with the statistics of another fit.

        Raises:
            TaperlitError: the resumed run began with another fit, or tracks and this one does not.
        """
        began = AlignmentFit(state_dict["fit"], state_dict["skip"])
        if began != self.fit:
            raise TaperlitError(
                f"The run to resume has alignment statistics of fit={began.weight!r} and skip={began.skip}, not of "
                f"{self.fit.weight!r} and {self.fit.skip}; give AlignmentFreeze the same, or begin anew."
            )
        self._tracked = set(state_dict.get("tracked", ()))
        if self._tracked and self.track is None:
            raise TaperlitError(
                "The run to resume still tracks its alignment scalars; give AlignmentFreeze a track too (track=0.99 "
                "freezes them after one more step), or begin anew."
            )


def _begins_to_fall(norm: TaperNorm, g: float) -> bool:
    """Whether a norm before its boundary is due: at the run's, or where its own gate is below 1 at the global ``g``."""
    return norm.stage is None or norm.own_gate_at(g) < 1
