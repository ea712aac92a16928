"""``taperlit bench train``: each phase of the taper against plain norms, ``transformers``, and Lightning's loop."""

import contextlib
import copy
import gc
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from taperlit.bench.models import random_model, tapered
from taperlit.bench.peers import Unavailable, converted
from taperlit.bench.profiling import profiled
from taperlit.bench.results import Row
from taperlit.bench.turns import ratios, seconds, spread, take_turns
from taperlit.cli.slots import ALWAYS, SLOTS
from taperlit.decode.engine import Backend
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, TaperNorm, tapered_norms, update_alignment
from taperlit.training import optimizer as adamw
from taperlit.training.module import LanguageModel
from taperlit.training.policy import Policy
from taperlit.training.trainer import Trainer
from taperlit.transformer import Transformer, TransformerConfig, TransformerOverrides

COLUMNS = {
    "ratio": "against plain",
    "variant": "variant",
    "preset": "preset",
    "batch": "batch",
    "block": "block",
    "dtype": "dtype",
    "backend": "backend",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms/step",
    "mfu": "MFU",
    "peak_gb": "peak GB",
    "peak_ratio": "peak/plain",
    "overhead_percent": "overhead %",
    "skipped": "skipped",
}
PHASES = {"normalize": 1.0, "blend": 0.5, "linear": 0.0}
BATCHES = 4  # different ones, over and over
SETTINGS = adamw.Settings(
    lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, warmup=1, total=10**6, min_lr_ratio=0.1
)  # as in a run; so that the weights hardly move


@dataclass(frozen=True)
class Setting:
    """One cell of the grid.

    Args:
        preset: the model's shape.
        batch: blocks per step.
        block: tokens per block.
        dtype: float32, or what ``torch.autocast`` computes in.
        backend: ``compile`` compiles the blocks, as ``model.compile`` does, and ``transformers``' model as a whole.
        device: where it runs.
        steps: per turn.
        rounds: turns of each variant.
    """

    preset: str
    batch: int
    block: int
    dtype: torch.dtype
    backend: Backend
    device: torch.device
    steps: int
    rounds: int

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.batch * self.block

    def batches(self, vocab_size: int) -> list[Tensor]:
        """(batch, block + 1) random tokens, always the same."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.block + 1)
        return [torch.randint(vocab_size, shape, generator=generator).to(self.device) for _ in range(BATCHES)]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What a run's ``bf16-mixed`` enters around the forward pass."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass
class Stepper:
    """A bare training loop: forward, backward, AdamW, and what the taper itself does between them.

    Args:
        model: in training mode, on its device.
        loss: of a batch.
        setting: see :class:`Setting`.
        batches: see :meth:`Setting.batches`.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]
    setting: Setting
    batches: list[Tensor]
    norms: list[TaperNorm] = field(init=False)
    taken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.norms = list(tapered_norms(self.model).values())
        self.optimizer, _ = adamw.build(self.model, SETTINGS, fused=True)

    def step(self) -> None:
        """One optimizer step."""
        batch = self.batches[self.taken % len(self.batches)]
        with self.setting.autocast():
            loss = self.loss(self.model, batch)
        loss.backward()
        for norm in self.norms:
            for parameter in norm.idle_parameters():
                parameter.grad = None
        if self.norms and self.norms[0].gate.phase is Phase.NORMALIZE:
            update_alignment(self.norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def turn(self) -> float:
        """Seconds per step, over the setting's steps."""

        def steps() -> None:
            for _ in range(self.setting.steps):
                self.step()

        return seconds(steps, self.setting.device) / self.setting.steps

    def resident_bytes(self) -> int:
        """Bytes of weights, buffers and moments, which stay from step to step."""
        tensors = {*self.model.parameters(), *self.model.buffers()}
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*tensors, *state))

    def peak_bytes(self) -> int:
        """The most that one step holds: what stays, and activations, gradients and temporaries above it.

        On the CPU torch's profiler tells of every allocation and release, in order, so that their running sum is exact;
        a process's own peak would hold the other variants too.
        """
        device = self.setting.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.step()
            torch.cuda.synchronize(device)
            return self.resident_bytes() + torch.cuda.max_memory_allocated(device) - before
        results = cast(Any, profiled(self.step, memory=True).profiler).kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return self.resident_bytes() + peak


