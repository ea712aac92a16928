"""A scalar of its own for the first position, until the norms are gone."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from taperlit.callbacks.plan import forget_plan
from taperlit.errors import TaperlitError
from taperlit.norm import Gate, Phase, TaperNorm, shared_gate
from taperlit.ranges import require_steps
from taperlit.schedule import gate_at, resolve_steps
from taperlit.surgery import require_tapered, separate_first


class FirstPosition(L.Callback):
    """Scales position 0 apart from the others while the gate closes, then tapers its scalar into theirs.

    In most pretrained models the first token's residual is tens of times the others'. Each norm's linear branch scales
    position 0 by ``c_first^s * c^(1 - s)`` and the others by ``c``. AlignmentFreeze fits ``c_first`` to position 0
    and ``c`` to the others. ``s`` is 1 up to the first step at ``g = 0``, falls after it, and is 0 from step ``end``:
    then there is one map for all, as without this callback, and the model can be folded.

    ``s`` and ``c_first`` are saved with the norms. Under ``fast_dev_run`` ``s`` is 0 after the first step at ``g = 0``.

    Example::

        Trainer(max_steps=300, callbacks=[GateSchedule(0.1, 0.5), AlignmentFreeze(), FirstPosition(0.8)])

    Args:
        end: first step at ``s = 0``, in steps (int) or as a fraction of ``max_steps`` (float).
        shape: ``cosine`` or ``linear``.

    Raises:
        TaperlitError: a value out of its range; before the first step, if the model has no TaperNorm, ``end`` is beyond
            the run or not after the gate's, the statistics or the taper began without a first position, or weights
            are averaged that were copied without one; in a step, if the gate is open at ``end``, or a norm's input is
            not (B, T, *shape).
    """

    def __init__(self, end: int | float = 0.8, shape: Literal["cosine", "linear"] = "cosine") -> None:
        if shape not in ("cosine", "linear"):
            raise TaperlitError(f"FirstPosition.shape is {shape!r}; choose cosine or linear.")
        require_steps("FirstPosition.end", end, least=1)
        self.end, self.shape = end, shape
        self._forget()

    def _forget(self) -> None:
        self._norms: dict[str, TaperNorm] = {}
        self._last: int | None = None  # the first step at g = 0, which is the last at s = 1
        self._end: int | None = None  # the first step at s = 0
        self._ceiling = 1.0
        self._step = 0  # the optimizer step of the batch under way
        self._checked = False  # that the statistics behind the scalars in use are there

    @property
    def _gate(self) -> Gate:
        return next(iter(self._norms.values())).gate

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()
            forget_plan(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give every norm its second scalar, where it has none yet, and announce at the gate who moves its share."""
        self._norms = require_tapered(pl_module, "FirstPosition")
        shared_gate(pl_module)  # there is one
        late = self._gate.first is None
        if late and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            raise TaperlitError(
                "The weights that are averaged were copied before FirstPosition could separate the first position; "
                "call taperlit.surgery.separate_first(model) right after taperlit.taper(model)."
            )
        separate_first(pl_module)
        self._gate.plan.first = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the boundary, and refuse weights whose statistics began without a first position."""
        gate, norms = self._gate, self._norms.values()
        # Else they begin anew: AlignmentFreeze, which may come later, forgets those of an earlier run.
        if gate.phase is not Phase.NORMALIZE or (trainer.global_step and not all(norm.frozen for norm in norms)):
            self._require_statistics(begun_is_enough=gate.phase is Phase.NORMALIZE)
        end = self._boundary(trainer)
        closed = gate.plan.closed_by
        if closed is not None and end <= closed and not trainer.fast_dev_run:
            raise TaperlitError(
                f"FirstPosition ends at step {end}, not after the gate, which closes at step {closed}; raise end, or "
                "let the gate close earlier (a resumed run keeps its end)."
            )
        self._ceiling = 1.0 if gate.phase is Phase.NORMALIZE or gate.first is None else gate.first.item()

    def _require_statistics(self, begun_is_enough: bool = False) -> None:
        for name, norm in self._norms.items():
            begun = norm.alignment_ema[2] > 0 or not begun_is_enough
            if begun and (norm.first_alignment_ema is None or norm.first_alignment_ema[2] == 0):
                raise TaperlitError(
                    f"The statistics of {name} were gathered without a first position apart, so FirstPosition comes "
                    "too late; begin anew with it, or go on without."
                )

    def _boundary(self, trainer: L.Trainer) -> int:
        if self._end is None:
            self._end = (
                max(2, trainer.max_steps)
                if trainer.fast_dev_run
                else resolve_steps(self.end, trainer.max_steps, "FirstPosition.end")
            )
        return self._end

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set the share for the optimizer step that this batch belongs to."""
        self._step = step = trainer.global_step + 1
        end = self._boundary(trainer)
        if self._last is None:
            if step > end and not trainer.fast_dev_run:
                raise TaperlitError(
                    f"The gate is still {self._gate.value.item():.3g} after step {end}, where FirstPosition ends; "
                    "raise end."
                )
            s = 1.0
        else:
            s = gate_at(step, self._last, end, self.shape)
        self._gate.set_first(min(s, self._ceiling))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Note the first step at ``g = 0``; only now has everybody set what this batch is trained with."""
        phase = self._gate.phase
        if not self._checked and phase is not Phase.NORMALIZE:
            self._require_statistics()
            self._checked = True
        if self._last is None and phase in (Phase.LINEAR_FIRST, Phase.LINEAR):
            self._last = self._step
            if trainer.fast_dev_run:
                self._gate.set_first(0.0)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model, and take the announcement back."""
        self._norms = {}
        forget_plan(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The two boundaries, in steps; None where they are not known yet."""
        return {"last": self._last, "end": self._end}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the boundaries of the resumed run."""
        self._last, self._end = state_dict["last"], state_dict["end"]
