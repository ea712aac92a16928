"""Tokens seen, tokens a second and model FLOPs utilization."""

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from torch import Tensor

from taperlit.distributed import data_rank


class TokenThroughput(L.Callback):
    """Logs ``train/tokens``, ``train/tokens_per_s`` and, where the device's peak is known, ``train/mfu``.

    Batches are (B, T + 1) token blocks. Time in validation does not count. MFU needs the LightningModule to have a
    ``flops_per_token(block_size)``.

    Args:
        window: optimizer steps averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self.tokens = 0
        self._elapsed, self._since = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the device's peak and start the clock."""
        peak = get_available_flops(pl_module.device, _plugin_to_compute_dtype(trainer.precision_plugin))
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
        """Start it again."""
        self._since = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, *_: Any
    ) -> None:
        """Count the batch; log once an optimizer step that Lightning logs."""
        block_size = batch.shape[1] - 1
        self.tokens += batch.shape[0] * block_size * self._replicas
        self._batch_tokens += batch.shape[0] * block_size
        if trainer.fit_loop._should_accumulate():
            return
        if self._measures_flops and self._flops_per_token is None:
            self._flops_per_token = pl_module.flops_per_token(block_size)
        if pl_module.device.type == "cuda" and trainer._logger_connector.should_update_logs:
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
        if trainer._logger_connector.should_update_logs:
            metrics = self._throughput.compute()
            log = {"train/tokens": float(self.tokens)}
            if "device/items_per_sec" in metrics:
                log["train/tokens_per_s"] = metrics["device/items_per_sec"] * self._replicas
            if "device/mfu" in metrics:
                log["train/mfu"] = metrics["device/mfu"]
            pl_module.log_dict(log)

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen so far."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.tokens = state_dict["tokens"]