def our_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Next-token loss of our transformer, as the LightningModule asks for it."""
    return model(batch[:, :-1], batch[:, 1:])


def their_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Next-token loss of ``transformers``' models, by themselves."""
    targets = batch[:, 1:].contiguous()
    return model(batch[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss


def train_rows(
    config: TransformerConfig, setting: Setting, taper: Policy, peers: bool = True, lightning: bool = True
) -> Iterator[Row]:
    """Measure one cell of the grid.

    Args:
        config: of the preset.
        setting: see :class:`Setting`.
        taper: which norms are tapered.
        peers: measure ``transformers`` too.
        lightning: measure our Trainer too.

    Yields:
        A row per variant, ``plain`` first. ``lightning`` is compared in rounds of its own, with bare loops of the plain
        model, for the ratio, and of the normalize phase, for its overhead.

    Raises:
        TaperlitError: ``transformers`` computes another loss.
    """
    torch.compiler.reset()
    batches = setting.batches(config.vocab_size)
    plain = random_model(config)
    steppers = {"plain": _stepper(copy.deepcopy(plain), our_loss, setting, batches)}
    for phase, gate in PHASES.items():
        steppers[phase] = _stepper(tapered(plain, taper, gate), our_loss, setting, batches)
    peak = get_available_flops(setting.device, setting.dtype)  # None where it is not known, as of a CPU
    flops = None if peak is None else LanguageModel(setting.preset).flops_per_token(setting.block) / peak

    def mfu(row: Row) -> Row:
        return {} if flops is None else {"mfu": row["tokens_per_s"] * flops}

    skipped = {}
    if peers:
        try:
            steppers["transformers"] = _stepper(converted(plain), their_loss, setting, batches)
            _require_same_loss(steppers["plain"], steppers["transformers"])
        except Unavailable as reason:
            skipped["transformers"] = str(reason)
    times = take_turns({name: stepper.turn for name, stepper in steppers.items()}, setting.rounds)
    peaks = {name: stepper.peak_bytes() for name, stepper in steppers.items()}
    for name, own in times.items():
        row = _row(name, setting, own, times["plain"])
        yield row | {"peak_gb": peaks[name] / 1e9, "peak_ratio": peaks[name] / peaks["plain"]} | mfu(row)
    for name, why in skipped.items():
        yield {**_row(name, setting, [], []), "skipped": why}
    if lightning:
        bare = {name: steppers[name] for name in ("plain", "normalize")}
        del steppers
        times = _lightning(config, setting, taper, bare)
        row = _row("lightning", setting, times["lightning"], times["plain"])
        pairs = zip(times["lightning"], times["normalize"], strict=True)
        overhead = spread([100 * (ours / bare - 1) for ours, bare in pairs])
        told = {"overhead_percent": overhead.median, "overhead_low": overhead.low, "overhead_high": overhead.high}
        yield row | told | mfu(row)
    gc.collect()


@torch.no_grad()
def _require_same_loss(plain: Stepper, peer: Stepper) -> None:
    """Refuse a peer that does not compute what ours does, from the same weights."""
    batch = plain.batches[0]
    with torch.compiler.set_stance("force_eager"):
        ours, theirs = (float(stepper.loss(stepper.model, batch)) for stepper in (plain, peer))
    if not abs(ours - theirs) < 1e-3 * abs(ours):
        raise TaperlitError(
            f"transformers' loss is {theirs:.5f} and ours {ours:.5f} with the same weights and tokens, so that its "
            "speed says nothing; install a transformers that this version of taperlit was tested with."
        )


def _row(name: str, setting: Setting, own: list[float], first: list[float]) -> Row:
    row: Row = {
        "preset": setting.preset,
        "batch": setting.batch,
        "block": setting.block,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "backend": setting.backend,
        "variant": name,
        "rounds": setting.rounds,
    }
    row |= dict.fromkeys(
        ("tokens_per_s", "ratio", "low", "high", "step_ms", "peak_gb", "peak_ratio", "overhead_percent")
    )
    if own:
        step = spread(own).median
        ratio = ratios([1 / value for value in own], [1 / value for value in first])
        row |= {"tokens_per_s": setting.tokens / step, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        row |= {"step_ms": 1e3 * step}
    return row


def _stepper(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], setting: Setting, batches: list[Tensor]
) -> Stepper:
    model = model.to(setting.device).train()
    if setting.backend == "compile":
        if isinstance(model, Transformer):
            for block in model.blocks:
                block.compile(dynamic=False)
        else:
            model.compile(dynamic=False)
    return Stepper(model, loss, setting, batches)


# ---- Lightning's loop


class _Interleaved(IterableDataset):
    """Batches for a Trainer, and between its turns those of others: their time passes while it waits for its data.

    Args:
        batches: over and over.
        setting: how many turns of how many steps.
        between: runs the others' turn and says how long their steps took.
        wait: for the device.
    """

    def __init__(
        self, batches: list[Tensor], setting: Setting, between: Callable[[], dict[str, float]], wait: Callable[[], None]
    ) -> None:
        self.batches, self.setting, self.between, self.wait = batches, setting, between, wait
        self.times: dict[str, list[float]] = {}

    def __iter__(self) -> Iterator[Tensor]:
        start = None
        for count in range(self.setting.steps * (self.setting.rounds + 2)):  # one turn to warm up, one to end with
            if count % self.setting.steps == 0:
                self.wait()
                own = None if start is None else (time.perf_counter() - start) / self.setting.steps
                others = self.between()
                if own is not None and count > self.setting.steps:
                    for name, value in {"lightning": own, **others}.items():
                        self.times.setdefault(name, []).append(value)
                start = time.perf_counter()
            yield self.batches[count % len(self.batches)]


def _lightning(
    config: TransformerConfig, setting: Setting, taper: Policy, bare: dict[str, Stepper]
) -> dict[str, list[float]]:
    """Seconds per step of a Trainer with the command line's callbacks, and of bare loops in turns with it."""
    overrides = cast(TransformerOverrides, vars(config))
    module = LanguageModel(
        setting.preset, taper=taper, overrides=overrides, lr=SETTINGS.lr, compile=setting.backend == "compile"
    )
    callbacks = [slot.kind(**slot.init_args) for slot in SLOTS.values() if slot.on and taper in slot.tapers]
    callbacks += [always.default() for always in ALWAYS if always.only is None]
    data = _Interleaved(
        [batch.cpu() for batch in bare["plain"].batches],
        setting,
        lambda: {name: stepper.turn() for name, stepper in bare.items()},
        torch.cuda.synchronize if setting.device.type == "cuda" else lambda: None,
    )
    with TemporaryDirectory(prefix="taperlit-bench-") as folder, _quietly():
        trainer = Trainer(
            max_steps=SETTINGS.total,  # of which a bench takes a few: the gate stays at 1
            max_epochs=1,
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=1,
            precision="32-true" if setting.dtype is torch.float32 else "bf16-mixed",
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name="bench"),
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(data, batch_size=None))
    return data.times


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide what a run prints; it is written all the same."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
