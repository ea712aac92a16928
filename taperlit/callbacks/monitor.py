"""Log what the taper does: gate, scalars, scales and gradients."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from taperlit.callbacks.gradients import numbers
from taperlit.callbacks.submodule import first_input, named_module
from taperlit.distributed import gradient_norms, mean_over_ranks, whole
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, plain_name, tapered_norms


class TaperMonitor(L.Callback):
    """Sends traces to the loggers every so many optimizer steps.

    ``taper/gate``; ``taper/alignment/<norm>``, every ``c`` (its estimate so far, while the gate is 1);
    ``taper/gain_mean/<norm>`` and ``taper/gain_std/<norm>`` of the gains in use (``g gamma + (1 - g) c gamma~``);
    ``taper/pre_logit_rms``; ``taper/logit_norm`` (mean over tokens of the logits' 2-norm); ``grad_norm/<weight
    type>``, layers taken together, as in figure 4 of arXiv:2602.10408. A model without TaperNorm gets the last three,
    so a baseline can be compared. FSDP1 hides the gains; FSDP2 does not.

    It works alone, on any LightningModule. With manual optimization a batch is recorded as a whole: of each optimizer
    that steps in it, the gradients of its own parameters.

    Args:
        every: optimizer steps between two records, as ``trainer.global_step`` counts them.
        residual: name of the module whose input is the pre-logit residual; None leaves that trace out.
        logits: name of the module whose output is the logits; None leaves that trace out.

    Raises:
        TaperlitError: before the first step, if there is no such module, or ``every`` is below 1; in the first step, if
            the output of ``logits`` is not a tensor.
    """

    def __init__(self, every: int = 50, residual: str | None = None, logits: str | None = None) -> None:
        if every < 1:
            raise TaperlitError(f"TaperMonitor.every is {every}; it must be at least 1.")
        self.every, self.residual, self.logits = every, residual, logits
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._stop_listening()
        self._norms: dict[str, TaperNorm] = {}
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._values: dict[str, Tensor] = {}  # of the batch under way, not yet sent
        self._due = False
        self._step = -1  # of the last record

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the norms and check the names."""
        self._norms = tapered_norms(pl_module)
        for name in filter(None, (self.residual, self.logits)):
            named_module(pl_module, name, "TaperMonitor")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run is: a resumed one records at the steps at which it would have."""
        self._step = trainer.global_step - 1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Listen to this forward pass, if its step is one to record."""
        # Several optimizers' steps may pass over a multiple of every.
        self._due = bool(trainer.loggers) and trainer.global_step // self.every > self._step // self.every
        if not self._due:
            return
        if self.residual is not None:
            module = pl_module.get_submodule(self.residual)
            self._hooks.append(module.register_forward_pre_hook(self._on_residual, with_kwargs=True))
        if self.logits is not None:
            self._hooks.append(pl_module.get_submodule(self.logits).register_forward_hook(self._on_logits))

    @torch.no_grad()
    def _on_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = first_input(module, args, kwargs)
        self._seen["taper/pre_logit_rms"].append(h.detach().float().square().mean(-1).sqrt().mean())

    @torch.no_grad()
    def _on_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TaperlitError(
                f"TaperMonitor.logits {self.logits!r} returns a {type(output).__name__}; name the module whose output "
                "is the logits."
            )
        self._seen["taper/logit_norm"].append(output.detach().float().norm(dim=-1).mean())

    def _stop_listening(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stop listening: checkpointed layers run forward again in the backward pass."""
        self._stop_listening()

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the step: gradients are whole here, and not clipped yet."""
        if not self._due:
            return
        if not self._values:
            self._step = trainer.global_step
            self._values = self._traces(trainer)
        parameters = pl_module.named_parameters()
        if not pl_module.automatic_optimization:  # the others' gradients are stale, or not of their own loss
            own = {p for group in optimizer.param_groups for p in group["params"]}
            parameters = ((name, p) for name, p in parameters if p in own)
        self._values.update(gradient_norms(trainer, _by_weight_type(parameters)))

    def _traces(self, trainer: L.Trainer) -> dict[str, Tensor]:
        values = {name: mean_over_ranks(trainer, torch.stack(parts).mean()) for name, parts in self._seen.items()}
        self._seen.clear()
        for name, norm in self._norms.items():
            values["taper/gate"] = gate = norm.gate.value.clone()
            values[f"taper/alignment/{name}"] = norm.alignment_estimate
            own, twin = norm.own("weight"), norm.taper_weight
            if own is not None and twin is not None and not isinstance(trainer.strategy, FSDPStrategy):
                gamma, twin_gamma = (norm.gain_offset + whole(weight).float() for weight in (own, twin))
                gain = torch.lerp(norm.alignment * twin_gamma, gamma, gate)
                values[f"taper/gain_mean/{name}"] = gain.mean()
                values[f"taper/gain_std/{name}"] = gain.std(correction=0)
        return values

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Send what was measured; leave no hook behind a skipped batch."""
        self._stop_listening()
        if not self._values:
            return
        values, self._values = self._values, {}
        device = pl_module.device
        numbers = torch.stack([value.detach().float().to(device) for value in values.values()]).tolist()  # one sync
        for logger in trainer.loggers:
            logger.log_metrics(dict(zip(values, numbers, strict=True)), step=self._step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self._forget()


def _by_weight_type(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[Tensor]]:
    """The gradients by parameter name without layer numbers."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in parameters:
        group = groups[f"grad_norm/{re.sub(r'[.][0-9]+(?=[.])', '', plain_name(name))}"]
        if parameter.grad is not None:
            group.append(numbers(parameter.grad))
    return groups
