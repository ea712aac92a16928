"""Freeze the norms' denominators one after the other, as FakeLN does."""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taperlit.baselines.fakeln import EPS, FakeLN, check_halves, freezing_order, require_fakeln
from taperlit.callbacks.added_loss import sum_over_ranks, with_added, wrap_training_step
from taperlit.callbacks.gradients import has_gradients
from taperlit.callbacks.submodule import first_input
from taperlit.data.tokenizer import end_of_text_id
from taperlit.distributed import keep_buffers_float32, mean_over_ranks
from taperlit.errors import TaperlitError
from taperlit.norm import plain_name
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.training.lightning_compat import should_log

MOMENTUM = 0.9  # of the moving sigma, per micro-batch


def _as_it_is(value: Tensor) -> Tensor:
    return value


class FakeLNSchedule(L.Callback):
    """Measures each norm's ``sigma``, freezes the norms in FakeLN's order, and adds its scale loss (arXiv:2507.02559).

    Frozen are: every MLP norm, the blocks ascending; then every attention norm for the q and k path; then for the v
    path; then the final norm. Each is frozen at the beginning of its optimizer step, counted from 1. When all are,
    the gate is 0 and the model folds. The model is prepared by :func:`taperlit.baselines.apply_fakeln`.

    ``sigma`` is measured once, on the batches of the run's first step, which sees the weights as they were: the
    standard deviation (root mean square in the RMSNorm kind) over channels and positions from 1 on together. The
    ``moving`` one is the moving average of the mean over tokens of ``sqrt(var + 1e-5)``, momentum 0.9 per micro-batch,
    until the norm is frozen.

    The scale loss is ``aux_weight * mean((s_t - s_bar)^2)``: ``s_t = sqrt(var + 1e-5)`` of the final norm's input at
    token t (the root mean square in the RMSNorm kind), ``s_bar`` their detached mean over the micro-batch, of all
    ranks. Position 0, end-of-text tokens and padding are left out; token ids are the first tensor of whole numbers in
    the batch.

    FakeLN's own schedules, in 300, 500, 600 and 800 steps, are ``(20, 2, 2, 3)`` for GPT-2 Small and Medium,
    ``(30, 4, 4, 6)`` for Large and ``(50, 4, 4, 6)`` for XL, where ``aux_weight`` is 0.1, 0.1, 0.03 and 0.01. The
    defaults are Small's in fractions of the run. A resumed run keeps the schedule it began with. Under
    ``fast_dev_run`` everything is frozen in the second step.

    Example::

        taperlit.baselines.apply_fakeln(model)
        trainer = Trainer(max_steps=300, callbacks=[FakeLNSchedule(start=20, mlp=2, qk=2, v=3)])

    Args:
        start: step of the first freeze, in steps (int) or as a fraction of ``max_steps`` (float); at least 2.
        mlp: steps from one MLP norm to the next (int), or the fraction of ``max_steps`` that they all take (float).
        qk: likewise, of attention norms for the q and k path.
        v: likewise, for the v path.
        final: step of the final norm, in steps or as a fraction; None is as soon as the v path is through.
        sigma: measured at the ``start`` of the run, or ``moving``.
        halves: freeze attention's norms in two halves; False freezes each at once, when its q and k path would be.
        aux_weight: of the scale loss; 0 is none.
        end_of_text: id of the token that is left out; None is that of the tokenizer of the run's data, if it has one.

    Raises:
        TaperlitError: a value out of its range; before the first step, if the model has no FakeLN or a norm that cannot
            be frozen in halves (it is named), a scale loss has no final norm or optimization is manual, or the schedule
            is longer than the run; in it, if a norm has no ``sigma`` when it is to be frozen.
    """

    def __init__(
        self,
        start: int | float = 0.067,
        mlp: int | float = 0.08,
        qk: int | float = 0.08,
        v: int | float = 0.12,
        final: int | float | None = None,
        sigma: Literal["start", "moving"] = "start",
        halves: bool = True,
        aux_weight: float = 0.1,
        end_of_text: int | None = None,
    ) -> None:
        if sigma not in ("start", "moving"):
            raise TaperlitError(f"FakeLNSchedule.sigma is {sigma!r}; choose start or moving.")
        require_steps("FakeLNSchedule.start", start, least=0 if isinstance(start, float) else 2)  # step 1 measures
        for name, steps in {"mlp": mlp, "qk": qk, "v": v, "final": final}.items():
            require_steps(f"FakeLNSchedule.{name}", steps)
        require_range("FakeLNSchedule.aux_weight", aux_weight, least=0)
        require_range("FakeLNSchedule.end_of_text", end_of_text, least=0)
        self.start, self.mlp, self.qk, self.v, self.final = start, mlp, qk, v, final
        self.sigma, self.halves, self.aux_weight, self.end_of_text = sigma, halves, aux_weight, end_of_text
        self._undo: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        self._norms: dict[str, FakeLN] = {}
        self._schedule: list[tuple[int, str, bool]] = []  # step, norm, whether its q and k path alone; in order
        self._end_of_text: int | None = None
        self._tokens: Tensor | None = None  # of the batch under way
        self._all_reduce_mean: Callable[[Tensor], Tensor] = _as_it_is
        self._penalties: list[Tensor] = []  # of the forward pass under way
        self._step_penalties: list[Tensor] = []  # of the micro-batches since the last optimizer step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit, and keep what is measured in float32 in every strategy."""
        keep_buffers_float32(trainer)
        if stage == "fit":
            self._release()
            self._forget()

    # ---- the schedule

    def schedule(self, trainer: L.Trainer) -> list[tuple[int, str, bool]]:
        """What is frozen when: the step, the norm's name, and whether it is its q and k path alone.

        Args:
            trainer: of the run, whose fit has begun.

        Raises:
            TaperlitError: it is longer than the run.
        """
        if self._schedule:
            return self._schedule
        stages, total = freezing_order(self._norms, self.halves), trainer.max_steps
        if trainer.fast_dev_run:
            return [(2, *norm) for stage in stages.values() for norm in stage]
        step = resolve_steps(self.start, total, "FakeLNSchedule.start")
        if isinstance(self.start, float):
            step = max(step, 2)
        planned: list[tuple[int, str, bool]] = []
        for name in ("mlp", "qk", "v"):
            stage, pace = stages[name], getattr(self, name)
            count = len(stage)
            length = resolve_steps(pace, total, f"FakeLNSchedule.{name}") * (1 if isinstance(pace, float) else count)
            planned += [(step + i * length // count, *norm) for i, norm in enumerate(stage)]
            step += length if count else 0
        if self.final is not None:
            last, step = step, resolve_steps(self.final, total, "FakeLNSchedule.final")
            if step < max((at for at, *_ in planned), default=0):
                raise TaperlitError(f"FakeLNSchedule.final is step {step}, before the others are through at {last}.")
        planned += [(step, *norm) for norm in stages["final"]]
        if 0 < total < planned[-1][0]:
            raise TaperlitError(
                f"FakeLNSchedule freezes its last norm at step {planned[-1][0]}, beyond the run's {total} "
                "(trainer.max_steps); give it fewer steps, or fractions of the run."
            )
        return planned

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the model and the schedule, and prepare the scale loss."""
        self._norms = {plain_name(name): norm for name, norm in require_fakeln(pl_module, "FakeLNSchedule").items()}
        self._schedule = self.schedule(trainer)
        for _, name, half in self._schedule:
            if half:
                check_halves(pl_module, self._norms[name])
        if not self.aux_weight:
            return
        if not pl_module.automatic_optimization:
            raise TaperlitError(
                "FakeLNSchedule adds its scale loss to what training_step returns, which manual optimization does not "
                "use: train with automatic optimization, or give it aux_weight=0."
            )
        final = [norm for norm in self._norms.values() if norm.role == "final"]
        if len(final) != 1:
            raise TaperlitError("FakeLNSchedule's scale loss needs the model's one final norm; give it aux_weight=0.")
        self._end_of_text = self._find_end_of_text(trainer)
        self._all_reduce_mean = functools.partial(mean_over_ranks, trainer)
        hook = final[0].register_forward_pre_hook(self._on_residual, with_kwargs=True)
        self._undo = [hook.remove, wrap_training_step(pl_module, lambda: self._penalties.clear(), self._add_penalty)]

    def _find_end_of_text(self, trainer: L.Trainer) -> int | None:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer_json", None)
        if self.end_of_text is not None or tokenizer is None:
            return self.end_of_text
        try:
            return end_of_text_id(Tokenizer.from_str(tokenizer))
        except TaperlitError:
            return None  # its documents have no end that could be told

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See what is frozen already; measure anew where a run begins, and drop what a tuner's steps left behind."""
        self._step_penalties.clear()
        for norm in self._norms.values():
            norm.refresh()
            norm.pending.zero_()
            if trainer.global_step == 0:
                norm.forget()
            if norm.is_frozen or norm.is_half_frozen:
                norm.measure = "no"
            elif self.sigma == "moving":
                norm.measure = "per token"
            else:
                norm.measure = "no" if norm.has_sigma else "together"
        self._close_gate()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freeze what is due in the optimizer step that this batch belongs to."""
        self._tokens = next((leaf for leaf in tree_leaves(batch) if _is_whole(leaf)), None)
        due = [(name, half) for at, name, half in self._schedule if at <= trainer.global_step + 1]
        for name, half in due:
            norm = self._norms[name]
            if not norm.is_frozen and not (half and norm.is_half_frozen):
                norm.freeze(half)
        self._close_gate()

    def _close_gate(self) -> None:
        if all(norm.is_frozen for norm in self._norms.values()):
            gate = next(iter(self._norms.values())).gate
            gate.set(0.0)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the step's measurements, over its micro-batches and all ranks; log the step's scale loss."""
        if self.sigma == "start":
            self._take(trainer)
        if self.aux_weight and has_gradients(optimizer) and should_log(trainer):
            total, count = sum_over_ranks(trainer, self._step_penalties)
            pl_module.log("train/scale_loss", total / count.clamp(min=1e-9))
        self._step_penalties.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the moving ``sigma``; see that half-frozen norms were asked for both halves."""
        if self.sigma == "moving":
            self._take(trainer)
        for norm in self._norms.values():
            norm.require_taken()

    def _take(self, trainer: L.Trainer) -> None:
        norms = [norm for norm in self._norms.values() if norm.measure != "no"]
        if not norms:
            return
        sums = mean_over_ranks(trainer, torch.stack([norm.pending for norm in norms]))  # (n_norm, 3)
        for norm, (*values, count) in zip(norms, sums, strict=True):
            norm.take(torch.stack(values) / count, MOMENTUM if self.sigma == "moving" else 0.0)
            norm.pending.zero_()
            if self.sigma == "start" and norm.has_sigma:  # else of the next step
                norm.measure = "no"

    # ---- the scale loss

    def _on_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        h = first_input(module, args, kwargs)
        self._penalties.append(self.penalty(h, self._tokens, cast(FakeLN, module), self._all_reduce_mean))

    def penalty(
        self,
        h: Tensor,
        tokens: Tensor | None,
        norm: FakeLN,
        all_reduce_mean: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> Tensor:
        """``mean((s_t - s_bar)^2)`` over the tokens that count, 0-d float32.

        Args:
            h: (..., T, d_model), the final norm's input.
            tokens: (..., T) ids of the batch, or more of them; None where it has none.
            norm: the final one.
            all_reduce_mean: averages a (2,) tensor over the ranks.

        Raises:
            TaperlitError: an end-of-text token is to be left out and the ids do not belong to ``h``.
        """
        h = h.float()
        if norm.centred:
            h = h - h.mean(-1, keepdim=True)
        s = (h.square().mean(-1) + EPS).sqrt()  # (..., T)
        counts = torch.ones_like(s)
        if s.dim() > 1:
            counts[..., 0] = 0.0
        if tokens is not None and tokens.dim() == s.dim() and tokens.shape[-1] >= s.shape[-1]:
            tokens = tokens[..., : s.shape[-1]]
        if tokens is not None and tokens.shape == s.shape:
            counts = counts * (tokens >= 0)
            if self._end_of_text is not None:
                counts = counts * (tokens != self._end_of_text)
        elif self._end_of_text is not None:
            raise TaperlitError(
                f"FakeLNSchedule leaves out end-of-text tokens, and the batch has no token ids of the shape "
                f"{tuple(s.shape)} that {norm.label}'s input has; give it aux_weight=0."
            )
        # Of all ranks, so that their penalties' mean is that of one process that saw all of the batch.
        total, count = all_reduce_mean(torch.stack(((s * counts).sum(), counts.sum())).detach())
        count = count.clamp(min=1e-9)
        return ((s - total / count).square() * counts).sum() / count

    def _add_penalty(self, output: Any) -> Any:
        if output is None or not torch.is_grad_enabled() or not self._penalties:
            return output
        penalty = torch.stack(self._penalties).mean()
        self._step_penalties.append(penalty.detach())
        return with_added(output, self.aux_weight * penalty)

    # ---- the end, and what is saved

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the model back without hook and wrapper."""
        self._release()
        for norm in self._norms.values():
            norm.measure = "no"
        self._tokens = None
        self._all_reduce_mean = _as_it_is

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the model back after an error too: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The schedule: step, norm and half of every freeze. What is frozen, and at which number, is in the norms."""
        return {"schedule": [list(entry) for entry in self._schedule]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the schedule that the resumed run began with."""
        self._schedule = [(int(step), str(name), bool(half)) for step, name, half in state_dict["schedule"]]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )
