"""Stop at the first step whose loss or gradient is not finite, or leave it out."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from taperlit.distributed import gather, local
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, plain_name, shared_gate

PHASES = {Phase.NORMALIZE: "in the warm-up", Phase.BLEND: "in the taper", Phase.LINEAR: "after the taper"}


class FiniteGuard(L.Callback):
    """Stops a run before an optimizer step whose loss or gradient, on any process, is NaN or infinite.

    The error names the step, the taper's phase and the layer where it began: the first in the forward pass with such an
    output or, where the loss is finite, the last with such a gradient, for gradients spread from there to the layers
    before it. Nothing with such weights is ever saved, so the checkpoints on disk stay good.

    It waits for the GPU once a step. With ``16-mixed`` precision gradients are left to the loss scaler, which skips
    steps by itself, and only the loss is watched.

    Callbacks that gather statistics can have an ``on_step_skipped(trainer, pl_module)`` to forget a skipped step's.

    Args:
        skip: leave such a step out instead, weights, moments and statistics untouched, and count it
            (``train/skipped_steps``).
        patience: stop nonetheless after this many skipped steps in a row.

    Raises:
        TaperlitError: as above; or a checkpoint would hold weights that are not finite.
    """

    def __init__(self, skip: bool = False, patience: int = 20) -> None:
        if patience < 1:
            raise TaperlitError(f"FiniteGuard.patience is {patience}; it must be at least 1.")
        self.skip, self.patience = skip, patience
        self.skipped = 0
        self._in_a_row = 0
        self._losses: list[Tensor] = []  # whether each micro-batch's is bad, since the last optimizer step
        self._batches: list[tuple[Any, int]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to find the layer with."""
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the loss."""
        self._losses.append(~loss.detach().isfinite().all())

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once a step, before anything uses its gradients: stop, or take it out."""
        if trainer.fit_loop._should_accumulate():
            return
        bad_loss = torch.stack(self._losses).any()
        bad = bad_loss | (False if _is_scaled(trainer) else _any_bad(p.grad for p in pl_module.parameters()))
        batches, losses = self._batches, self._losses
        self._batches, self._losses = [], []
        if not trainer.strategy.reduce(bad.float(), reduce_op="sum").item():
            self._in_a_row = 0
            return
        self._in_a_row += 1
        in_loss = any(gather(bool(bad_loss)))
        which = "loss" if in_loss else "gradient"
        what = f"step {trainer.global_step + 1}{_phase(pl_module)}: the {which} is not finite"
        if not self.skip or self._in_a_row > self.patience:
            where = self._first_bad_layer(trainer, pl_module, batches, losses if in_loss else None)
            after = f" for {self._in_a_row} steps in a row" if self.skip else ""
            raise TaperlitError(
                f"{what}{after}; it began in {where}. The last good checkpoint is kept: resume it with a lower model.lr"
                f"{'' if self.skip else ', or skip such steps with --taper.guard.skip=true'}."
            )
        if not _is_scaled(trainer):  # the scaler wants to see the gradients, and then skips the step itself
            for parameter in pl_module.parameters():
                parameter.grad = None  # an optimizer leaves alone what has no gradient
        for callback in trainer.callbacks:
            if hasattr(callback, "on_step_skipped"):
                callback.on_step_skipped(trainer, pl_module)
        self.skipped += 1
        rank_zero_warn(f"Skipped {what}.")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Log the count."""
        if self.skip:
            pl_module.log("train/skipped_steps", float(self.skipped))

    @torch.no_grad()
    def _first_bad_layer(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batches: list, losses: list[Tensor] | None
    ) -> str:
        if losses is None:
            names = [plain_name(name) for name, p in pl_module.named_parameters() if _any_bad([p.grad])]
            found = names[-1] if names else None
        else:
            number = next((i for i, bad in enumerate(losses) if bad), 0)
            found = _first_bad_output(trainer, pl_module, *batches[number])
        return next((name for name in gather(found) if name), "the loss itself")

    @torch.no_grad()
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite: they could overwrite good ones."""
        named = {plain_name(name): parameter for name, parameter in pl_module.named_parameters()}
        mine = next((name for name, p in named.items() if _any_bad([p])), None) if _any_bad(named.values()) else None
        first = next((name for name in gather(mine) if name), None)
        if first is not None:
            raise TaperlitError(
                f"step {trainer.global_step}{_phase(pl_module)}: the weights of {first} are not finite, so they are "
                "not saved. The last good checkpoint is kept: resume it with a lower model.lr."
            )

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.skipped = state_dict["skipped"]


def _is_scaled(trainer: L.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _any_bad(tensors: Any) -> Tensor | bool:
    """Whether any number in this process's part of the tensors is not finite: a 0-d tensor, so that nothing waits."""
    parts = [local(tensor) for tensor in tensors if tensor is not None]
    parts = [part for part in parts if part.numel()]
    return ~torch.nn.utils.get_total_norm(parts, float("inf")).isfinite() if parts else False


def _phase(pl_module: nn.Module) -> str:
    gate = shared_gate(pl_module)
    return "" if gate is None else f" ({PHASES[gate.phase]}, gate {gate.value.item():.3g})"


def _first_bad_output(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> str | None:
    """Run the batch once more and name the first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not found and isinstance(output, Tensor) and output.is_floating_point() and _any_bad([output]):
                found.append(plain_name(name))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in pl_module.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            trainer.strategy.training_step(batch, batch_idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
