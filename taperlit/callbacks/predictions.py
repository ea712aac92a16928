"""Write what ``predict`` computes to a file, batch by batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from taperlit.checkpoint.atomic import aside_of_this_process, commit, remove


class PredictionWriter(BasePredictionWriter):
    """Writes a JSON line per block: its mean ``loss`` and the ``logprobs`` of its tokens, in the split's order.

    Each rank writes a file of its own; the file takes its name when it is whole, and then those are removed that an
    earlier call of more ranks left beside it.

    Args:
        path: of the file; None is ``predictions.jsonl`` in the logger's directory. Ranks above 0 append theirs.
        step: optimizer steps that the weights had taken, which each line then has as ``step``.
    """

    def __init__(self, path: str | None = None, step: int | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path, self.step = path, step
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file beside its place."""
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl")
        self._target = path.with_name(path.name + f".{trainer.global_rank}") if trainer.global_rank else path
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(aside_of_this_process(self._target), "w")  # noqa: SIM115 (closed when predict ends)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Tensor,
        *_: Any,
    ) -> None:
        """Append a line per block of the batch; padding is left out."""
        for logprobs, block in zip(prediction.tolist(), batch[:, 1:].tolist(), strict=True):
            counted = [value for value, token in zip(logprobs, block, strict=True) if token != -100]
            if counted and self._file is not None:
                line = {"loss": -sum(counted) / len(counted), "logprobs": counted}
                self._file.write(json.dumps(line if self.step is None else {"step": self.step, **line}) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the whole file its name."""
        assert self._file is not None
        self._file.close()
        commit(Path(self._file.name), self._target)
        if trainer.is_global_zero:
            for other in self._target.parent.iterdir():
                name, _, rank = other.name.rpartition(".")
                if name == self._target.name and rank.isdecimal() and int(rank) >= trainer.world_size:
                    remove(other)
        print(f"wrote {self._target}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no part of a file behind."""
        if self._file is not None:
            self._file.close()
            remove(Path(self._file.name))
