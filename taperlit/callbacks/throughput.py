"""Tokens seen, tokens per second and model FLOPs utilization."""

import time
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from torch import Tensor

from taperlit.distributed import data_rank
from taperlit.errors import TaperlitError
from taperlit.ranges import require_range
from taperlit.training.lightning_compat import compute_dtype, should_accumulate, should_log


class TokenThroughput(L.Callback):
    """Logs ``train/tokens``, ``train/tokens_per_s`` and, where the device's peak is known, ``train/mfu``.

    Batches are (B, T + 1) token blocks, as those of ``TextDataModule``. Time in validation does not count. MFU needs
    the LightningModule to have a ``flops_per_token(block_size)``.

    Args:
        window: optimizer steps averaged over.

    Raises:
        TaperlitError: a window of less than 2 steps; before the first step, if its batch is no token block.
    """

    def __init__(self, window: int = 20) -> None:
        require_range("TokenThroughput.window", window, least=2)  # the rate is of a difference
        self.window = window
        self.tokens = 0
        self._elapsed, self._since = 0.0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count from 0, unless a checkpoint restores the count after this."""
        if stage == "fit":
            self.tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the device's peak and start the clock."""
        peak = get_available_flops(pl_module.device, compute_dtype(trainer.precision_plugin))
        self._throughput = Throughput(peak, window_size=self.window)
        self._replicas = data_rank(trainer)[1]
        self._share = self._replicas / trainer.world_size  # of a batch's work that is this device's
        self._flops_per_token: float | None = None
        self._measures_flops = peak is not None and hasattr(pl_module, "flops_per_token")
        self._elapsed, self._steps, self._session_tokens, self._batch_tokens = 0.0, 0, 0, 0
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._count_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check that tokens can be counted."""
        if not isinstance(batch, Tensor) or batch.dim() != 2:
            raise TaperlitError(
                f"TokenThroughput counts (B, T + 1) token blocks, not a {type(batch).__name__}; leave it out."
            )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, *_: Any
    ) -> None:
        """Count the batch; log once per optimizer step that Lightning logs."""
        block_size = batch.shape[1] - 1
        self.tokens += batch.shape[0] * block_size * self._replicas
        self._batch_tokens += batch.shape[0] * block_size
        if should_accumulate(trainer):
            return
        if self._measures_flops and self._flops_per_token is None:
            self._flops_per_token = cast(Any, pl_module).flops_per_token(block_size)
        if pl_module.device.type == "cuda" and should_log(trainer):
            torch.cuda.synchronize()
        self._count_time()
        self._steps += 1
        self._session_tokens += self._batch_tokens
        flops = None if self._flops_per_token is None else self._flops_per_token * self._batch_tokens * self._share
        self._throughput.update(
            time=self._elapsed,
            batches=self._steps,
            samples=self._steps,
            lengths=self._session_tokens,
            flops=None if flops is None else int(flops),
        )
        self._batch_tokens = 0
        if should_log(trainer):
            metrics = self._throughput.compute()
            log = {"train/tokens": float(self.tokens)}
            if "device/items_per_sec" in metrics:
                log["train/tokens_per_s"] = metrics["device/items_per_sec"] * self._replicas
            if "device/mfu" in metrics:
                log["train/mfu"] = metrics["device/mfu"]
            pl_module.log_dict(log)

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens seen so far."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the resumed run's count of tokens."""
        self.tokens = state_dict["tokens"]
