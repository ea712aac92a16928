"""Log what the taper does: gate, scalars, scales and gradients."""

import re
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from taperlit.callbacks.partners import named_module
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

    Args:
        every: optimizer steps between two records.
        residual: name of the module whose input is the pre-logit residual; None leaves that trace out.
        logits: name of the module whose output is the logits; None leaves that trace out.

    Raises:
        TaperlitError: before the first step, if there is no such module, or ``every`` is below 1.
    """

    def __init__(self, every: int = 50, residual: str | None = None, logits: str | None = None) -> None:
        if every < 1:
            raise TaperlitError(f"TaperMonitor.every is {every}; it must be at least 1.")
        self.every, self.residual, self.logits = every, residual, logits
        self._norms: dict[str, TaperNorm] = {}
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._due = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the norms and check the names."""
        self._norms = tapered_norms(pl_module)
        for name in filter(None, (self.residual, self.logits)):
            named_module(pl_module, name, "TaperMonitor")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Listen to this forward pass, if its step is one to record."""
        self._due = bool(trainer.loggers) and trainer.global_step % self.every == 0
        if not self._due:
            return
        if self.residual is not None:
            module = pl_module.get_submodule(self.residual)
            self._hooks.append(module.register_forward_pre_hook(self._on_residual))
        if self.logits is not None:
            self._hooks.append(pl_module.get_submodule(self.logits).register_forward_hook(self._on_logits))

    @torch.no_grad()
    def _on_residual(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen["taper/pre_logit_rms"].append(args[0].detach().float().square().mean(-1).sqrt().mean())

    @torch.no_grad()
    def _on_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
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
        """Record the step: gradients are whole here, and not clipped yet."""
        if not self._due:
            return
        values = {name: mean_over_ranks(trainer, torch.stack(parts).mean()) for name, parts in self._seen.items()}
        self._seen.clear()
        values.update(gradient_norms(trainer, _by_weight_type(pl_module)))
        if self._norms:
            gate = next(iter(self._norms.values())).gate.value
            values["taper/gate"] = gate
            for name, norm in self._norms.items():
                values[f"taper/alignment/{name}"] = norm.alignment_estimate
                if norm.weight is not None and not isinstance(trainer.strategy, FSDPStrategy):
                    weight, taper_weight = whole(norm.weight).float(), whole(norm.taper_weight).float()
                    gain = torch.lerp(norm.alignment * taper_weight, weight, gate)
                    values[f"taper/gain_mean/{name}"] = gain.mean()
                    values[f"taper/gain_std/{name}"] = gain.std(correction=0)
        device = pl_module.device
        numbers = torch.stack([value.detach().float().to(device) for value in values.values()]).tolist()  # one sync
        for logger in trainer.loggers:
            logger.log_metrics(dict(zip(values, numbers, strict=True)), step=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Leave no hook behind a skipped batch."""
        self._stop_listening()


def _by_weight_type(model: nn.Module) -> dict[str, list[Tensor]]:
    """The gradients by parameter name without layer numbers."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        group = groups[f"grad_norm/{re.sub(r'[.][0-9]+(?=[.])', '', plain_name(name))}"]
        if parameter.grad is not None:
            group.append(parameter.grad)
    return groups
