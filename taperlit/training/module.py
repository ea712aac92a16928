"""The LightningModule: next-token loss, optimizer, learning rate, and what is logged."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from taperlit import __version__
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.distributed import gradient_norms, keep_buffers_float32, local, mean_over_ranks, parallelize
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.lora import Lora
from taperlit.norm import plain_name
from taperlit.ranges import require_range, require_steps
from taperlit.schedule import resolve_steps
from taperlit.training import optimizer as adamw
from taperlit.training.lightning_compat import should_accumulate, should_log
from taperlit.training.policy import Policy, apply_policy, check_policy
from taperlit.training.source import Pretrained, source_of
from taperlit.transformer import Transformer, TransformerOverrides

# What a metric does with a NaN: keep it. torchmetrics' own default drops it, and its "disable" drops the weights.
NAN = float("nan")


class TokenMean(MeanMetric):
    """Token-weighted mean, summed in float64; in float32 where the device has no other."""

    def __init__(self) -> None:
        super().__init__(NAN)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        super()._apply(fn, exclude_state)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        if self.dtype != wide:  # of the device's move, or bfloat16: Lightning casts all of a module
            self.set_dtype(wide)
        return self


class Perplexity(TokenMean):
    """Exponential of the token-weighted mean loss."""

    def compute(self) -> Tensor:
        """The perplexity over all tokens of all ranks."""
        return super().compute().exp()


class LanguageModel(L.LightningModule):
    """A transformer trained to predict the next token: one of ours from the start, or a pretrained one.

    Batches are (B, T + 1) int64 token blocks; a token of -100 is not predicted (padding of a last, ragged batch).

    Args:
        preset: name of a model shape, see ``taperlit.transformer.PRESETS``.
        taper: which norms are tapered, or what replaces them, see :func:`taperlit.training.policy.apply_policy`.
        overrides: fields of the preset to change.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW; norms, biases and embeddings get none, but DyT's and Derf's parameters do.
        warmup: linear warm-up, in steps (int) or as a fraction of ``trainer.max_steps`` (float).
        min_lr_ratio: the cosine ends at this fraction of ``lr``.
        decay_start: where the cosine begins, in steps (int) or as a fraction of ``trainer.max_steps`` (float); 0 is the
            warm-up's end. With ``0.5`` the learning rate stays at its peak for the first half of the run.
        chunk_tokens: tokens whose logits are held at once.
        compile: compile each block with ``torch.compile`` for training. Evaluation stays eager: its other shapes and
            modes would each add a graph, where a run needs one per phase of the gate.
        activation_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        pretrained: instead of a preset, a ``transformers`` language model: a name on the hub, a folder, or a ``.gguf``
            file. Its dropout is off.
        lora: train adapters (and the norms) in place of a pretrained model's weights.
        remote_code: run the code that a pretrained model brings along.
        taper_bias: give the linear branch of tapered norms a trained bias where the norm has none, as RMSNorms; folded,
            the maps that they feed have biases.

    A resumed run takes ``lr``, ``betas``, ``weight_decay``, ``warmup``, ``min_lr_ratio`` and ``decay_start`` as
    they are given then.

    Raises:
        TaperlitError: no such preset, policy or override, a pretrained model that cannot be read, or a value out of its
            range.
    """

    def __init__(
        self,
        preset: str | None = None,
        taper: Policy = "none",
        overrides: TransformerOverrides | None = None,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup: int | float = 0.05,
        min_lr_ratio: float = 0.1,
        chunk_tokens: int = 4096,
        compile: bool = False,
        activation_checkpointing: bool = False,
        pretrained: str | None = None,
        lora: Lora | None = None,
        remote_code: bool = False,
        taper_bias: bool = False,
        decay_start: int | float = 0,
    ) -> None:
        super().__init__()
        require_range("model.chunk_tokens", chunk_tokens, least=1)
        require_range("model.lr", lr, above=0)
        for i, beta in enumerate(betas):
            require_range(f"model.betas[{i}]", beta, least=0, below=1)
        require_range("model.weight_decay", weight_decay, least=0)
        require_steps("model.warmup", warmup)
        require_range("model.min_lr_ratio", min_lr_ratio, least=0, most=1)
        require_steps("model.decay_start", decay_start)
        self.save_hyperparameters()
        self.hparams.lora = None if lora is None else asdict(lora)  # a checkpoint holds plain data alone
        check_policy(taper)
        self.source = source_of(self.hparams)
        self.vocab_size, self.block_size = self.source.sizes
        self.model: Transformer | CausalLM = None  # type: ignore[assignment]  # until configure_model
        self._restored = False
        self._losses: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self.val_loss, self.val_perplexity = TokenMean(), Perplexity()
        self.test_loss, self.test_perplexity = TokenMean(), Perplexity()
        # Different tokens: a mixture of experts should send them to all of its experts.
        self.example_input_array = torch.arange(min(64, self.block_size, self.vocab_size))[None]

    def configure_model(self) -> None:
        """Build the transformer or read it, taper it, and split it as the strategy asks.

        Every process builds it whole first, from the same seed: split or not, a run starts from the same values.
        """
        if self.model is not None:
            return
        self.model = self.source.load().train()
        left = apply_policy(self.model, self.hparams.taper, self.hparams.taper_bias)
        for name, readers in left.items():
            rank_zero_info(f"{name} stays a norm in every block: {', '.join(readers)} read what it gives.")
        self.model.activation_checkpointing = self.hparams.activation_checkpointing
        if self.hparams.compile:
            for block in self.model.blocks:  # alike, so they share one graph per phase
                block.compile(dynamic=False)
        if self.device_mesh is not None:  # ModelParallelStrategy's
            parallelize(self.model, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Check that data and model belong together, and begin the metrics.

        Raises:
            TaperlitError: the tokenizer's ids or the blocks are larger than the model's.
        """
        keep_buffers_float32(self.trainer)
        for metric in (self.val_loss, self.val_perplexity, self.test_loss, self.test_perplexity):
            metric.reset()  # "ddp_spawn" hands every process the same memory for their sums, and they add in place
        data = self.trainer.datamodule
        vocab_size, block_size = getattr(data, "vocab_size", 0), getattr(data, "block_size", 0)
        if isinstance(self.source, Pretrained):
            self._check_own_tokenizer(self.source, getattr(data, "tokenizer_json", None))
            largest = vocab_size - 1
            if largest >= self.vocab_size:  # as of a token for padding that was added later, and that no text has
                largest = getattr(data, "largest_token", largest)
            if largest >= self.vocab_size:
                raise TaperlitError(
                    f"The data has the token id {largest}, and the weights of {self.source.name} are for the ids up to "
                    f"{self.vocab_size - 1}; leave the text with that token out of the data, or use another model."
                )
        elif vocab_size > self.vocab_size:
            mend = f"model.overrides.vocab_size to {vocab_size}"
            if stage != "fit":  # a checkpoint's model, which is as it is
                mend = "data.tokenizer to the tokenizer.json beside the checkpoint's run"
            raise TaperlitError(
                f"The tokenizer's ids go up to {vocab_size - 1} and the model's to {self.vocab_size - 1}; set {mend}."
            )
        if block_size > self.block_size:
            mend = f"set model.overrides.block_size to {block_size}"
            if stage != "fit" or isinstance(self.source, Pretrained):
                mend = f"lower data.block_size to {self.block_size}"
            raise TaperlitError(
                f"data.block_size {block_size} is more than the model's context {self.block_size}; {mend}."
            )

    def _check_own_tokenizer(self, source: Pretrained, tokenizer_json: str | None) -> None:
        """Refuse tokens that mean something else to a pretrained model."""
        own = source.tokenizer_json()
        if tokenizer_json is None or own is None:
            return
        if Tokenizer.from_str(own).get_vocab() != Tokenizer.from_str(tokenizer_json).get_vocab():
            raise TaperlitError(
                f"data.tokenizer is not the tokenizer of {source.name}, which the model was trained with; set "
                f"data.tokenizer to {source.name}."
            )

    def _eager(self) -> AbstractContextManager:
        return torch.compiler.set_stance("force_eager") if self.hparams.compile else nullcontext()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, vocab_size) logits."""
        with self._eager():
            return self.model(tokens)

    def loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean next-token cross-entropy of (B, T + 1) blocks, and how many targets it is over."""
        targets = batch[:, 1:]
        loss = self.model(batch[:, :-1].clamp(min=0), targets, chunk_tokens=self.hparams.chunk_tokens)
        return loss, (targets != -100).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss, _ = self.loss(batch)
        self._losses.append(loss.detach())
        return loss

    def on_after_backward(self) -> None:
        """Let the gradient of a step be the mean over its batches where these are fewer than the others' are.

        The last step of an epoch has what is left of it, and the first one after a checkpoint from between two batches
        what was to come; Lightning divides each batch's by ``accumulate_grad_batches`` all the same.
        """
        batches = self.trainer.accumulate_grad_batches
        if len(self._losses) < batches and not should_accumulate(self.trainer):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(batches / len(self._losses))

    def batches_in_step(self) -> int:
        """Over how many batches the gradient of the step under way is the mean; asked after the loss of one of them."""
        wanted, done = self.trainer.accumulate_grad_batches, self.trainer.fit_loop.batch_idx
        left = min(wanted - done % wanted, self.trainer.num_training_batches - done)  # with the batch under way
        return len(self._losses) - 1 + int(left)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Add one batch to val/loss and val/perplexity; returns its (B, T) token losses."""
        return self._evaluate(batch, "val", self.val_loss, self.val_perplexity)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Add one batch to test/loss and test/perplexity; returns its (B, T) token losses."""
        return self._evaluate(batch, "test", self.test_loss, self.test_perplexity)

    def _evaluate(self, batch: Tensor, split: str, *metrics: TokenMean) -> Tensor:
        """Add a batch's loss to metrics; returns its (B, T) token losses, which callbacks get."""
        targets = batch[:, 1:]
        with self._eager():
            losses = self.model(
                batch[:, :-1].clamp(min=0), targets, chunk_tokens=self.hparams.chunk_tokens, reduction="none"
            )
        weight = (targets != -100).sum()
        loss = losses.sum() / weight.clamp(min=1)
        for name, metric in zip(("loss", "perplexity"), metrics, strict=True):
            metric.update(loss, weight)
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "loss")
        return losses

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """(B, T) float32 log-probabilities of each block's tokens, given those before them; 0 where none counts."""
        logits = self(batch[:, :-1].clamp(min=0)).float()
        targets = batch[:, 1:]
        return -nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's loss (over its micro-batches and all ranks), the gradient norm before clipping, and the LR."""
        loss = mean_over_ranks(self.trainer, torch.stack(self._losses).mean())
        self._losses.clear()
        self.log("train/loss", loss, prog_bar=True)
        if should_log(self.trainer):
            self.log("train/grad_norm", self._gradient_norm(_gradients(optimizer)))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        return gradient_norms(self.trainer, {"all": gradients})["all"]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients, also where Lightning cannot (FSDP, and FSDP2 with tensor parallelism)."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = _gradients(optimizer)
        scale = (gradient_clip_val / (self._gradient_norm(gradients) + 1e-6)).clamp(max=1.0)
        if gradients:
            torch._foreach_mul_([local(gradient) for gradient in gradients], scale)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say who wrote it, and give the optimizer's states by the parameters' names.

        Lightning numbers them, and not always alike: by the optimizer's groups, or with sharded strategies by the
        model's order. Read by another strategy, moments would go to the wrong parameters. Every strategy reads names.
        """
        checkpoint["taperlit"] = {"format": CHECKPOINT_FORMAT, "version": __version__}
        if isinstance(self.source, Pretrained):
            checkpoint["taperlit"]["origin"] = asdict(self.source.origin)
        names = {parameter: plain_name(name) for name, parameter in self.named_parameters()}
        for state, optimizer in zip(checkpoint.get("optimizer_states", ()), self.trainer.optimizers, strict=False):
            if not all(isinstance(key, int) for key in state.get("state", ("",))):
                continue  # they are names already, or another rank's business
            order = [p for group in optimizer.param_groups for p in group["params"]]
            if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
                order = list(names)
            name = [names[parameter] for parameter in order]
            state["state"] = {name[i]: value for i, value in state["state"].items()}
            state["param_groups"] = [{**g, "params": [name[i] for i in g["params"]]} for g in state["param_groups"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (fused where torch can) with linear warm-up, then cosine, over ``trainer.max_steps``.

        Raises:
            TaperlitError: ``trainer.max_steps`` is not set.
        """
        # A fused step unscales by itself, which Lightning cannot clip; only float16 has a scale.
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        optimizer, schedule = adamw.build(self, self._settings(), fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _settings(self) -> adamw.Settings:
        # Not estimated_stepping_batches: reading it here makes Lightning forget the data's position on resume.
        total = self.trainer.max_steps
        if total < 1:
            raise TaperlitError("Set trainer.max_steps: the learning rate's cosine ends there.")
        warmup = resolve_steps(self.hparams.warmup, total, "model.warmup")
        start = resolve_steps(self.hparams.decay_start, total, "model.decay_start")
        h = self.hparams
        return adamw.Settings(h.lr, tuple(h.betas), h.weight_decay, warmup, total, h.min_lr_ratio, start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note that the optimizer will be a checkpoint's, and refuse one of a model with other parameters.

        Raises:
            TaperlitError: the run that wrote it had another ``taper_bias``.
        """
        began = checkpoint.get("hyper_parameters", {}).get("taper_bias", False)
        if began != self.hparams.taper_bias:
            raise TaperlitError(
                f"model.taper_bias is {self.hparams.taper_bias} and the checkpoint's run began with {began}, which "
                f"cannot change under way; set model.taper_bias to {began}, or begin anew."
            )
        self._restored = True

    def on_train_start(self) -> None:
        """Drop what a tuner's steps left; let a resumed run go on with the rates it was given, not the checkpoint's."""
        self._losses.clear()
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if self._restored and isinstance(schedules[0], LambdaLR):  # not while a tuner tries another
            adamw.apply_settings(self.trainer.optimizers[0], schedules[0], self._settings())

    def flops_per_token(self, block_size: int) -> float:
        """Model FLOPs of training on one token in a block of this length (forward and backward, no recomputation)."""
        with torch.device("meta"):
            model = self.source.build()
            tokens = torch.zeros(1, block_size, dtype=torch.int64)
            return measure_flops(model, lambda: model(tokens), torch.sum) / block_size


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those that the optimizer is about to use; it has them at hand, where a module would be searched for them."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
