"""The toy on sequences whose first position is huge, and its alignment statistics by formula."""

import lightning as L
import torch
from toy import Toy

from taperlit.norm import tapered_norms


class Sequences(Toy):
    """Trained on (B, 5, 4) batches."""

    def __init__(self, *args, **words):
        super().__init__(*args, **words)
        self.example_input_array = torch.randn(3, 5, 4)

    def training_step(self, batch, batch_idx):
        start = batch_idx * self.batch_size  # a plain loader begins again in a resumed run
        return super().training_step(blocks()[start : start + self.batch_size], batch_idx)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(blocks(), batch_size=self.batch_size)


def blocks():
    x = torch.randn(160, 5, 4, generator=torch.Generator().manual_seed(1)) * 0.3
    x[:, 0] *= 30
    return x


class Sums(L.Callback):
    """The means of ``w / r`` and ``w`` over some positions, batch by batch, in float64."""

    def __init__(self, weight, positions):
        self.weight, self.positions = weight, positions
        self.batches = []

    def on_fit_start(self, trainer, pl_module):
        for name, norm in tapered_norms(pl_module).items():
            norm.register_forward_pre_hook(lambda module, args, name=name: self.look(name, module, args[0]))

    def on_train_batch_start(self, *_):
        self.batches.append({})

    def look(self, name, norm, h):
        if not (norm.training and torch.is_grad_enabled()):
            return
        h = h.detach().double()[:, self.positions]
        h = h - h.mean(-1, keepdim=True) if norm.centred else h
        r = (h.square().mean(-1) + (norm.kind.eps or torch.finfo(torch.float32).eps)).sqrt()
        energy = (h * norm.weight.detach().double()).square().sum(-1)
        w = energy if self.weight == "energy" else torch.ones_like(energy)
        self.batches[-1][name] = torch.stack(((w / r).mean(), w.mean()))

    def scalars(self, rate, steps):
        """``c`` of every norm: ``steps`` says, per optimizer step, which batches belong to it."""
        result = {}
        for name in self.batches[0]:
            ema = torch.zeros(2, dtype=torch.float64)
            for step in steps:
                ema = ema.lerp(torch.stack([self.batches[b][name] for b in step]).mean(0), rate)
            result[name] = (ema[0] / ema[1]).item()
        return result
