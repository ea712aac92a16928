"""A small LightningModule of nobody's design, and a trainer that is quiet."""

import lightning as L
import torch
from torch import nn

from taperlit import taper
from taperlit.norm import shared_gate, tapered_norms


class Layer(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.norm, self.linear = norm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Toy(L.LightningModule):
    """Two residual layers and a head, trained on (B, 4) batches to give the sum of their squares."""

    def __init__(self, norm=nn.RMSNorm, tapered=True, seed=0, lr=1e-2):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.layers = nn.Linear(4, 8), nn.Sequential(Layer(8, norm), Layer(8, norm))
        self.head = nn.Linear(8, 1)
        if tapered:
            taper(self)
        self.example_input_array = torch.randn(3, 4)
        self.lr, self.batch_size = lr, 4
        self.gates = []

    def forward(self, x):
        return self.head(self.layers(self.embed(x)))

    def loss(self, x):
        return (self(x).squeeze(-1) - x.square().sum(-1)).square().mean()

    def training_step(self, batch, batch_idx):
        gate = shared_gate(self)
        self.gates.append(gate.value.item() if gate else None)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows(), batch_size=self.batch_size)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(rows()[:8], batch_size=4)


def rows():
    return torch.randn(160, 4, generator=torch.Generator().manual_seed(1))


def trainer(tmp_path, *callbacks, steps=12, kind=L.Trainer, **options):
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    return kind(
        max_steps=steps, callbacks=list(callbacks), default_root_dir=tmp_path, accelerator="cpu",
        **{"devices": 1, "limit_val_batches": 0, **quiet, **options},
    )  # fmt: skip


def fit(tmp_path, model, *callbacks, ckpt_path=None, **options):
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(model, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


class Noted(torch.optim.AdamW):
    """Writes down a number of its groups that its steps use."""

    def __init__(self, groups, key, **options):
        super().__init__(groups, **options)
        self.key, self.used = key, []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.used.append([group[self.key] for group in self.param_groups])
        super().step()
        return loss


class Stop(L.Callback):
    """Ends a run before its end."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.after


def scalars(model):
    return {name: norm.alignment.item() for name, norm in tapered_norms(model).items()}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Moments(L.Callback):
    """The alignment statistics by the method's own formula in float64, batch by batch, of what each norm was given."""

    def __init__(self):
        self.batches = []  # per batch and norm: the means of |hD|^2/r and |hD|^2, one pair per forward pass
        self.residuals = []  # per batch: the mean of s(h) of the head's input

    def on_fit_start(self, trainer, pl_module):
        for name, norm in tapered_norms(pl_module).items():
            norm.register_forward_pre_hook(lambda module, args, name=name: self.look(name, module, args[0]))
        pl_module.get_submodule("head").register_forward_pre_hook(self.look_at_residual)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.batches.append({name: [] for name in tapered_norms(pl_module)})
        self.residuals.append([])

    def look(self, name, norm, h):
        if not (norm.training and torch.is_grad_enabled()):
            return
        h = h.detach().double()
        h = h - h.mean(-1, keepdim=True) if norm.centred else h
        r = (h.square().mean(-1) + (norm.kind.eps or torch.finfo(torch.float32).eps)).sqrt()
        energy = (h * norm.weight.detach().double()).square().sum(-1)
        self.batches[-1][name].append(torch.stack(((energy / r).mean(), energy.mean())))

    def look_at_residual(self, module, args):
        if module.training and torch.is_grad_enabled():
            s = (args[0].detach().double().square().mean(-1) + torch.finfo(torch.float32).eps).sqrt()
            self.residuals[-1].append(s.mean())

    def scalars(self, rate, steps):
        """``c`` of every norm: ``steps`` says, per optimizer step that counts, which batches belong to it."""
        result = {}
        for name in self.batches[0]:
            ema = torch.zeros(2, dtype=torch.float64)
            for step in steps:
                ema = ema.lerp(torch.stack([m for b in step for m in self.batches[b][name]]).mean(0), rate)
            result[name] = (ema[0] / ema[1]).item()
        return result

    def target(self, rate, steps):
        """The scale anchor's target."""
        ema = weight = 0.0
        for step in steps:
            s = torch.stack([s for b in step for s in self.residuals[b]]).mean().item()
            ema, weight = (1 - rate) * ema + rate * s, (1 - rate) * weight + rate
        return ema / weight
