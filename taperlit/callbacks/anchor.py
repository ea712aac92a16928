"""The fixed-target scale loss on the pre-logit residual."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from taperlit.callbacks.partners import named_module, resolve_boundary
from taperlit.distributed import mean_over_ranks
from taperlit.errors import TaperlitError


class ScaleAnchor(L.Callback):
    """Adds ``weight * mean((s(h) - target)^2)`` to the training loss (arXiv:2602.10408, section 4, "+aux").

    ``h`` is the input of a named module (the final norm, or the head where there is none) and ``s(h)`` its root mean
    square, or standard deviation for the LayerNorm kind, in float32. The target is the bias-corrected moving average
    of the batch mean of ``s(h)`` over the warm-up; it is frozen, and the loss begins, at the boundary. The loss is
    added to what ``training_step`` returns, so validation never contains it.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), ScaleAnchor("model.final_norm")])

    Args:
        module: name of the module whose input is anchored.
        weight: the paper's lambda.
        ema_rate: rate of the moving average, per optimizer step.
        kind: which ``s``; None is the module's own (``layernorm`` for a LayerNorm, else ``rmsnorm``).
        at: freeze after this many steps (int) or fraction of ``max_steps`` (float); None is the end of the
            GateSchedule's warm-up.

    Raises:
        TaperlitError: before the first step, if there is no such module or the boundary is unknown; in the first
            step, if the module did not run.
    """

    def __init__(
        self,
        module: str,
        weight: float = 0.1,
        ema_rate: float = 0.01,
        kind: Literal["rmsnorm", "layernorm"] | None = None,
        at: int | float | None = None,
    ) -> None:
        if weight < 0 or not 0 < ema_rate <= 1:
            raise TaperlitError(f"ScaleAnchor needs weight >= 0 and 0 < ema_rate <= 1, not {weight} and {ema_rate}.")
        self.module, self.weight, self.ema_rate, self.kind, self.at = module, weight, ema_rate, kind, at
        self.target: Tensor | None = None
        self._ema, self._updates = torch.zeros((), dtype=torch.float32), 0
        self._boundary = 0
        self._scales: list[Tensor] = []  # batch means of s(h) since the last optimizer step
        self._penalties: list[Tensor] = []  # of the forward pass under way
        self._step_penalties: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self._undo: list[Callable[[], None]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the residual and wrap ``training_step``."""
        module = named_module(pl_module, self.module, "ScaleAnchor")
        resolve_boundary(trainer, self.at, "ScaleAnchor")
        if self.kind is None:
            self.kind = "layernorm" if isinstance(module, nn.LayerNorm) else "rmsnorm"
        hook = module.register_forward_pre_hook(self._on_residual)
        self._undo = [hook.remove, self._wrap(pl_module)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the boundary: only now has every strategy restored the GateSchedule's."""
        self._boundary = resolve_boundary(trainer, self.at, "ScaleAnchor")

    def _wrap(self, pl_module: L.LightningModule) -> Callable[[], None]:
        original, another = pl_module.training_step, vars(pl_module).get("training_step")

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._penalties.clear()
            output = original(*args, **kwargs)
            return self._add_penalty(pl_module, output)

        pl_module.training_step = training_step

        def undo() -> None:
            del pl_module.training_step
            if another is not None:  # a wrapper that was there before
                pl_module.training_step = another

        return undo

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the model back as it was."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Likewise: Lightning calls no teardown after an error."""
        self.teardown(trainer, pl_module, "fit")

    def scale(self, h: Tensor, eps: float) -> Tensor:
        """``s(h)`` of (..., d_model): (...) float32."""
        h = h.float()
        if self.kind == "layernorm":
            h = h - h.mean(-1, keepdim=True)
        return (h.square().mean(-1) + eps).sqrt()

    def _on_residual(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        eps = getattr(module, "eps", None)
        s = self.scale(args[0], torch.finfo(torch.float32).eps if eps is None else eps)
        if self.target is None:
            self._scales.append(s.detach().mean())
        else:
            self.target = self.target.to(s.device)  # a resumed one comes from the CPU
            self._penalties.append((s - self.target).square().mean())

    def _add_penalty(self, pl_module: L.LightningModule, output: Any) -> Any:
        if self.target is None:
            if not self._scales:
                raise TaperlitError(f"ScaleAnchor's module {self.module!r} did not run in training_step; name another.")
            return output
        if output is None:
            return None
        penalty = torch.stack(self._penalties).mean()
        self._step_penalties.append(penalty.detach())
        if isinstance(output, Tensor):
            return output + self.weight * penalty
        return {**output, "loss": output["loss"] + self.weight * penalty}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Freeze the target, once the warm-up's last step is done."""
        if self.target is None and trainer.global_step >= self._boundary:
            if not self._updates:
                raise TaperlitError("ScaleAnchor has no statistics at its boundary; start it with the run.")
            self.target = self._ema / (1 - (1 - self.ema_rate) ** self._updates)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the moving average from this step's batches, over all ranks; log the step's scale loss."""
        if self._step_penalties:
            pl_module.log("train/scale_loss", mean_over_ranks(trainer, torch.stack(self._step_penalties).mean()))
            self._step_penalties.clear()
        if self.target is None and self._scales:
            batch = mean_over_ranks(trainer, torch.stack(self._scales).mean())
            self._ema = self._ema.to(batch.device).lerp(batch, self.ema_rate)
            self._updates += 1
            self._scales.clear()

    def on_step_skipped(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the statistics of a step that :class:`FiniteGuard` takes out."""
        self._scales.clear()
        self._step_penalties.clear()

    def state_dict(self) -> dict[str, Any]:
        """The moving average and the target, on the CPU."""
        target = None if self.target is None else self.target.cpu()
        return {"ema": self._ema.cpu(), "updates": self._updates, "target": target}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._ema, self._updates, self.target = state_dict["ema"], state_dict["updates"], state_dict["target"]
