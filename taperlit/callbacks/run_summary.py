"""What a run is, in a few lines before its first step, and what came of it after its last."""

import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from taperlit.norm import Phase, plain_name, shared_gate, tapered_norms


class RunSummary(ModelSummary):
    """Tells model, norms, data, devices and folder of a fit, and at its end the losses and what to do next.

    It stands in the place of Lightning's ModelSummary, a table of the LightningModule's parts, most of which are
    metrics.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=0)
        self._folder: str | None = None
        self._validated = 0  # at which step
        self._began = 0.0  # the time, by which a folded model of an earlier fit is told from this one's

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell what begins, or goes on."""
        self._folder = trainer.log_dir  # every process must ask: the answer is broadcast
        self._began = time.time()
        lines = {
            "model": _model(pl_module),
            "norms": _norms(pl_module),
            "data": getattr(trainer.datamodule, "in_words", None),
            "devices": _devices(trainer),
            "val": _never(trainer),
            "logs": self._folder or "none",
        }
        rank_zero_info("\n".join(f"{name:<8} {words}" for name, words in lines.items() if words))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know which step's the validation loss is."""
        self._validated = trainer.global_step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """After a fit that came to its end: tell the losses and the next command."""
        if stage != "fit" or trainer.interrupted:
            return
        metrics = {name: f"{float(trainer.callback_metrics[name]):.4f}" for name in _told(trainer)}
        if "val/loss" in metrics and self._validated != trainer.global_step:
            metrics["val/loss"] += f" (step {self._validated:,})"
        lines = {"steps": f"{trainer.global_step:,}", **metrics, "next": self._next(trainer, pl_module)}
        rank_zero_info("\n".join(f"{name:<10} {words}" for name, words in lines.items() if words))

    def _next(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
        """The command that goes on from what the fit left; None where it left nothing."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return None
        saving = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        checkpoint = "" if saving is None else saving.last_model_path or saving.best_model_path
        folded = Path(self._folder or "") / "folded"
        if self._folder is not None and folded.is_dir() and folded.stat().st_mtime >= self._began - 1:
            return f"taperlit generate --model {shlex.quote(str(folded))} --prompt 'Once'"
        if not checkpoint:
            return None
        gate = shared_gate(pl_module)
        if gate is not None and gate.phase is Phase.LINEAR:
            return f"taperlit fold --ckpt {shlex.quote(checkpoint)}"
        return f"taperlit generate --model {shlex.quote(checkpoint)} --prompt 'Once'"


def _model(pl_module: L.LightningModule) -> str:
    options: Any = pl_module.hparams
    name = options.get("preset") or options.get("pretrained") or type(pl_module).__name__
    total = sum(p.numel() for p in pl_module.parameters())
    trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    changed = " with overrides" if options.get("overrides") else ""
    some = f", {trained:,} of them trained" if trained < total else ""
    return f"{name}{changed}: {total:,} parameters{some}"


def _norms(pl_module: L.LightningModule) -> str:
    policy = pl_module.hparams.get("taper")
    names = [plain_name(name) for name in tapered_norms(pl_module)]
    if not names:
        return "none is tapered" if policy in (None, "none") else f"{policy} in their place"
    groups = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    which = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())
    return f"{len(names)} tapered: {which}"


def _devices(trainer: L.Trainer) -> str:
    how = "" if trainer.world_size == 1 else f" by {type(trainer.strategy).__name__.removesuffix('Strategy')}"
    return f"{trainer.world_size} x {trainer.strategy.root_device.type}{how}, {trainer.precision}"


def _never(trainer: L.Trainer) -> str | None:
    """A word where a run will not validate, as after a division of its batches among devices."""
    every, batches = trainer.val_check_interval, trainer.max_steps * trainer.accumulate_grad_batches
    wanted = trainer.check_val_every_n_epoch is None and trainer.limit_val_batches
    if not wanted or not isinstance(every, int) or not 0 < batches < every:
        return None
    return f"never: trainer.val_check_interval is {every:,}, and the run has {batches:,} batches; lower it"


def _told(trainer: L.Trainer) -> list[str]:
    return [name for name in ("train/loss", "val/loss") if name in trainer.callback_metrics]
