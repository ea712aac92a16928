"""The small files that are damaged: a corpus, a token cache, a run with its checkpoint, and what it was folded into."""

import json
from dataclasses import dataclass
from pathlib import Path

from torture_harness.runner import Call, Runner

ROOT = Path(__file__).resolve().parents[2]
RUN = "runs/run/version_0"
OVERRIDES = "{vocab_size: 300, block_size: 32, n_layer: 2, n_head: 2, d_model: 16, d_ff: 32}"


@dataclass(frozen=True)
class Specimens:
    """Where they are: all in one folder, which commands run in or in a copy of.

    Args:
        folder: that holds them.
    """

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Of the run, tapered to its end."""
        return self.folder / RUN / "checkpoints/last.ckpt"

    @property
    def folded(self) -> Path:
        """What the run was folded into."""
        return self.folder / "folded"

    @property
    def sharded(self) -> Path:
        """The same checkpoint in shards."""
        return self.folder / "shards.ckpt"

    @property
    def cache(self) -> Path:
        """The token caches."""
        return self.folder / "cache"

    @property
    def environment(self) -> dict[str, str]:
        """Of a command that is to find the token cache."""
        return {"TAPERLIT_CACHE": str(self.cache)}


def fit_args(steps: int, *extra: str, saves: str = "runs") -> list[str]:
    """A run of a tiny model, tapered in its first 8 steps, or 2 of fewer. Its paths are relative to the specimens."""
    warmup, end = (3, 8) if steps >= 8 else (1, 2)
    return [
        "fit", "--config", str(ROOT / "configs/pile_350m.yaml"), "--data.files", "corpus/*.txt",
        "--model.overrides", OVERRIDES,
        "--model.compile=false", "--data.tokenizer=null", "--data.vocab_size=300", "--data.block_size=32",
        "--data.batch_size=4", "--data.val_fraction=0.2", "--data.num_workers=0", f"--trainer.max_steps={steps}",
        "--trainer.accumulate_grad_batches=1", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.val_check_interval=5", "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=4", "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false", f"--taper.gate.warmup={warmup}", f"--taper.gate.end={end}",
        f"--trainer.logger.save_dir={saves}", "--trainer.logger.name=run", *extra,
    ]  # fmt: skip


def write_corpus(folder: Path) -> None:
    """Text of a few thousand tokens."""
    folder.mkdir(parents=True)
    for i in range(24):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + {i * j % 17}\n" for j in range(12)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))


def make(folder: Path, runner: Runner) -> Specimens:
    """Make all specimens.

    Raises:
        RuntimeError: a command failed that must not.
    """
    made = Specimens(folder)
    write_corpus(folder / "corpus")
    (folder / "work").mkdir()
    environment = made.environment
    for call in (
        Call(fit_args(10), folder, environment=environment),
        Call(["fold", "--ckpt", f"{RUN}/checkpoints/last.ckpt", "--out", "folded"], folder),
        Call([str(made.checkpoint), str(made.sharded)], folder, function="torture_harness.shards:main"),
    ):
        ended = runner.run(call)
        if ended.status:
            raise RuntimeError(f"{' '.join(call.args)}: {ended.stderr[-3000:]}")
    (folder / "results.json").write_text(json.dumps({"loss": 1.0}))
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    return made
