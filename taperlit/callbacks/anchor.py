"""The fixed-target scale loss on the pre-logit residual."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from taperlit.callbacks.added_loss import sum_over_ranks, with_added, wrap_training_step
from taperlit.callbacks.gradients import has_gradients
from taperlit.callbacks.plan import Boundary, find_boundary, forget_plan
from taperlit.callbacks.submodule import first_input, named_module
from taperlit.callbacks.token_scale import scale_over
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps, warmup_cosine
from taperlit.training.lightning_compat import should_log


class ScaleAnchor(L.Callback):
    """Adds ``weight * mean((s(h) - target)^2)`` to the training loss (arXiv:2602.10408, section 4, "+aux").

    ``h`` is the input of a named module (the final norm, or the head where there is none) and ``s(h)`` its root mean
    square, or standard deviation for the LayerNorm kind, in float32. The target is the bias-corrected moving average
    of the batch mean of ``s(h)`` over the warm-up; it is frozen, and the loss begins, at the boundary. A step counts
    for the average if it has gradients and its ``s(h)`` is finite. The loss is added to what ``training_step``
    returns, so validation never contains it; a batch for which the module does not run, or runs on no token, or
    ``training_step`` returns None, is left as it is.

    It works on a plain model too, without any other callback, if it is told when to freeze.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), ScaleAnchor("model.final_norm")])

    Args:
        module: name of the module whose input is anchored.
        weight: the paper's lambda.
        ema_rate: rate of the moving average, per optimizer step.
        kind: which ``s``; None is the module's own (``layernorm`` for a LayerNorm, else ``rmsnorm``).
        at: freeze after this many steps (int) or fraction of ``max_steps`` (float); None is the end of the
            GateSchedule's warm-up.
        fade: from this step on, in steps (int) or as a fraction of ``max_steps`` (float), the weight falls along a
            cosine to 0 at ``max_steps``, since a run's end pays for the scale loss with the one that counts; None keeps
            it, as in the paper.
        skip: leave out this many positions at the beginning of each sequence, where pretrained models have residuals
            tens of times the others'; ``h`` must then be (B, T, d_model).

    Raises:
        TaperlitError: a value out of its range; before the first step, if there is no such module, the boundary is
            unknown or optimization is manual; in the first step, if the module did not run, or ``h`` has no more than
            ``skip`` positions.
    """

    def __init__(
        self,
        module: str,
        weight: float = 0.1,
        ema_rate: float = 0.01,
        kind: Literal["rmsnorm", "layernorm"] | None = None,
        at: int | float | None = None,
        skip: int = 0,
        fade: int | float | None = None,
    ) -> None:
        require_range("ScaleAnchor.weight", weight, least=0)
        require_range("ScaleAnchor.ema_rate", ema_rate, above=0, most=1)
        require_range("ScaleAnchor.skip", skip, least=0)
        require_steps("ScaleAnchor.at", at, least=1)
        require_steps("ScaleAnchor.fade", fade)
        self.module, self.weight, self.ema_rate, self.kind, self.at = module, weight, ema_rate, kind, at
        self.skip, self.fade = skip, fade
        self._undo: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        self.target: Tensor | None = None
        self._ema = torch.zeros(2, dtype=torch.float32)  # moving averages of s(h) and of 1, which corrects the bias
        self._updated: int | None = None  # the global step of the last update
        self._boundary = Boundary()
        self._fade_start: int | None = None
        self._factor = 1.0  # of the weight, in the step under way
        self._centred = False
        self._ran = False
        self._penalties: list[Tensor] = []  # of the forward pass under way
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._scales: list[Tensor] = []  # batch means of s(h) since the last optimizer step
        self._step_penalties: list[Tensor] = []  # of the micro-batches since the last optimizer step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._release()
            self._forget()
            forget_plan(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the residual and wrap ``training_step``."""
        module = named_module(pl_module, self.module, "ScaleAnchor")
        if not pl_module.automatic_optimization:
            raise TaperlitError(
                "ScaleAnchor adds its loss to what training_step returns, which manual optimization does not use: "
                "train with automatic optimization, or leave ScaleAnchor out."
            )
        kind = self.kind or ("layernorm" if _is_centred(module) else "rmsnorm")
        self._centred = kind == "layernorm"
        hook = module.register_forward_pre_hook(self._on_residual, with_kwargs=True)
        self._undo = [hook.remove, wrap_training_step(pl_module, lambda: self._penalties.clear(), self._add_penalty)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the boundary, and drop what a tuner's trial steps left behind."""
        self._boundary = find_boundary(trainer, pl_module, self.at, "ScaleAnchor")
        self._fade_start = self._resolved_fade(trainer)
        self._forget_batches()

    def _resolved_fade(self, trainer: L.Trainer) -> int | None:
        if self.fade is None or trainer.fast_dev_run:
            return None
        if trainer.max_steps < 1:
            raise TaperlitError(
                "ScaleAnchor.fade ends with the run: set trainer.max_steps, or fade to None (null in a config)."
            )
        return resolve_steps(self.fade, trainer.max_steps, "ScaleAnchor.fade")

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the model back without hook and wrapper."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the model back after an error too: Lightning calls no teardown then."""
        self._release()

    def scale(self, h: Tensor, eps: float) -> Tensor:
        """``s(h)`` of (..., d_model): (...) float32."""
        return scale_over(h.float(), (-1,), self._centred, eps)

    def _on_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        h = first_input(module, args, kwargs)
        self._ran = True
        if h.numel() == 0:  # an expert that gets no token
            return
        if self.skip:
            if h.ndim != 3 or h.shape[1] <= self.skip:
                raise TaperlitError(
                    f"ScaleAnchor.skip is {self.skip} and {self.module!r} is given {tuple(h.shape)}, which has no "
                    "(B, T, d_model) with more positions than that; set skip to 0."
                )
            h = h[:, self.skip :]
        s = self.scale(h, _eps_of(module))
        if self.target is None:
            self._scales.append(s.detach().mean())
        else:
            self.target = self.target.to(s.device)  # a resumed one comes from the CPU
            self._penalties.append((s - self.target).square().mean())

    def _add_penalty(self, output: Any) -> Any:
        if output is None or not torch.is_grad_enabled():  # no loss, or a replay that only looks at the outputs
            return output
        if not self._ran:
            raise TaperlitError(f"ScaleAnchor's module {self.module!r} did not run in training_step; name another.")
        if not self._penalties:
            return output
        penalty = torch.stack(self._penalties).mean()
        self._step_penalties.append(penalty.detach())
        return with_added(output, self._factor * self.weight * penalty)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Freeze the target, once the warm-up's last step is done; fade the weight."""
        if self._fade_start is not None:
            self._factor = warmup_cosine(trainer.global_step, 0, trainer.max_steps, 0.0, self._fade_start)
        if self.target is None and trainer.global_step >= self._boundary.step:
            mean, weight = self._ema
            if not weight:
                raise TaperlitError("ScaleAnchor has no statistics at its boundary; start it with the run.")
            self.target = mean / weight

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the moving average from this step's batches, over all ranks; log the step's scale loss."""
        if has_gradients(optimizer):
            if self.target is None:
                if self._updated != trainer.global_step:  # LBFGS runs forward several times per step: the first counts
                    total, count = sum_over_ranks(trainer, self._scales)
                    self._update(total / count)
                    self._updated = trainer.global_step
            elif should_log(trainer):  # Lightning's log takes most of a millisecond
                total, count = sum_over_ranks(trainer, self._step_penalties)
                pl_module.log("train/scale_loss", total / count.clamp(min=1e-9))
        self._forget_batches()

    def _update(self, batch: Tensor) -> None:
        ema = self._ema.to(batch.device)
        updated = ema.lerp(torch.stack((batch, torch.ones_like(batch))), self.ema_rate)
        self._ema = updated.where(batch.isfinite(), ema)

    def state_dict(self) -> dict[str, Any]:
        """The moving average, (2,), and the target, 0-d or None before the boundary, on the CPU."""
        return {"ema": self._ema.cpu(), "target": None if self.target is None else self.target.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the moving average and target of the resumed run."""
        self._ema, self.target = state_dict["ema"], state_dict["target"]


def _is_centred(module: nn.Module) -> bool:
    return module.centred if isinstance(module, TaperNorm) else isinstance(module, nn.LayerNorm)


def _eps_of(module: nn.Module) -> float:
    eps = module.kind.eps if isinstance(module, TaperNorm) else getattr(module, "eps", None)
    eps = getattr(module, "variance_epsilon", None) if eps is None else eps  # transformers' word for it
    return torch.finfo(torch.float32).eps if eps is None else eps
