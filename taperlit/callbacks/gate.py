"""Drive the global gate from 1 to 0."""

from typing import Any, Literal

import lightning as L
import torch

from taperlit.callbacks.plan import forget_plan
from taperlit.errors import TaperlitError
from taperlit.norm import Gate, TaperNorm, shared_gate
from taperlit.schedule import gate_at, resolve_steps
from taperlit.surgery import missing_gains, require_tapered


class GateSchedule(L.Callback):
    """Holds the gate at 1 during warm-up, then takes it to 0 (arXiv:2602.10408, section 3).

    During optimizer step k, counted from 1: ``g = 1`` for ``k <= warmup``, ``g = 0`` for ``k >= end``, and between them
    ``(1 + cos(pi (k - warmup) / (end - warmup))) / 2``, or a straight line. It also takes the parameters that the
    current phase leaves idle out of the optimizer's reach, so that they neither decay nor gather moments.

    Steps are those that ``trainer.global_step`` and ``max_steps`` count. With manual optimization these are the steps
    of all optimizers together, so that a batch in which two optimizers step is two steps; the gate moves between
    batches only. Under ``fast_dev_run`` the warm-up is the first step and the end the last, so that every phase is
    tried.

    A resumed run keeps the boundaries it began with. A new run never raises the gate of weights that are tapered
    already, see ``closed``.

    It needs somebody to freeze the alignment scalars at the end of the warm-up: an AlignmentFreeze beside it.

    Example::

        taperlit.taper(model)
        trainer = Trainer(max_steps=1000, callbacks=[GateSchedule(warmup=0.05, end=0.5), AlignmentFreeze()])

    Args:
        warmup: last step at 1, in steps (int) or as a fraction of ``max_steps`` (float).
        end: first step at 0, in steps (int) or as a fraction of ``max_steps`` (float).
        shape: ``cosine`` or ``linear``.
        closed: what to do with a gate that is lower than the schedule begins, as in weights of a run that is over:
            ``refuse`` them, or ``keep`` the gate as it is until the schedule falls below it.

    Raises:
        TaperlitError: before the first step, if the model has no TaperNorm, nobody will freeze its alignment scalars,
            the optimizers miss parameters of the linear branch, the gate is lower than the schedule begins, or the
            boundaries are out of order or beyond the run.
    """

    def __init__(
        self,
        warmup: int | float = 0.05,
        end: int | float = 0.5,
        shape: Literal["cosine", "linear"] = "cosine",
        closed: Literal["refuse", "keep"] = "refuse",
    ) -> None:
        if shape not in ("cosine", "linear"):
            raise TaperlitError(f"GateSchedule.shape is {shape!r}; choose cosine or linear.")
        if closed not in ("refuse", "keep"):
            raise TaperlitError(f"GateSchedule.closed is {closed!r}; choose refuse or keep.")
        self.warmup, self.end, self.shape, self.closed = warmup, end, shape, closed
        self._forget()

    def _forget(self) -> None:
        self._boundaries: tuple[int, int] | None = None
        self._norms: list[TaperNorm] = []
        self._ceiling = 1.0  # the gate of weights that were tapered before, if it is kept

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()
            forget_plan(pl_module)

    @property
    def _gate(self) -> Gate:
        return self._norms[0].gate

    def boundaries(self, trainer: L.Trainer) -> tuple[int, int]:
        """Last step at 1 and first step at 0, in optimizer steps."""
        if self._boundaries is None:
            if trainer.fast_dev_run:
                self._boundaries = (1, max(2, trainer.max_steps))
                return self._boundaries
            warmup = resolve_steps(self.warmup, trainer.max_steps, "GateSchedule.warmup")
            end = resolve_steps(self.end, trainer.max_steps, "GateSchedule.end")
            if end <= warmup:
                raise TaperlitError(f"GateSchedule ends at step {end}, not after its warm-up of {warmup}; raise end.")
            self._boundaries = (warmup, end)
        return self._boundaries

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and the boundaries, and announce the warm-up at the gate."""
        self._norms = list(require_tapered(pl_module, "GateSchedule").values())
        shared_gate(pl_module)  # there is one
        self._gate.plan.warmup, self._gate.plan.end = self.boundaries(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what only now is there in every strategy: the others' announcements, the optimizers, the weights."""
        if not self._gate.plan.alignment and not all(norm.frozen for norm in self._norms):
            raise TaperlitError("GateSchedule without AlignmentFreeze: add AlignmentFreeze() to the callbacks.")
        if missing := missing_gains(pl_module, trainer.optimizers):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise TaperlitError(
                f"No optimizer holds {', '.join(missing[:3])}{more}, which remain when the norms are gone: taper the "
                "model before configure_optimizers gathers its parameters, or give taper the optimizers, "
                "taper(model, optimizers=...)."
            )
        g, planned = self._gate.value.item(), self._planned(trainer)
        if g < planned - 1e-6:  # more than float32's rounding of the value that a resumed run left
            if self.closed == "refuse":
                raise TaperlitError(
                    f"The gate is {g:.3g} already and GateSchedule would set it to {planned:.3g} again: resume the run "
                    'with ckpt_path, or train on with the gate as it is with GateSchedule(closed="keep").'
                )
            self._ceiling = g

    def _planned(self, trainer: L.Trainer) -> float:
        return gate_at(trainer.global_step + 1, *self.boundaries(trainer), self.shape)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set the gate for the optimizer step that this batch belongs to."""
        self._gate.set(min(self._planned(trainer), self._ceiling))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Hide the idle parameters: an optimizer skips what has no gradient, its decay and moments included."""
        for norm in self._norms:
            for parameter in norm.idle_parameters():
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
        forget_plan(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The boundaries, in steps."""
        return {"boundaries": list(self._boundaries or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the boundaries that the resumed run began with, and announce them.

        Some strategies restore only after ``on_fit_start``.
        """
        if state_dict["boundaries"]:
            self._boundaries = warmup, end = tuple(state_dict["boundaries"])
            if self._norms:
                self._gate.plan.warmup, self._gate.plan.end = warmup, end
