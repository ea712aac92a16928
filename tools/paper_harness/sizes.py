"""The sizes: a model's shape, its batch and learning rate, and how long the experiments train it.

``nano``'s learning rate is by the baseline's validation loss at 2 tokens per parameter on ``gcide``, seed 0: 5.066 at
1e-3, 4.614 at 2e-3, 4.404 at 4e-3, 4.339 at 8e-3, 4.866 at 16e-3. Of the two that are close it is the lower, since it
serves runs of 20 times that length too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from paper_harness.ideas import IDEAS
from taperlit.transformer import Transformer, TransformerConfig

# With the paper's own as the first shape, beside which all of them stand.
OTHERS = {"shape": ("cosine", "linear"), "ema_rate": (0.001, 0.1, 1.0), "weight": (0.0, 0.01, 1.0, 10.0)}


@dataclass(frozen=True)
class Size:
    """One size of model and the runs that it is for.

    Args:
        shape: fields of ``TransformerConfig``.
        batch_size: blocks per step.
        lr: peak learning rate of every variant, unless an option says otherwise.
        decay_start: share of the run after which it falls; 0 is the warm-up's end, as in the first stored runs.
        precision: as Lightning names it.
        val_tokens: held-out tokens of every validation, rounded to whole batches.
        seeds: of ``pretrain`` and ``length``.
        tokens_per_parameter: of ``pretrain``.
        lengths: of ``length``, in tokens per parameter.
        schedule_tokens: of ``schedule``, in tokens per parameter.
        warmups: of the gate, as shares of the run, in the map of ``schedule``.
        ends: of the gate, likewise.
        lrs: learning rates of the map, as multiples of ``lr``.
        ideas: of ``ideas``, where none are named.
        draws: of ``short``.
        draw_corpora: that they are of.
        draw_steps: least and most optimizer steps of one.
        plain: size with the same sizes as the paper has them, or None; it stands beside this one in ``ours``.
        others: what ``schedule`` changes one at a time, by its name in ``runs.PAPER``.
    """

    shape: dict[str, Any]
    batch_size: int
    lr: float
    decay_start: float = 0.0
    precision: str = "32-true"
    val_tokens: int = 1 << 16
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens_per_parameter: float = 10.0
    lengths: tuple[float, ...] = (0.5, 2.0, 5.0, 10.0, 20.0, 40.0)
    schedule_tokens: float = 2.0
    warmups: tuple[float, ...] = (0.02, 0.05, 0.2, 0.4)
    ends: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    lrs: tuple[float, ...] = (1.0, 4.0)
    ideas: tuple[str, ...] = tuple(IDEAS)
    draws: int = 20
    draw_corpora: tuple[str, ...] = ("gcide", "foldoc", "embedded")
    draw_steps: tuple[int, int] = (100, 2000)
    plain: str | None = None
    others: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: OTHERS)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the plain model, a tied matrix counted once: those of every variant when its norms are gone,
        and what all of them have their tokens by."""
        with torch.device("meta"):
            model = Transformer(TransformerConfig(**self.shape))
        return sum(parameter.numel() for parameter in model.parameters())

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted per optimizer step."""
        return self.batch_size * self.shape["block_size"]

    @property
    def val_batches(self) -> int:
        """Batches of every validation."""
        return max(1, round(self.val_tokens / self.tokens_per_step))

    def length(self, tokens_per_parameter: float) -> tuple[int, int]:
        """Optimizer steps of a run, and from one validation to the next: 12 validations, or one for 40 steps of a
        short run. The last step has one."""
        wanted = tokens_per_parameter * self.parameters / self.tokens_per_step
        points = min(12, max(1, int(wanted / 40)))
        every = max(1, round(wanted / points))
        return points * every, every


# Every field, so that no default of the package decides what a stored run was.
_LLAMA = {
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "position": "rope",
    "rope_theta": 10000.0,
    "mlp": "swiglu",
    "bias": False,
    "tied": True,
}


# Where these are not told they are "gpt2" and False, as they were for the first stored runs, before there was a choice.
_UNIT = {"init": "fan_in", "embed_norm": True}


def _shape(
    vocab_size: int, block_size: int, n_layer: int, n_head: int, d_model: int, d_ff: int, **more: Any
) -> dict[str, Any]:
    sizes = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, d_model=d_model, d_ff=d_ff)
    return {**sizes, "n_head": n_head, "n_kv_head": n_head, **_LLAMA, **more}


# The paper's: batch, learning rate and 7000 steps as in configs/tinystories_*.yaml.
_PAPER = {"batch_size": 128, "precision": "bf16-mixed", "val_tokens": 1 << 20}

SIZES = {
    "toy": Size(
        _shape(512, 64, 2, 2, 16, 32), 4, 4e-3,
        val_tokens=1 << 10, seeds=(0, 1), tokens_per_parameter=0.5, lengths=(0.25, 0.5, 1.0), schedule_tokens=0.25,
        warmups=(0.1,), ends=(0.5, 1.0), ideas=("end_80",), draws=2, draw_corpora=("embedded",), draw_steps=(20, 40),
        others={"shape": ("cosine", "linear"), "ema_rate": (0.1,), "weight": (0.0,)},
    ),
    "nano": Size(_shape(1024, 256, 6, 4, 48, 128), 8, 4e-3),
    "nano_unit": Size(_shape(1024, 256, 6, 4, 48, 128, **_UNIT), 8, 8e-3, 0.5, plain="nano"),
    "micro_unit": Size(_shape(1024, 256, 6, 4, 64, 176, **_UNIT), 8, 8e-3, 0.5),
    "small_1m": Size(_shape(10000, 512, 8, 4, 64, 192), lr=4e-3, tokens_per_parameter=430.0, **_PAPER),
    "small_3m": Size(_shape(10000, 512, 8, 4, 128, 384), lr=3e-3, tokens_per_parameter=154.0, **_PAPER),
    "small_9m": Size(_shape(10000, 512, 8, 4, 256, 640), lr=2e-3, tokens_per_parameter=53.0, **_PAPER),
    "small_30m": Size(_shape(10000, 512, 8, 8, 512, 1344), lr=1e-3, tokens_per_parameter=15.0, **_PAPER),
}  # fmt: skip
