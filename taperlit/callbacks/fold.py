"""Write the folded model when a fit ends with the gate at 0."""

import copy
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from taperlit.callbacks.partners import named_module
from taperlit.checkpoint.folded import write_folded
from taperlit.errors import TaperlitError
from taperlit.folding import TOLERANCE, check_gate, fold, largest_difference
from taperlit.surgery import require_tapered


class FoldOnEnd(L.Callback):
    """Folds a copy of the trained model and writes it, or says in a warning why it does not.

    The model needs an ``example_input_array``: the callback runs ``forward`` on it to see what each norm feeds, and to
    check that folding does not change the output.

    Args:
        directory: where to; None is ``folded`` in the logger's directory, where a run that goes on replaces its own.
        module: name of the submodule to write; empty is the whole LightningModule.
        tied: what to do with a tied head, see :func:`taperlit.folding.fold`.
        force: replace a directory that exists.

    Raises:
        TaperlitError: before the first step, if the model has no TaperNorm or no ``example_input_array``, or the
            directory exists.
    """

    def __init__(
        self,
        directory: str | None = None,
        module: str = "",
        tied: Literal["untie", "scale"] = "untie",
        force: bool = False,
    ) -> None:
        self.directory, self.module, self.tied, self.force = directory, module, tied, force

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what the end will need."""
        require_tapered(pl_module, "FoldOnEnd")
        named_module(pl_module, self.module, "FoldOnEnd")
        if pl_module.example_input_array is None:
            raise TaperlitError(
                f"FoldOnEnd runs {type(pl_module).__name__}.forward to see what each norm feeds: "
                "set self.example_input_array in it."
            )
        # Every rank must ask for log_dir: the answer is broadcast.
        self._path = Path(self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "folded")
        self._replace = self.force or self.directory is None
        if self._path.exists() and not self._replace:
            raise TaperlitError(f"{self._path} exists; give FoldOnEnd another directory or force=True.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fold and write."""
        if not trainer.is_global_zero:
            return
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            rank_zero_warn("Not folded: the weights are sharded. Run `taperlit fold` on the checkpoint.")
            return
        try:
            check_gate(pl_module)
            folded, report, difference = self._fold(trainer, pl_module)
        except TaperlitError as error:
            rank_zero_warn(f"Not folded: {error}")
            return
        path = write_folded(
            self._path,
            folded,
            [str(norm) for norm in report],
            getattr(trainer.datamodule, "tokenizer_json", None),
            self._replace,
        )
        rank_zero_info(f"Folded {len(report)} norms into {path}; largest relative difference {difference:.1e}.")

    @torch.no_grad()
    def _fold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[nn.Module, list, float]:
        # A copy of the module alone: hooks and back-references keep pointing at the callbacks, not at copies of them.
        memo = {id(trainer): None, **{id(callback): callback for callback in trainer.callbacks}}
        clone = copy.deepcopy(pl_module, memo).eval()
        if clone.dtype.itemsize < 4:  # half precision's own rounding would hide what folding changes
            clone.float()
        example = trainer.strategy.batch_to_device(pl_module.example_input_array)

        def run() -> torch.Tensor:
            if isinstance(example, tuple):
                return clone(*example)
            return clone(**example) if isinstance(example, dict) else clone(example)

        before = run()
        report = fold(clone, run, tied=self.tied)
        difference = largest_difference(before, run())
        if not difference <= TOLERANCE:
            raise TaperlitError(f"folding changes the output by {difference:.1e}, more than {TOLERANCE:.0e}.")
        return clone.get_submodule(self.module), report, difference
