"""Report what the mean loss hides: the worst tokens, the quantiles, and where in a block the loss is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tokenizers import Tokenizer
from torch import Tensor, nn

from taperlit.callbacks.submodule import first_input
from taperlit.callbacks.token_scale import token_scale
from taperlit.checkpoint import folded
from taperlit.distributed import data_rank, gather
from taperlit.errors import TaperlitError
from taperlit.metrics import TokenLossTails
from taperlit.norm import TaperNorm, plain_name
from taperlit.ranges import require_range

PER_LINE = 4  # norms


class LossTails(L.Callback):
    """Logs the tails of the token losses in ``validate`` and ``test``, and prints them there as a short table.

    ``val/loss_max``, ``val/loss_p999``, ``val/loss_median``, ``val/loss_nonfinite`` and, per range of positions in the
    blocks, ``val/loss_at/0``, ``val/loss_at/1``, ``val/loss_at/2-3``, ...; in ``test`` the same under ``test/``.
    Norm-free models can be as good as others on average and explode on a few tokens. With a reference also
    ``val/share_risen`` and ``val/tokens_risen``, the tokens that lost more than ``threshold`` nats to it,
    ``val/rise_mean``, ``val/rise_max`` and ``val/reference_nonfinite``. They are defined in
    :class:`taperlit.metrics.TokenLossTails`. Where the model has norms, tapered or not, or what folding left in their
    place, also ``val/scale_max``: of the ratios of the largest scale (root mean square, or standard deviation for the
    LayerNorm kind) to the mean one over all tokens at a norm's input, the largest; the table has each norm's. Padding
    (-100) does not count, and several processes give the figures of one. Losses that are not finite are in every
    figure, counted, and told in a warning.

    The LightningModule's ``validation_step`` (``test_step``) returns the (B, T) losses of a batch's tokens, and its
    batches are (B, T + 1) token blocks, as those of ``LanguageModel``.

    The reference is read once per run, computed in float32 and never saved.

    Example::

        Trainer(callbacks=[LossTails(reference="runs/baseline/version_0/folded")]).validate(model, datamodule)

    Args:
        reference: a model to compare with, token by token: a checkpoint, a folded directory, or a pretrained model's
            name, folder or ``.gguf`` file. It must have the tokenizer of the data. None compares with nothing.
        threshold: nats by which a token's loss must rise above the reference's to count as risen.
        during_fit: log in a fit's validations too, without the table.

    Raises:
        TaperlitError: a threshold below 0; before the first batch, if the reference cannot be read or has another
            vocabulary; in the first batch, if the LightningModule returns no token losses.
    """

    def __init__(self, reference: str | None = None, threshold: float = 5.0, during_fit: bool = False) -> None:
        require_range("LossTails.threshold", threshold, least=0)
        self.reference, self.threshold, self.during_fit = reference, threshold, during_fit
        self._forget()

    def _forget(self) -> None:
        self._active = False
        self._model: Any = None  # the reference
        self._tails: list[TokenLossTails] = []  # one per data loader
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._pass: dict[str, Tensor] = {}  # the scales at the norms' inputs in the batch under way
        self._scales: list[dict[str, Tensor]] = []  # per loader and norm: sum, number and largest, (3,) float64
        self._lines: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the reference, where it will be used."""
        self._forget()
        self._active = stage in ("validate", "test") or (stage == "fit" and self.during_fit)
        if not self._active or self.reference is None:
            return
        loaded = folded.load_any(self.reference)
        self._check_vocabulary(loaded.model, loaded.tokenizer_json, trainer)
        self._model = loaded.model.to(trainer.strategy.root_device).eval().requires_grad_(False)

    def _check_vocabulary(self, model: nn.Module, tokenizer_json: str | None, trainer: L.Trainer) -> None:
        data = trainer.datamodule
        theirs, size = getattr(data, "tokenizer_json", None), getattr(data, "vocab_size", 0)
        if size > (own := _number_of(model, "vocab_size")):
            raise TaperlitError(
                f"LossTails.reference {self.reference} has {own} tokens and the data's tokenizer {size}; name a model "
                "that has the data's tokenizer."
            )
        # Each could have its own "12": only the same token's losses can be compared.
        if theirs and tokenizer_json and _vocabulary(theirs) != _vocabulary(tokenizer_json):
            raise TaperlitError(
                f"LossTails.reference {self.reference} has another tokenizer than the data; name a model that has the "
                "data's tokenizer."
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer, pl_module, len(trainer.num_val_batches))

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._begin(trainer, pl_module, len(trainer.num_test_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count(pl_module, "validation_step", outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count(pl_module, "test_step", outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures."""
        self._log(trainer, pl_module, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table, where this is all there is to do."""
        self._print(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        self._print(trainer)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: int) -> None:
        # On the CPU, whatever the device: there is float64, and a process group for GPUs takes pickled values.
        if not self._active:
            return
        self._tails = [
            TokenLossTails(self.threshold, dist_sync_fn=_gather_once(trainer)) for _ in range(max(loaders, 1))
        ]
        self._release()
        norms = {plain_name(name): module for name, module in pl_module.named_modules() if _is_norm(name, module)}
        self._scales = [{name: torch.zeros(3, dtype=torch.float64) for name in norms} for _ in self._tails]
        for name, module in norms.items():
            hook = partial(self._on_norm, name)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_norm(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = first_input(module, args, kwargs)
        if h.is_floating_point() and h.dim() > 1:
            self._pass[name] = token_scale(module, h.detach())

    def _release(self) -> None:
        self._pass = {}
        while self._hooks:
            self._hooks.pop().remove()

    def _add_scales(self, counted: Tensor, loader: int) -> None:
        """Add a batch's scales, but for those of padding, (B, T), where a norm has one per target."""
        for name, s in self._pass.items():
            values = (s[counted.to(s.device)] if s.shape == counted.shape else s).double()
            if values.numel():
                mine = self._scales[loader][name]
                mine[:2] += torch.stack((values.sum(), values.new_tensor(values.numel()))).cpu()
                mine[2] = mine[2].maximum(values.max().cpu())
        self._pass = {}

    @torch.no_grad()
    def _count(self, pl_module: L.LightningModule, step: str, losses: Any, blocks: Any, loader: int) -> None:
        if not self._active:
            return
        is_losses = isinstance(losses, Tensor) and losses.dim() == 2 and losses.is_floating_point()
        is_blocks = isinstance(blocks, Tensor) and blocks.dim() == 2 and not blocks.is_floating_point()
        if not is_losses or not is_blocks or blocks.shape != (losses.shape[0], losses.shape[1] + 1):
            raise TaperlitError(
                f"LossTails needs {type(pl_module).__name__}.{step} to return the (B, T) losses of the tokens of its "
                f"(B, T + 1) batch, not a {_kind(losses)} for a {_kind(blocks)}; return them, or leave LossTails out."
            )
        scales, self._pass = self._pass, {}
        reference = None if self._model is None else self._reference_losses(blocks)
        self._pass = scales
        self._tails[loader].update(losses, blocks, reference)
        self._add_scales(blocks[:, 1:] != -100, loader)

    def _reference_losses(self, blocks: Tensor) -> Tensor:
        context, size = _number_of(self._model, "block_size"), _number_of(self._model, "vocab_size")
        if blocks.shape[1] - 1 > context:
            raise TaperlitError(
                f"LossTails.reference {self.reference} has a context of {context} tokens and the blocks "
                f"{blocks.shape[1] - 1}; set data.block_size to {context} or less, or name another model."
            )
        if (token := int(blocks.max())) >= size:
            raise TaperlitError(
                f"LossTails.reference {self.reference} has {size} tokens and the data a token {token}; name a model "
                "that has the data's tokenizer."
            )
        return self._model.token_losses(blocks[:, :-1].clamp(min=0), blocks[:, 1:])

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        self._lines = []
        for i, tails in enumerate(self._tails):
            figures = tails.compute()
            ratios = _ratios(trainer, self._scales[i])
            if ratios:
                figures["scale_max"] = torch.tensor(max(ratios.values()), dtype=torch.float64)
            name = f"/dataloader_idx_{i}" if len(self._tails) > 1 else ""
            for key, value in figures.items():
                if value.dim() == 0 and key not in ("tokens", "loss_mean"):  # the module logs its own
                    # The largest of equal numbers is that number, bit by bit; their mean may not be.
                    pl_module.log(
                        f"{split}/{key}{name}", value.item(), reduce_fx="max", sync_dist=True, add_dataloader_idx=False
                    )
            place = _place_in_words(getattr(trainer.datamodule, "tokenizer_json", None))
            if figures.get("loss_nonfinite"):
                rank_zero_warn(
                    f"{figures['loss_nonfinite']} of {split}'s {figures['tokens']} token losses are not finite, among "
                    f"them {place(figures['loss_max_at'])}."
                )
            if figures.get("reference_nonfinite"):
                rank_zero_warn(
                    f"{figures['reference_nonfinite']} of {split}'s {figures['tokens']} token losses are not finite in "
                    f"LossTails.reference {self.reference}; they are in no figure that compares."
                )
            self._lines += [*self._table(f"{split}{name}", figures, place), *_lines_of(ratios)]
        self._tails = []
        self._release()

    def _table(self, title: str, figures: dict[str, Tensor], place: Callable[[Tensor], str]) -> list[str]:
        lines = [f"{title}: losses of {figures['tokens']:,} tokens, in nats"]
        if "loss_mean" not in figures:
            return lines
        one = {key: value.item() for key, value in figures.items() if value.dim() == 0}
        lines += [
            f"  mean {one['loss_mean']:.4g}, median {one['loss_median']:.4g}, 99.9% {one['loss_p999']:.4g}",
            f"  largest {one['loss_max']:.4g}: {place(figures['loss_max_at'])}",
        ]
        where = [f"{key.removeprefix('loss_at/')}: {one[key]:.4g}" for key in one if key.startswith("loss_at/")]
        lines.append(f"  by position {', '.join(where)}")
        if "rise_max" in figures:
            lines += [
                f"  {one['tokens_risen']:,} ({one['share_risen']:.3%}) rose by more than {self.threshold:g} over "
                f"{self.reference}; mean rise {one['rise_mean']:.4g}",
                f"  largest rise {one['rise_max']:.4g}: {place(figures['rise_max_at'])}",
            ]
        return lines

    def _print(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._lines and trainer.state.fn != "fit":
            print("\n".join(self._lines))
        self._lines = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the reference and of the norms."""
        self._release()
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the reference and of the norms after an error too: Lightning calls no teardown then."""
        self._release()
        self._forget()


def _is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module is a norm, or by its name was one before it was folded."""
    leaf = name.rpartition(".")[2].lower()
    if module._modules and not isinstance(module, TaperNorm):
        return False  # a norm has no parts, or is called a norm only after the one within
    return isinstance(module, TaperNorm | nn.RMSNorm | nn.LayerNorm) or "norm" in leaf or leaf.startswith("ln_")


def _ratios(trainer: L.Trainer, scales: dict[str, Tensor]) -> dict[str, float]:
    """The largest scale over the mean one by norm, over all processes; of what did not run there is none."""
    parts = list(dict(gather((data_rank(trainer)[0], scales))).values())
    found = {}
    for name in scales:
        total, count, _ = torch.stack([part[name] for part in parts]).sum(0).tolist()
        largest = max(part[name][2].item() for part in parts)
        if count:
            found[name] = largest / (total / count) if total else 1.0
    return found


def _lines_of(ratios: dict[str, float]) -> list[str]:
    """The ratios, several to a line, in the model's order."""
    if not ratios:
        return []
    worst = max(ratios, key=lambda name: ratios[name])
    lines = [f"  largest scale / mean at the norms' inputs: {ratios[worst]:.3g} at {worst}; of each:"]
    shown = [f"{name} {ratio:.3g}" for name, ratio in ratios.items()]
    return lines + [f"    {', '.join(shown[i : i + PER_LINE])}" for i in range(0, len(shown), PER_LINE)]


def _gather_once(trainer: L.Trainer) -> Callable[..., list[Tensor]]:
    """What brings a metric's state together: one part from each that sees its own data, be it several processes."""

    def gathered(state: Tensor, group: Any = None) -> list[Tensor]:
        return list(dict(gather((data_rank(trainer)[0], state))).values())

    return gathered


def _number_of(model: Any, name: str) -> int:
    """``vocab_size`` or ``block_size`` of a model, or of its config."""
    return getattr(model, name) if hasattr(model, name) else getattr(model.config, name)


def _vocabulary(tokenizer_json: str) -> dict[str, int]:
    return Tokenizer.from_str(tokenizer_json).get_vocab()


def _kind(thing: Any) -> str:
    if not isinstance(thing, Tensor):
        return type(thing).__name__
    return f"{str(thing.dtype).removeprefix('torch.')} tensor of {tuple(thing.shape)}"


def _place_in_words(tokenizer_json: str | None) -> Callable[[Tensor], str]:
    """What tells a token, the one before it and its position, as text where the tokenizer is known."""
    tokenizer = Tokenizer.from_str(tokenizer_json) if tokenizer_json else None

    def name(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False) if tokenizer else ""
        return f"{text!r} ({token})" if text else f"token {token}"

    def place(at: Tensor) -> str:
        before, token, position = at.tolist()
        return f"{name(token)} after {name(before)} at position {position}"

    return place
