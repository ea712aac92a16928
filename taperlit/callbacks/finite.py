"""Stop at the first step whose loss or gradient is not finite, or leave it out."""

from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from taperlit.callbacks.gradients import any_bad
from taperlit.callbacks.replay import Seen, run_again
from taperlit.distributed import gather
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, plain_name, shared_gate
from taperlit.ranges import require_range
from taperlit.training.lightning_compat import should_accumulate

FAR = 10.0  # largest token over the median, from which on the error names it
PHASES = {
    Phase.NORMALIZE: "in the warm-up",
    Phase.BLEND: "in the taper",
    Phase.LINEAR_FIRST: "after the taper, position 0 apart",
    Phase.LINEAR: "after the taper",
}


class FiniteGuard(L.Callback):
    """Stops a run before an optimizer step whose loss or gradient, on any process, is NaN or infinite.

    The error names the step, the taper's phase and the layer where it began: the first in the forward pass with such an
    output or, where the loss is finite, the last with such a gradient, for gradients spread from there to the layers
    before it. It also names the token whose scale is largest beside the others' at a TaperNorm, where that is 10 times
    the median: without a norm such a token grows from layer to layer. For that it runs the batch once more, so it holds
    the batch under way and, with gradient accumulation, the first of the step whose loss was bad: two at most. With
    manual optimization a batch runs again only up to its first backward pass; what goes wrong after it is reported
    without a layer.

    Wherever it stands among the callbacks, it goes before the first that acts on an optimizer's step, so that they all
    see a step that is left out as one.

    Nothing with such weights is ever saved, so the checkpoints on disk stay good.

    It waits for the GPU once per step and, with gradient accumulation, once per micro-batch for a loss that is
    computed by then. On the CPU it takes under 1% of the quickstart's training (``tools/guard_cost.py``). With
    ``16-mixed`` precision gradients are left to the loss scaler, which skips steps by itself; only the loss is watched,
    and of a step that is left out the statistics that are finite count.

    Args:
        skip: leave such a step out instead, weights, moments and statistics untouched, and count it
            (``train/skipped_steps``). With manual optimization that is one optimizer's step.
        patience: stop nonetheless after this many skipped steps (of one optimizer) in a row.

    Raises:
        TaperlitError: as above; or a checkpoint would hold weights that are not finite.
    """

    def __init__(self, skip: bool = False, patience: int = 20) -> None:
        require_range("FiniteGuard.patience", patience, least=1)
        self.skip, self.patience = skip, patience
        self._forget()

    def _forget(self) -> None:
        self.skipped = 0
        self._in_a_row: Counter[torch.optim.Optimizer] = Counter()
        self._replaying = False
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._bad_loss: Tensor | None = None  # of any micro-batch since the last optimizer step
        self._flag: _Flag | None = None  # the same, as it was after the batch under way
        self._batch: tuple[Any, int] | None = None  # under way
        self._suspect: tuple[Any, int] | None = None  # the first whose loss was bad

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit (what a checkpoint restores comes after this), and go before those who count steps."""
        if stage == "fit":
            self._forget()
            others = [callback for callback in trainer.callbacks if callback is not self]
            place = next(i for i, callback in enumerate(trainer.callbacks) if callback is self or _acts(callback))
            trainer.callbacks = [*others[:place], self, *others[place:]]  # Lightning is going through the old list

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop what a tuner's trial steps left behind."""
        self._forget_batches()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to find the layer with; let go of the one before, unless its loss was bad."""
        self._look()
        self._batch = (batch, batch_idx)

    def _look(self) -> None:
        if self._flag is not None and self._suspect is None and self._flag.wait():
            self._suspect = self._batch
        self._flag = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the loss."""
        bad = ~loss.detach().isfinite().all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        if should_accumulate(trainer) or not pl_module.automatic_optimization:  # else the step ends before the batch
            self._flag = _Flag(self._bad_loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once a step, before anything uses its gradients: stop, or take it out."""
        if pl_module.automatic_optimization and not should_accumulate(trainer):
            self._check(trainer, pl_module, trainer.optimizers[0])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at what the backward pass did not show; log the count.

        That is a step of manual optimization, or one whose last micro-batch had no loss (``training_step`` returned
        None) but others did.
        """
        if self._replaying:
            raise RuntimeError("an optimizer steps before the first backward pass")
        if not pl_module.automatic_optimization or self._bad_loss is not None:
            self._check(trainer, pl_module, optimizer)
        if self.skip:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        # Those that would step, and at hand; with several optimizers the others' gradients may be stale.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [] if _is_scaled(trainer) else [p.grad for p in parameters]
        bad_loss = self._bad_loss
        if bad_loss is None:
            bad_loss = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        # The 2-norm is many times faster than the largest number, but overflows a little earlier.
        stop = _anywhere(trainer, bad_loss | any_bad(gradients, 2.0))
        stop = stop and _anywhere(trainer, bad_loss | any_bad(gradients))
        if stop:
            self._look()
        batch = self._suspect or self._batch
        self._bad_loss = self._suspect = self._flag = None
        if not stop:
            self._in_a_row[optimizer] = 0
            return
        self._in_a_row[optimizer] += 1
        in_loss = any(gather(bool(bad_loss)))
        which = "loss" if in_loss else "gradient"
        what = f"step {trainer.global_step + 1}{_phase(pl_module)}: the {which} is not finite"
        if not self.skip or self._in_a_row[optimizer] > self.patience:
            where = self._origin(trainer, pl_module, batch, in_loss)
            after = f" for {self._in_a_row[optimizer]} steps in a row" if self.skip else ""
            others = "" if self.skip else ", or leave such steps out: FiniteGuard(skip=True), --taper.guard.skip=true"
            raise TaperlitError(f"{what}{after}; {where}. {_advice(trainer)}{others}.")
        if not _is_scaled(trainer):  # the scaler wants to see the gradients, and then skips the step itself
            for parameter in parameters:
                parameter.grad = None  # an optimizer leaves alone what has no gradient, and the other callbacks do too
        self.skipped += 1
        rank_zero_warn(f"Skipped {what}.")

    @torch.no_grad()
    def _origin(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: tuple[Any, int] | None, in_loss: bool
    ) -> str:
        """Where it began, in words; every process must ask."""
        bad_gradients = [plain_name(name) for name, p in pl_module.named_parameters() if any_bad([p.grad])]
        self._replaying = True  # which may change gradients
        seen = run_again(trainer, pl_module, *batch) if batch is not None else Seen()
        if in_loss:
            found, why = seen.bad_output, seen.why_unknown
        else:
            found, why = (bad_gradients[-1] if bad_gradients else None), ""
        found = next((name for name in gather(found) if name), None)
        why = next((reason for reason in gather(why) if reason), "")
        largest = max(gather(seen.largest), default=(0.0, ""))
        if found is not None:
            origin = f"it began in {found}"
        else:
            origin = f"its layer is not known, for {why}" if why else "it began in the loss itself"
        return f"{origin}; {largest[1]}" if largest[0] > FAR else origin

    @torch.no_grad()
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite: they could overwrite good ones."""
        named = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        mine = next((name for name, p in named.items() if any_bad([p])), None) if any_bad(named.values()) else None
        first = next((name for name in gather(mine) if name), None)
        if first is not None:
            raise TaperlitError(
                f"step {trainer.global_step}{_phase(pl_module)}: the weights of {first} are not finite, so they are "
                f"not saved. {_advice(trainer)}."
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of batches and optimizers."""
        self._forget_batches()
        self._in_a_row.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of batches and optimizers after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the resumed run's count of skipped steps."""
        self.skipped = state_dict["skipped"]


class _Flag:
    """A 0-d bool tensor on its way to the CPU, which need not wait for what the GPU was given to do afterwards."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._done = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> bool:
        if self._done is not None:
            self._done.synchronize()
        return bool(self._value)


def _acts(callback: L.Callback) -> bool:
    return type(callback).on_before_optimizer_step is not L.Callback.on_before_optimizer_step


def _is_scaled(trainer: L.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _anywhere(trainer: L.Trainer, bad: Tensor) -> bool:
    return bool(trainer.strategy.reduce(bad.float(), reduce_op="sum").item())


def _advice(trainer: L.Trainer) -> str:
    saved = any(callback.best_model_path or callback.last_model_path for callback in trainer.checkpoint_callbacks)
    if saved or trainer.ckpt_path:
        return "The last good checkpoint is kept: resume it with a lower learning rate"
    return "No checkpoint was saved yet: begin again with a lower learning rate"


def _phase(pl_module: nn.Module) -> str:
    gate = shared_gate(pl_module)
    return "" if gate is None else f" ({PHASES[gate.phase]}, gate {gate.value.item():.3g})"
