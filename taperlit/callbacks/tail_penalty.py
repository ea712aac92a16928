"""Hold down the tokens whose scale is many times the mean, which a norm would have hidden."""

import fnmatch
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from taperlit.callbacks.added_loss import sum_over_ranks, with_added, wrap_training_step
from taperlit.callbacks.gradients import has_gradients
from taperlit.callbacks.submodule import first_input, named_module
from taperlit.callbacks.token_scale import token_scale, uncounted
from taperlit.distributed import data_rank, mean_over_ranks
from taperlit.errors import TaperlitError
from taperlit.modes import evaluating
from taperlit.norm import plain_name, tapered_norms
from taperlit.ranges import require_range, require_seed, require_steps
from taperlit.schedule import resolve_steps
from taperlit.training.lightning_compat import should_log


class TailPenalty(L.Callback):
    """Adds ``weight * mean(relu(s / target - multiple)^2)`` to the training loss, over tokens and watched modules.

    ``s`` is the scale of a token at the input of a module: its root mean square (standard deviation for the LayerNorm
    kind), in float32. ``target`` is that module's own moving average of the mean of ``s``, without gradient; it goes on
    moving, so that the penalty is on tokens that are large beside others, and not on growth that all share. A linear
    map passes a token's size on and SwiGLU squares it, layer after layer, where a norm would have made all alike: the
    penalty keeps the few large ones from getting there. It acts from the second step on (the first gathers the
    targets), or after ``start``, and to the end of the training, also when the gate is closed. Validation never
    contains it. The statistic costs a few elementwise operations and one reduction over ``d`` per module and step.

    With ``random_every`` every so many steps add the same penalty of a forward pass on uniformly random token ids,
    without any language loss: folded models are worst on input that no text has. Its sequences are short, for a first
    token is the largest: what attention gives it is no average over others, and a batch of text has few. That pass
    is in eval mode and eager, and counts in nobody's statistics. Its tokens follow from ``seed``, the step and the
    process, and no generator is drawn from, so that a resumed run goes on as the unbroken one. Only one micro-batch of
    a step has it. Where its penalty is not finite it is left out with a warning.

    Example::

        Trainer(callbacks=[GateSchedule(), AlignmentFreeze(), TailPenalty(residual="model.final_norm", random_every=4)])

    Args:
        modules: glob patterns over module names, whose inputs are watched; None is every TaperNorm.
        residual: name of one more: the module that is given the pre-logit residual.
        weight: of the penalty.
        multiple: of the target, up to which a scale is free.
        ema_rate: rate of the targets' moving averages, per optimizer step.
        start: the penalty begins after this many steps (int) or fraction of ``max_steps`` (float); the targets are
            gathered from the first step on.
        random_every: optimizer steps from one random pass to the next; None is never.
        random_sequences: how many sequences it has.
        random_length: tokens of each, at most as many as the training's have.
        model: name of the module that is called with (B, T) token ids in training, by position or by name, and gives
            what the penalty needs when it is called with them alone; empty is the LightningModule itself.
        vocab_size: random ids are below it; None asks ``model``, its config or its embedding.
        seed: of the random tokens.

    Raises:
        TaperlitError: a value out of its range; before the first step, if no module matches, there is no such module,
            the vocabulary is not known, or optimization is manual; in the first step, if no watched module ran; in the
            first step with a random pass, if ``model`` is not called with token ids.
    """

    def __init__(
        self,
        modules: Sequence[str] | None = None,
        residual: str | None = None,
        weight: float = 1.0,
        multiple: float = 3.0,
        ema_rate: float = 0.01,
        start: int | float = 0,
        random_every: int | None = None,
        random_sequences: int = 64,
        random_length: int = 16,
        model: str = "model",
        vocab_size: int | None = None,
        seed: int = 0,
    ) -> None:
        require_range("TailPenalty.weight", weight, least=0)
        require_range("TailPenalty.multiple", multiple, least=1)
        require_range("TailPenalty.ema_rate", ema_rate, above=0, most=1)
        require_steps("TailPenalty.start", start)
        require_range("TailPenalty.random_every", random_every, least=1, mend="null is never")
        require_range("TailPenalty.random_sequences", random_sequences, least=1)
        require_range("TailPenalty.random_length", random_length, least=1)
        require_range("TailPenalty.vocab_size", vocab_size, least=1)
        require_seed("TailPenalty.seed", seed)
        self.modules = [modules] if isinstance(modules, str) else modules
        self.residual, self.weight, self.multiple, self.ema_rate = residual, weight, multiple, ema_rate
        self.start, self.random_every = start, random_every
        self.random_sequences, self.random_length = random_sequences, random_length
        self.model, self.vocab_size, self.seed = model, vocab_size, seed
        self._undo: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        self._watched: dict[str, nn.Module] = {}
        self._saved: dict[str, Tensor] = {}  # of the run that is resumed
        self._ema = torch.zeros(0, 2)  # per module: moving averages of s and of 1, which corrects the bias
        self._updated: int | None = None  # the global step of the last update
        self._start = 0
        self._fed: _Fed | None = None
        self._vocab_size = 0
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._means: list[Tensor] = []  # per micro-batch since the last optimizer step: sums of s and of 1, (n, 2)
        self._step_penalties: list[Tensor] = []
        self._step_random: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; what a checkpoint restores comes after this."""
        if stage == "fit":
            self._release()
            self._forget()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the modules, and check what a random pass will need."""
        self._watched = self._find(pl_module)
        self._start = resolve_steps(self.start, trainer.max_steps, "TailPenalty.start")
        if not pl_module.automatic_optimization:
            raise TaperlitError(
                "TailPenalty adds its loss to what training_step returns, which manual optimization does not use: "
                "train with automatic optimization, or leave TailPenalty out."
            )
        if self.random_every is not None:
            model = named_module(pl_module, self.model, "TailPenalty")
            self._vocab_size = self.vocab_size or _vocab_size_of(model) or 0
            if not self._vocab_size:
                raise TaperlitError(
                    f"TailPenalty.random_every needs to know how many tokens {type(model).__name__} {self.model!r} "
                    "has: give vocab_size."
                )

    def _find(self, pl_module: L.LightningModule) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = dict(tapered_norms(pl_module)) if self.modules is None else {}
        for pattern in self.modules or ():
            named = ((plain_name(name), module) for name, module in pl_module.named_modules() if name)
            matching = {name: module for name, module in named if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                raise TaperlitError(f"TailPenalty.modules {pattern!r} matches no module of {type(pl_module).__name__}.")
            found |= matching
        if self.residual is not None:
            residual = named_module(pl_module, self.residual, "TailPenalty")
            if not any(module is residual for module in found.values()):
                found[self.residual] = residual
        if not found:
            raise TaperlitError(
                "TailPenalty has nothing to watch: call taperlit.taper on the model, or name modules= or residual=."
            )
        return found

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the modules, and wrap ``training_step``: after the others' ``on_fit_start``, around their wrappers."""
        self._release()
        self._forget_batches()
        self._ema = torch.stack([self._saved.get(name, torch.zeros(2)) for name in self._watched])
        for module in self._watched.values():
            watch = Watch(torch.tensor(torch.inf, device=pl_module.device), self.multiple)
            module.tail_watch = watch  # type: ignore[assignment]
            self._undo += [module.register_forward_pre_hook(look, with_kwargs=True).remove, _forgetting(module)]
        if self.random_every is not None:
            model = named_module(pl_module, self.model, "TailPenalty")
            self._undo.append(model.register_forward_pre_hook(self._on_tokens, with_kwargs=True).remove)
        self._undo.append(
            wrap_training_step(pl_module, self._begin, lambda output: self._add_penalty(trainer, pl_module, output))
        )

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the model back without hooks and wrapper."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the model back after an error too: Lightning calls no teardown then."""
        self._release()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set this batch's targets: infinite, so that nothing is penalized, where there are none yet."""
        mean, weight = self._ema.unbind(-1)
        target = torch.where(weight > 0, mean / weight, torch.inf)
        if trainer.global_step < self._start:
            target = torch.full_like(target, torch.inf)
        for watch, value in zip(self._watches(), target.to(pl_module.device).unbind(), strict=True):
            watch.target = value

    def _watches(self) -> list["Watch"]:
        return [module.tail_watch for module in self._watched.values()]  # type: ignore[misc]

    def _begin(self) -> None:
        for watch in self._watches():
            watch.clear()

    def _on_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._fed = _fed(args, kwargs) or self._fed

    def _add_penalty(self, trainer: L.Trainer, pl_module: L.LightningModule, output: Any) -> Any:
        if output is None or not torch.is_grad_enabled():  # no loss, or a replay that only looks at the outputs
            return output
        penalty, means = self._take(pl_module.device)
        if penalty is None:
            raise TaperlitError(
                f"None of TailPenalty's modules ({', '.join([*self._watched][:3])}) ran in training_step with "
                "gradients and in training mode; name others."
            )
        self._means.append(means)
        first = not self._step_penalties
        self._step_penalties.append(penalty.detach())
        output = with_added(output, self.weight * penalty)
        has_targets = trainer.global_step >= self._start and (self._updated is not None or bool(self._saved))
        if first and has_targets and self._is_random_due(trainer):
            extra = self._on_random_tokens(trainer, pl_module)
            if extra is not None:
                # Every micro-batch's loss is divided by their number, and this one alone has the random pass.
                batches = getattr(pl_module, "batches_in_step", lambda: trainer.accumulate_grad_batches)()
                output = with_added(output, self.weight * batches * extra)
        return output

    def _is_random_due(self, trainer: L.Trainer) -> bool:
        return self.random_every is not None and trainer.global_step % self.random_every == 0

    def _take(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The penalty of the pass, the mean over the modules that ran; and their sums of ``s`` and 1, (n, 2).

        It is None where none ran, and 0 where they ran on no token.
        """
        none = torch.zeros(2, device=device)
        watches = self._watches()
        ran = [(w.penalty, w.means) for w in watches if w.penalty is not None and w.means is not None]
        terms = [penalty / means[1] for penalty, means in ran]  # over the calls
        if not terms and any(watch.empty for watch in watches):
            terms = [none[0]]
        sums = torch.stack([none if watch.means is None else watch.means for watch in watches])
        self._begin()
        return torch.stack(terms).mean() if terms else None, sums

    def _on_random_tokens(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor | None:
        model = named_module(pl_module, self.model, "TailPenalty")
        if self._fed is None:
            raise TaperlitError(
                f"TailPenalty.random_every needs {type(model).__name__} {self.model!r} to be called with (B, T) token "
                "ids, first or by name, and it was not; name the module that is with model=, or leave random_every out."
            )
        number = random.Random(f"{self.seed} {trainer.global_step} {data_rank(trainer)[0]}").getrandbits(32)
        shape = (self.random_sequences, min(self.random_length, self._fed.length))
        tokens = torch.randint(self._vocab_size, shape, generator=torch.Generator().manual_seed(number))
        args, kwargs = self._fed.call(tokens)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with evaluating(model), uncounted(), _eager(), torch.random.fork_rng(devices), self._listening():
            model(*args, **kwargs)
        penalty, _ = self._take(pl_module.device)
        if penalty is None:
            raise TaperlitError(
                f"None of TailPenalty's modules ran when {type(model).__name__} {self.model!r} was called with random "
                "token ids alone; leave random_every out."
            )
        self._step_random.append(penalty.detach())
        if not penalty.isfinite():
            rank_zero_warn(
                f"step {trainer.global_step + 1}: the scales on random tokens are not finite; TailPenalty leaves them "
                "out of this step."
            )
            return None
        return penalty

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Penalize in eval mode too."""
        for watch in self._watches():
            watch.always = True
        try:
            yield
        finally:
            for watch in self._watches():
                watch.always = False

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop what checkpointed layers left when they ran again in the backward pass."""
        self._begin()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the targets from this step's batches, over all ranks; log the step's penalties."""
        # LBFGS runs forward several times per step: the first counts.
        if has_gradients(optimizer) and self._updated != trainer.global_step:
            self._updated = trainer.global_step
            none = torch.zeros(len(self._watched), 2, device=trainer.strategy.root_device)
            totals = mean_over_ranks(trainer, torch.stack(self._means).sum(0) if self._means else none)
            batch = torch.stack((totals[:, 0] / totals[:, 1], torch.ones_like(totals[:, 1])), 1)  # over what ran
            ema = self._ema.to(batch.device)
            self._ema = ema.lerp(batch, self.ema_rate).where(batch.isfinite().all(1, keepdim=True), ema)
            if should_log(trainer):  # Lightning's log takes most of a millisecond
                total, count = sum_over_ranks(trainer, self._step_penalties)
                pl_module.log("train/tail_loss", total / count.clamp(min=1e-9))
                if self._is_random_due(trainer):
                    total, count = sum_over_ranks(trainer, self._step_random)
                    pl_module.log("train/tail_loss_random", total / count.clamp(min=1e-9))
        self._forget_batches()

    def state_dict(self) -> dict[str, Any]:
        """The moving averages by module, (2,) each, on the CPU."""
        return {"ema": dict(zip(self._watched, self._ema.cpu().clone().unbind(), strict=False))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the resumed run's targets; a module that it did not watch begins anew."""
        self._saved = dict(state_dict["ema"])


@dataclass
class Watch:
    """What stands at a watched module while it is trained.

    It is reached through the module, and the hook is one function for all: so blocks that are alike go on sharing one
    compiled graph.

    Args:
        target: 0-d; infinite penalizes nothing.
        multiple: of it.
        penalty: the sum over the calls of the pass under way of the mean over tokens, 0-d, or None.
        means: likewise of the mean of ``s``, and of 1, (2,), or None.
        always: penalize outside of training mode too.
        empty: it was called without any token, which counts for nothing else.
    """

    target: Tensor
    multiple: float
    penalty: Tensor | None = None
    means: Tensor | None = None
    always: bool = False
    empty: bool = False

    def clear(self) -> None:
        """Begin a pass."""
        self.penalty = self.means = None
        self.empty = False


def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add a call to a module's :class:`Watch`, where it is trained."""
    watch = getattr(module, "tail_watch", None)  # what folding leaves in a norm's place has its hooks and no watch
    if watch is None or not torch.is_grad_enabled() or not (module.training or watch.always):
        return
    h = first_input(module, args, kwargs)
    if h.numel() == 0:  # an expert that gets no token
        watch.empty = True
        return
    s = token_scale(module, h)
    penalty = (s / watch.target - watch.multiple).relu().square().mean()
    mean = s.detach().mean()
    means = torch.stack((mean, torch.ones_like(mean)))
    watch.penalty = penalty if watch.penalty is None else watch.penalty + penalty
    watch.means = means if watch.means is None else watch.means + means


@dataclass(frozen=True)
class _Fed:
    """How a model is given token ids: first (None) or by name, how many each time, and of what kind."""

    name: str | None
    length: int
    like: tuple[torch.device, torch.dtype]

    def call(self, tokens: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The arguments for other tokens."""
        tokens = tokens.to(*self.like)
        return ((tokens,), {}) if self.name is None else ((), {self.name: tokens})


def _fed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Fed | None:
    for name, value in [*((None, value) for value in args[:1]), *kwargs.items()]:
        if isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32):
            return _Fed(name, value.shape[1], (value.device, value.dtype))
    return None


def _vocab_size_of(model: nn.Module) -> int | None:
    for holder in (model, getattr(model, "config", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int):
            return size
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return tables[0] if len(tables) == 1 else None


def _forgetting(module: nn.Module) -> Callable[[], None]:
    return lambda: module.__dict__.pop("tail_watch", None)


def _eager() -> AbstractContextManager:
    """Another shape and mode would each be a graph more for a pass that is rare; nothing is compiled without dynamo."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
