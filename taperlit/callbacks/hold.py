"""Let the gate wait, or go back, when training leaves its recent band."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from taperlit.callbacks.gradients import has_gradients, numbers
from taperlit.callbacks.plan import forget_plan
from taperlit.distributed import gradient_norms, mean_over_ranks
from taperlit.errors import TaperlitError
from taperlit.norm import Gate, TaperNorm, shared_gate
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.surgery import require_tapered
from taperlit.training.lightning_compat import should_log

FLOOR = 0.01  # of the median: a signal that hardly moves has a band of this width at least, per unit of ``band``


class GateHold(L.Callback):
    """Stops the gate's way down while a signal of training is out of its recent band, and takes the gate back.

    The signals, once per optimizer step and over all micro-batches and ranks: the training loss; the norm of all
    gradients, before clipping; and, at the input of every tapered norm, the largest token's scale over the mean. The
    last warns first: a forward pass that is about to explode sends one token's scale up from layer to layer, while
    loss, gradients and mean scale are calm. A signal is out when it is
    above ``median + band * deviation`` of its last ``window`` values, where ``deviation`` is the median distance from
    the median, or 1% of the median where that is more.

    Between the warm-up and the first step at ``g = 0``, the gate stays as it is after each step with a signal out. When
    that was so in ``patience`` steps in a row, or a signal was above ``median + far * deviation``, or a step was not
    finite, the gate goes back to where it was ``back`` steps earlier on its way, but not to 1, and goes on from there.
    The way is that of GateSchedule: what moves is its clock. The delays together are bounded so that the gate is at 0
    from step ``latest``; after that it waits no more.

    A step counts as not finite when its loss, gradients or token scales are not, or when somebody took its gradients
    away: FiniteGuard(skip=True) leaves such a step out, and this callback then takes the gate back. Without it weights
    are gone after such a step, so that the run should end as FiniteGuard ends it.

    Each event is told in a line, kept in ``events`` and saved in the checkpoint; the delay is logged as
    ``taper/delay``. It costs one pass over each norm's input and one sync per step until the gate is closed, and
    nothing after that. With 16-mixed precision gradients that overflow are left to the loss scaler. Under
    ``fast_dev_run`` nothing waits.

    Example::

        Trainer(max_steps=1000, callbacks=[GateSchedule(), AlignmentFreeze(), GateHold(), FiniteGuard(skip=True)])

    Args:
        band: half the band's width, in median deviations.
        window: optimizer steps that a band is made of. A signal is judged once it has half as many.
        patience: steps out of the band in a row, after which the gate goes back.
        far: median deviations beyond which it goes back at once: explosions begin with single steps of this kind.
        back: how far the gate goes back, in steps of its schedule (int) or as a fraction of ``max_steps`` (float).
        latest: the first step at ``g = 0`` at the latest, in steps (int) or as a fraction of ``max_steps`` (float).

    Raises:
        TaperlitError: a value out of its range; before the first step, if the model has no TaperNorm, there is no
            GateSchedule, or ``latest`` is before the end of its schedule or beyond the run.
    """

    def __init__(
        self,
        band: float = 10.0,
        window: int = 50,
        patience: int = 3,
        far: float = 100.0,
        back: int | float = 0.1,
        latest: int | float = 0.9,
    ) -> None:
        require_range("GateHold.band", band, above=0)
        require_range("GateHold.far", far, least=band)
        require_range("GateHold.window", window, least=4)
        require_range("GateHold.patience", patience, least=1)
        require_steps("GateHold.back", back)
        require_steps("GateHold.latest", latest, least=1)
        self.band, self.window, self.patience, self.back, self.latest = band, window, patience, back, latest
        self.far = far
        self._norms: dict[str, TaperNorm] = {}
        self._forget()

    def _forget(self) -> None:
        self._stop_watching()
        self._norms = {}
        self.events: list[dict[str, Any]] = []  # step, what was done, why, and the delay from then on
        self._rows = torch.zeros(0, dtype=torch.float64)  # the signals of the last steps, (steps, signals)
        self._out = 0  # steps in a row with a signal out
        self._told_limit = False
        self._latest: int | None = None
        self._forget_step()

    def _forget_step(self) -> None:
        self._losses: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self._ran = False  # a backward pass since then
        self._gradients: list[Tensor] = []  # the norms of those that stepped in the batch under way
        self._left_out = False
        self._measured: int | None = None  # the global step of the last of them

    def _stop_watching(self) -> None:
        for norm in self._norms.values():
            norm.peak = None

    @property
    def _gate(self) -> Gate:
        return next(iter(self._norms.values())).gate

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._forget()
            forget_plan(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Announce at the gate how long it may take, and begin to watch the norms' inputs."""
        self._norms = require_tapered(pl_module, "GateHold")
        shared_gate(pl_module)  # there is one
        if self._latest is None and not trainer.fast_dev_run:
            self._latest = resolve_steps(self.latest, trainer.max_steps, "GateHold.latest")
            self._back = resolve_steps(self.back, trainer.max_steps, "GateHold.back")
        self._gate.plan.latest = self._latest

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the schedule, which is announced by now, and drop what a tuner's trial steps left behind."""
        plan = self._gate.plan
        if plan.end is None:
            raise TaperlitError(
                "GateHold without GateSchedule has no gate to hold: add GateSchedule() to the callbacks."
            )
        if self._latest is not None and self._latest < plan.end:
            raise TaperlitError(
                f"GateHold.latest is step {self._latest}, before step {plan.end}, where the gate's schedule ends; "
                "raise latest."
            )
        self._forget_step()
        self._begin(trainer.global_step)
        for norm in self._norms.values():
            norm.peak = norm.alignment.new_zeros(3) if self._watches else None

    def _begin(self, step: int) -> None:
        plan = self._gate.plan
        self._begun = step
        closed = plan.end is None or step + 1 - plan.delay >= plan.end
        self._watches = self._latest is not None and not closed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Note which step the batch belongs to; stop watching when the gate is closed."""
        watched = self._watches
        self._begin(trainer.global_step)
        if watched and not self._watches:
            self._stop_watching()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note that there is a loss."""
        self._ran = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradients: they are whole here, and not clipped yet. Log the delay."""
        if self._watches and self._measured != trainer.global_step:  # LBFGS runs several times per step
            self._measured = trainer.global_step
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._gradients.append(gradient_norms(trainer, {"all": [numbers(g) for g in gradients]})["all"])
            self._left_out |= self._ran and not has_gradients(optimizer)
        if should_log(trainer):
            pl_module.log("taper/delay", float(self._gate.plan.delay))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: see whether all was in its band, and move the schedule's clock."""
        if not self._watches:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it, for the sum over the micro-batches
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().float().mean() * parts)
        if self._gradients:
            self._judge(trainer, *self._signals(trainer))
            self._forget_step()
            torch._foreach_zero_(self._peaks())

    def _peaks(self) -> list[Tensor]:
        return [norm.peak for norm in self._norms.values() if norm.peak is not None]

    def _signals(self, trainer: L.Trainer) -> tuple[Tensor, bool]:
        """This step's row of signals (2 + norms,), NaN where there is none, and whether the step was finite."""
        device = trainer.strategy.root_device
        losses = torch.stack(self._losses).to(device) if self._losses else torch.zeros(0, device=device)
        gradients = torch.linalg.vector_norm(torch.stack(self._gradients)).float()
        left_out = torch.tensor(float(self._left_out), device=device)
        means = torch.stack((losses.sum(), torch.tensor(float(len(losses)), device=device), gradients, left_out))
        largest, sums, counts = torch.stack([peak.to(device) for peak in self._peaks()], dim=1)
        means = mean_over_ranks(trainer, torch.cat((means, sums, counts)))
        means, sums, counts = means.split((len(means) - 2 * len(largest), len(largest), len(largest)))
        # Which of NaN and a number is more, no two libraries agree on.
        largest = trainer.strategy.reduce(largest.nan_to_num(nan=math.inf), reduce_op="max")
        tiny = torch.finfo(torch.float32).tiny  # all tokens may be zero
        peaks = torch.where(counts > 0, largest / (sums / counts).clamp(min=tiny), 0)
        total, count, gradient, skipped, *ratios = torch.cat((means, peaks)).double().tolist()  # one sync
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite = math.isfinite(total) and (math.isfinite(gradient) or scaled) and all(map(math.isfinite, ratios))
        row = (total / count if count else math.nan, gradient if math.isfinite(gradient) else math.nan, *ratios)
        return torch.tensor(row, dtype=torch.float64), finite and not skipped

    def _judge(self, trainer: L.Trainer, row: Tensor, finite: bool) -> None:
        plan, step = self._gate.plan, trainer.global_step
        why, far = self._reason(row) if finite else ("the step is not finite", True)
        if finite:
            self._rows = torch.cat((self._rows, row[None]))[-self.window :]
        assert plan.warmup is not None
        clock = self._begun + 1 - plan.delay  # of this batch's step
        if clock <= plan.warmup:
            self._out = 0
            return
        if why is None:
            if self._out:
                self._tell(step, "goes on", "all is in its band again", plan.gate(step + 1))
            self._out = 0
            return
        self._out += 1
        retreats = far or self._out % self.patience == 0
        self._delay(step, max(plan.warmup + 1, clock - self._back) if retreats else clock, why, retreats)

    def _delay(self, step: int, clock: int, why: str, retreats: bool) -> None:
        """Let the step after ``step`` be at ``clock`` of the schedule, as far as the delays' bound allows it."""
        plan = self._gate.plan
        assert self._latest is not None
        assert plan.end is not None
        longest = self._latest - plan.end
        before, plan.delay = plan.delay, max(plan.delay, min(step + 1 - clock, longest))
        if plan.delay == before:
            if not self._told_limit:
                self._told_limit = True
                self._tell(step, "goes on", f"{why}, but it has waited {before} steps and may no more", plan.gate(step))
        elif retreats:
            self._tell(step, "goes back", why, plan.gate(step + 1))
        elif self._out == 1:
            self._tell(step, "waits", why, plan.gate(step + 1))

    def _reason(self, row: Tensor) -> tuple[str | None, bool]:
        """Which signal is out of its band, in words, and whether it is far out."""
        if len(self._rows) < self.window / 2:
            return None, False
        median = self._rows.nanmedian(0).values
        deviation = torch.maximum((self._rows - median).abs().nanmedian(0).values, FLOOR * median.abs())
        deviations = ((row - median) / deviation.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(nan=-math.inf)
        worst = int(deviations.argmax())
        if not deviations[worst] > self.band:
            return None, False
        names = [
            "the loss",
            "the gradient norm",
            *(f"the largest token at {name}, over the mean," for name in self._norms),
        ]
        limit = median[worst] + self.band * deviation[worst]
        why = f"{names[worst]} is {row[worst]:.4g}, above its band's {limit:.4g}"
        return why, bool(deviations[worst] > self.far)

    def _tell(self, step: int, what: str, why: str, gate: float) -> None:
        self.events.append({"step": step, "gate": gate, "what": what, "why": why, "delay": self._gate.plan.delay})
        where = "at" if what == "waits" else "to" if what == "goes back" else "from"
        rank_zero_info(
            f"GateHold: step {step}: {why}; the gate {what} {where} {gate:.3g}, {self._gate.plan.delay} steps late."
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model, and take the announcement back."""
        self._stop_watching()
        self._norms = {}
        forget_plan(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The bands' values, what has happened, and the bound; the delay itself is GateSchedule's to save."""
        return {
            "rows": self._rows,
            "out": self._out,
            "events": [dict(event) for event in self.events],
            "told_limit": self._told_limit,
            "steps": None if self._latest is None else (self._latest, self._back),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the resumed run was, with its bound; some strategies restore only after ``on_fit_start``."""
        self._rows, self._out, self._told_limit = (state_dict[key] for key in ("rows", "out", "told_limit"))
        self.events = [dict(event) for event in state_dict["events"]]
        if state_dict["steps"] is not None:
            self._latest, self._back = state_dict["steps"]
            if self._norms:
                self._gate.plan.latest = self._latest
