"""Write the folded model when a fit ends with the gate at 0."""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from taperlit.callbacks.submodule import named_module
from taperlit.checkpoint.folded import write_folded
from taperlit.errors import TaperlitError
from taperlit.folding import fold, refuse_pointwise, rehearse
from taperlit.hub.lora import merge_lora
from taperlit.norm import Phase, shared_gate
from taperlit.stress.probe import brief_line
from taperlit.structure import Structure
from taperlit.surgery import require_tapered


class FoldOnEnd(L.Callback):
    """Folds a copy of the trained model and writes it when the fit ends, or says in a warning why it does not.

    Whether the model can be folded is tried before the first step, on a copy that is then dropped. At the end the
    checkpoints are written first, and whatever goes wrong with the folding is a warning.

    The model needs an ``example_input_array``, a tensor, a tuple of arguments or a dict of keyword arguments: its
    ``forward`` is run on it, in eval mode, to see what each norm feeds and to check that folding changes no output.

    If weights are averaged, average them with ``use_buffers=False``, which copies the gate: an average of a gate that
    moved is not 0, and is not folded. Weights that a strategy shards are not folded either, and not tried before; fold
    their checkpoint with ``taperlit fold``. Adapters (LoRA) are merged in the copy. Under ``fast_dev_run`` the folding
    is tried and nothing is written.

    Example::

        Trainer(max_steps=1000, callbacks=[GateSchedule(), AlignmentFreeze(), FoldOnEnd("folded", module="model")])

    Args:
        directory: where to; None is ``folded`` in the logger's directory, where a run that goes on replaces its own.
        module: name of the submodule to fold and write; empty is the whole LightningModule.
        tied: what to do with a tied head, see :func:`taperlit.fold`.
        force: replace a directory that exists.
        untouched: glob patterns of the module's parameters that ``forward`` need not use, see :func:`taperlit.fold`.

    Raises:
        TaperlitError: before the first step, if the model has no TaperNorm or no ``example_input_array``, cannot be
            folded, or the directory exists.
    """

    def __init__(
        self,
        directory: str | None = None,
        module: str = "",
        tied: Literal["untie", "scale"] = "untie",
        force: bool = False,
        untouched: Sequence[str] = (),
    ) -> None:
        self.directory, self.module, self.tied, self.force = directory, module, tied, force
        self.untouched = tuple(untouched)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what the end will need, and try the folding, on every process, so that all of them stop."""
        module = named_module(pl_module, self.module, "FoldOnEnd")
        refuse_pointwise(module)
        require_tapered(module, "FoldOnEnd")
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
        if _is_sharded(trainer):
            return
        try:
            self._rehearse(trainer, pl_module)
        except Exception as error:  # of ours, or whatever a stranger's forward raises
            raise TaperlitError(
                f"The model could not be folded at the end: {_line(error)} Leave FoldOnEnd out to train it nonetheless."
            ) from error
        gc.collect()  # the copy refers to itself in circles: its memory is wanted now, and not some time

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fold and write: now, and not when training ends, the weights are averaged and the checkpoints written."""
        if not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:
            rank_zero_info("Not folded: fast_dev_run writes nothing.")
            return
        if _is_sharded(trainer):
            rank_zero_warn("Not folded: the weights are sharded. Run `taperlit fold` on the checkpoint.")
            return
        try:
            self._fold(trainer, pl_module)
        except Exception as error:  # a warning whatever it is: the run is over, and its checkpoint is what counts
            rank_zero_warn(f"Not folded: {_line(error)}{_advice(trainer, pl_module)}")

    def _rehearse(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model, run, _ = self._copy(trainer, pl_module)
        rehearse(model, run, tied=self.tied, untouched=self.untouched)

    def _fold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model, run, stressed = self._copy(trainer, pl_module)
        structure: Structure = fold(model, run, tied=self.tied, untouched=self.untouched)
        tokenizer = getattr(trainer.datamodule, "tokenizer_json", None)
        path = write_folded(self._path, model, structure, tokenizer, self._replace, trainer.global_step)
        count = len(structure["identities"]) + len(structure["scales"])
        rank_zero_info(f"Folded {count} norms into {path}; largest relative difference {structure['difference']:.1e}.")
        line, calm = stressed(tokenizer)
        (rank_zero_info if calm else rank_zero_warn)(line)

    def _copy(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> tuple[nn.Module, Callable[[], object], Callable[[str | None], tuple[str, bool]]]:
        """A copy of the module to fold, what runs ``forward`` of a copy of the LightningModule around it, and what
        tells of that on unusual input (see :func:`taperlit.stress.probe.brief_line`)."""
        # The copy is of the module alone. What belongs to the run stays the run's: references to the trainer from
        # within forward, and hooks, which must not act on copies of the callbacks.
        run_parts = (trainer, trainer.strategy, trainer.datamodule, *trainer.callbacks, *trainer.loggers)
        memo: dict[int, Any] = {id(part): part for part in run_parts if part is not None}
        for module in pl_module.modules():
            for leaf in tree_leaves(dict(vars(module))):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach()  # an activation that forward kept: torch copies no tensor of a graph
        clone = copy.deepcopy(pl_module, memo).eval().to(trainer.strategy.root_device)
        clone.trainer = trainer  # a LightningModule leaves it out of its copies
        for parent in list(clone.modules()):
            for name, child in parent._modules.items():  # torch.compile's wrappers would stand in the written names
                parent._modules[name] = getattr(child, "_orig_mod", child)
        merge_lora(clone)  # as the weights are written
        for name in ("log", "log_dict"):  # Lightning lets no forward log where this runs
            setattr(clone, name, lambda *args, **kwargs: None)
        dtype = cast(torch.dtype, clone.dtype)
        if dtype.itemsize < 4:  # half precision's own rounding would be stored in what is folded
            clone.float()
            dtype = torch.float32
        example = move_data_to_device(pl_module.example_input_array, trainer.strategy.root_device)
        example = tree_map(lambda x: x.to(dtype) if _is_floating(x) else x, example)

        def run() -> object:
            with _default_dtype(dtype):
                if isinstance(example, tuple):
                    return clone(*example)
                return clone(**example) if isinstance(example, dict) else clone(example)

        def stressed(tokenizer: str | None) -> tuple[str, bool]:
            with _default_dtype(dtype):
                return brief_line(clone, example, tokenizer)

        return clone.get_submodule(self.module), run, stressed


def _is_sharded(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def _advice(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    gate = shared_gate(pl_module)
    if gate is None or gate.phase is Phase.LINEAR:
        return " The checkpoint has the trained weights; fold them later with taperlit.fold(model, run)."
    if gate.phase is Phase.BLEND and any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        return " The weights are averages, and the gate with them: average with use_buffers=False, which copies it."
    return ""


def _line(error: Exception) -> str:
    words = " ".join(str(error).split())
    if isinstance(error, TaperlitError):
        return words
    return f"{type(error).__name__}: {words[:200].rstrip('.')}."


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What a forward of 64-bit precision makes by ``torch.zeros`` and the like is of its dtype, as in training."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
