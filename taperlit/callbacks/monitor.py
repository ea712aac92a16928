"""Log what the taper does: gate, scalars, scales and gradients."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn

from taperlit.callbacks import dashboard
from taperlit.callbacks.gradients import numbers
from taperlit.callbacks.radial import RadialGradient
from taperlit.callbacks.submodule import first_input, named_module
from taperlit.callbacks.token_scale import is_uncounted, token_scale
from taperlit.distributed import gradient_norms, mean_over_ranks, whole
from taperlit.errors import TaperlitError
from taperlit.norm import TaperNorm, plain_name, tapered_norms
from taperlit.ranges import require_range

TAILS = ("max", "p999")
HISTOGRAMS = 200  # of each norm in a whole run, at most: they take a hundred times a number's space


class TaperMonitor(L.Callback):
    """Sends traces to the loggers every so many optimizer steps.

    ``taper/gate``; ``taper/alignment/<norm>``, every ``c`` (its estimate so far, while the gate is 1);
    ``taper/gain_mean/<norm>`` and ``taper/gain_std/<norm>`` of the gains in use (``g gamma + (1 - g) c gamma~``);
    ``taper/scale_max/<norm>`` and ``taper/scale_p999/<norm>``, the tails of the scales at its input, in every phase;
    ``taper/scale_max``, the largest of all; ``taper/pre_logit_rms``; ``taper/logit_norm`` (mean over tokens of the
    logits' 2-norm); ``taper/radial_gradient``; ``grad_norm/<weight type>``, layers taken together, as in figure 4 of
    arXiv:2602.10408. A model without TaperNorm gets the last four and the residual's scales, so a baseline can be
    compared. FSDP1 hides the gains; FSDP2 does not.

    A scale is a token's root mean square (standard deviation for the LayerNorm kind); the traces are the largest and
    the least that at least 99.9% of the tokens do not exceed, over the mean of all, of a step's micro-batches. Over
    several processes the second is the mean of theirs. The pre-logit residual stands under the name ``residual``. They
    take a few operations per norm in the steps that are recorded, and none in others. A norm within a compiled graph,
    where hooks are not seen, has none.

    The radial gradient is ``sum over tokens of <dL/dh, h> / ||h||`` for the pre-logit residual ``h``, (..., d). As
    ``L``, what ``training_step`` returns, is a mean over tokens, it is the mean over tokens of each one's own, and does
    not depend on the batch's size: the slope of ``L`` when every residual grows by the same length. With a final norm
    it is zero (proposition 4.1, but for the norm's eps and rounding), without one it is negative where the right
    tokens lead (4.2): training then makes the logits grow. It is that of the loss before scaling for precision, as a
    mean over micro-batches and ranks, and of what comes to ``h`` through ``residual`` alone: ScaleAnchor's loss, which
    is on ``h`` itself, is not in it. There is none with manual optimization and DeepSpeed, where what is given to the
    backward pass is not known, nor for an ``h`` that is within a compiled graph, needs no gradient or is written over.

    TensorBoard gets histograms ``gain/<norm>`` in place of the gains' mean and spread (200 in a run at most), and
    a dashboard of all these and the losses: "Custom Scalars", ``localhost:6006/#custom_scalars``. Every other logger
    gets plain numbers.

    It works alone, on any LightningModule. With manual optimization a batch is recorded as a whole: of each optimizer
    that steps in it, the gradients of its own parameters.

    Args:
        every: optimizer steps between two records, as ``trainer.global_step`` counts them.
        residual: name of the module whose input is the pre-logit residual; None leaves its two traces out.
        logits: name of the module whose output is the logits; None leaves that trace out.

    Raises:
        TaperlitError: before the first step, if there is no such module, or ``every`` is below 1; in the first step, if
            the output of ``logits`` is not a tensor.
    """

    def __init__(self, every: int = 50, residual: str | None = None, logits: str | None = None) -> None:
        require_range("TaperMonitor.every", every, least=1)
        self.every, self.residual, self.logits = every, residual, logits
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._radial = RadialGradient()
        self._forget()

    def _forget(self) -> None:
        self._stop_listening()
        self._radial.forget()
        self._norms: dict[str, TaperNorm] = {}
        self._means: tuple[str, ...] = ()  # the traces that are means over what the ranks see
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._scaled: dict[str, nn.Module] = {}  # whose inputs' scales are watched
        self._scales: dict[str, list[Tensor]] = defaultdict(list)  # (N,) per call
        self._values: dict[str, Tensor] = {}  # of the batch under way, not yet sent
        self._shares: dict[str, Tensor] = {}  # of the ranks that had something to average, for some of the values
        self._gains: dict[str, Tensor] = {}  # to draw
        self._due = False
        self._step = self._drawn = -1  # of the last record, and of the last histograms

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the norms, check the names and lay out the dashboard."""
        self._norms = tapered_norms(pl_module)
        for name in filter(None, (self.residual, self.logits)):
            named_module(pl_module, name, "TaperMonitor")
        means = {
            "taper/pre_logit_rms": self.residual is not None,
            "taper/logit_norm": self.logits is not None,
            "taper/radial_gradient": self.residual is not None
            and pl_module.automatic_optimization
            and not isinstance(trainer.strategy, DeepSpeedStrategy),
        }
        self._means = tuple(name for name, wanted in means.items() if wanted)
        self._scaled = _watched(pl_module, self._norms, self.residual)
        tags = [*self._means, *(f"taper/alignment/{name}" for name in self._norms)]
        tags += [f"taper/scale_{what}/{name}" for name in self._scaled for what in TAILS]
        tags += ["taper/scale_max"] if self._scaled else []
        tags += ["taper/gate"] if self._norms else []
        tags += _by_weight_type(pl_module.named_parameters())
        for writer in dashboard.writers(trainer):
            writer.add_custom_scalars(dashboard.layout(tags))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run is: a resumed one records at the steps at which it would have."""
        self._step = self._drawn = trainer.global_step - 1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Listen to this forward pass, if its step is one to record."""
        # Several optimizers' steps may pass over a multiple of every.
        self._due = bool(trainer.loggers) and trainer.global_step // self.every > self._step // self.every
        if not self._due:
            return
        for name, module in self._scaled.items():
            look = partial(self._on_scaled, name)
            self._hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
        if self.residual is not None:
            module = pl_module.get_submodule(self.residual)
            self._hooks.append(module.register_forward_pre_hook(self._on_residual, with_kwargs=True))
            if "taper/radial_gradient" in self._means:
                self._radial.listen(module)
        if self.logits is not None:
            self._hooks.append(pl_module.get_submodule(self.logits).register_forward_hook(self._on_logits))

    @torch.no_grad()
    def _on_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_uncounted():
            return
        h = first_input(module, args, kwargs)
        if h.numel():
            self._seen["taper/pre_logit_rms"].append(h.detach().float().square().mean(-1).sqrt().mean())

    @torch.no_grad()
    def _on_scaled(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_uncounted():
            return
        h = first_input(module, args, kwargs).detach()
        if h.numel():  # else it is an expert that gets no token
            self._scales[name].append(token_scale(module, h).flatten())

    @torch.no_grad()
    def _on_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_uncounted():
            return
        if not isinstance(output, Tensor):
            raise TaperlitError(
                f"TaperMonitor.logits {self.logits!r} returns a {type(output).__name__}; name the module whose output "
                "is the logits."
            )
        if output.numel():
            self._seen["taper/logit_norm"].append(output.detach().float().norm(dim=-1).mean())

    def _stop_listening(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stop listening: checkpointed layers run forward again in the backward pass."""
        self._stop_listening()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Undo what was done to the loss before the backward pass."""
        if not self._due or "taper/radial_gradient" not in self._means:
            return
        factor = torch.tensor(float(trainer.accumulate_grad_batches), device=pl_module.device)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Its factor stays on the device: asking for it as a number would wait.
        self._radial.end_pass(factor if scaler is None else factor / scaler.scale(torch.ones_like(factor)))

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
        values = self._averages(trainer) | self._tails(trainer)
        for name, norm in self._norms.items():
            values["taper/gate"] = norm.gate.value.clone()
            values[f"taper/alignment/{name}"] = norm.alignment_estimate
        interval = max(self.every, -(-trainer.max_steps // HISTOGRAMS))
        draws = self._step // interval > self._drawn // interval and bool(dashboard.writers(trainer))
        counts = not all(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        if not isinstance(trainer.strategy, FSDPStrategy):
            for name, gain in _gains_in_use(self._norms).items():
                if counts:
                    values[f"taper/gain_mean/{name}"] = gain.mean()
                    values[f"taper/gain_std/{name}"] = gain.std(correction=0)
                if draws:
                    self._gains[name] = gain
        return values

    def _averages(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """The means over all ranks; a rank may have nothing to add, as the modules need not run on each."""
        self._seen["taper/radial_gradient"] = self._radial.take()
        device = trainer.strategy.root_device
        none, one = torch.zeros(2, device=device), torch.ones((), device=device)
        pairs = []
        for name in self._means:
            parts = self._seen[name]
            pairs.append(torch.stack((torch.stack(parts).mean().float().to(device), one)) if parts else none)
        self._seen.clear()
        if not pairs:
            return {}
        totals, shares = mean_over_ranks(trainer, torch.stack(pairs)).unbind(-1)
        self._shares = dict(zip(self._means, shares, strict=True))
        return dict(zip(self._means, totals / shares, strict=True))

    def _tails(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """The tails of the scales over all ranks; a norm need not run on each."""
        if not self._scaled:
            return {}
        none = torch.zeros(4, device=trainer.strategy.root_device)
        figures = torch.stack([_figures(self._scales[name], none) for name in self._scaled])
        self._scales.clear()
        largest = figures[:, 3].clone()
        if trainer.world_size > 1:
            largest = trainer.strategy.reduce(largest, reduce_op="max")
        mean, p999, share, _ = mean_over_ranks(trainer, figures).unbind(-1)
        ratios = torch.stack((largest * share / mean, p999 / mean))  # mean and p999 are over all ranks, share too
        summary = ratios[0].where(share > 0, -torch.inf).amax()
        values = {"taper/scale_max": summary}
        self._shares["taper/scale_max"] = share.amax()
        for what, row in zip(TAILS, ratios, strict=True):
            names = [f"taper/scale_{what}/{name}" for name in self._scaled]
            values |= dict(zip(names, row, strict=True))
            self._shares |= dict(zip(names, share, strict=True))
        return values

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Send what was measured; leave no hook behind a skipped batch."""
        self._stop_listening()
        self._radial.stop()
        if not self._values:
            return
        values, shares, gains = self._values, self._shares, self._gains
        self._values, self._shares, self._gains = {}, {}, {}
        device = pl_module.device
        tensors = [tensor.detach().float().to(device) for tensor in (*values.values(), *shares.values())]
        read = torch.stack(tensors).tolist()  # one sync
        had = dict(zip(shares, read[len(values) :], strict=True))
        numbers = {name: number for name, number in zip(values, read, strict=False) if had.get(name, 1)}
        bare = {name: number for name, number in numbers.items() if not name.startswith("taper/gain_")}
        for logger in trainer.loggers:
            logger.log_metrics(bare if isinstance(logger, TensorBoardLogger) else numbers, step=self._step)
        if gains:
            self._drawn = self._step
            for writer in dashboard.writers(trainer):
                dashboard.add_gains(writer, gains, self._step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the model after an error too: Lightning calls no teardown then."""
        self._forget()


def _watched(pl_module: nn.Module, norms: Mapping[str, nn.Module], residual: str | None) -> dict[str, nn.Module]:
    """The modules whose inputs' scales are traced: the norms and the residual's, but for those in compiled graphs."""
    found = dict(norms)
    if residual is not None and residual not in found:
        found[residual] = pl_module.get_submodule(residual)
    compiled = [
        module
        for module in pl_module.modules()
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None  # torch.compile's two ways
    ]
    hidden = {id(inner) for module in compiled for inner in module.modules()}
    return {name: module for name, module in found.items() if id(module) not in hidden}


def _figures(scales: list[Tensor], none: Tensor) -> Tensor:
    """Of one norm's scales on this rank: mean, 99.9th percentile, 1, and the largest; (4,) of zeros without any."""
    if not scales:
        return none
    values = torch.cat(scales).float().to(none.device)
    # The least that 99.9% do not exceed is the last of the few largest: no need to sort the others.
    few = values.topk(len(values) - -(-len(values) * 999 // 1000) + 1).values
    return torch.stack((values.mean(), few[-1], torch.ones_like(few[0]), few[0]))


def _gains_in_use(norms: dict[str, TaperNorm]) -> dict[str, Tensor]:
    """``g gamma + (1 - g) c gamma~`` of every norm that has gains, float32."""
    gains = {}
    for name, norm in norms.items():
        own, twin = norm.own("weight"), norm.taper_weight
        if own is not None and twin is not None:
            gamma, twin_gamma = (norm.gain_offset + whole(weight).float() for weight in (own, twin))
            gains[name] = torch.lerp(norm.alignment * twin_gamma, gamma, norm.own_gate)
    return gains


def _by_weight_type(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[Tensor]]:
    """The gradients by parameter name without layer numbers."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in parameters:
        group = groups[f"grad_norm/{re.sub(r'[.][0-9]+(?=[.])', '', plain_name(name))}"]
        if parameter.grad is not None:
            group.append(numbers(parameter.grad))
    return groups
