"""The scales at the norms' inputs that LossTails reports, against float64."""

import lightning as L
import pytest
import torch
from processes import on_two
from torch import nn
from torch.utils.data import DataLoader
from toy import trainer

from taperlit import LossTails, taper
from taperlit.loss import token_losses
from taperlit.norm import shared_gate

VOCAB, T = 30, 12


def blocks():
    tokens = torch.randint(VOCAB, (14, T + 1), generator=torch.Generator().manual_seed(3))
    tokens[-3, 5:] = -100
    return tokens


class Normed(L.LightningModule):
    def __init__(self, kind=nn.RMSNorm, g=None, gone=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, VOCAB)
        self.attn_norm, self.ln_f = kind(6), kind(6)
        with torch.no_grad():
            self.embed.weight *= torch.linspace(0.1, 5, VOCAB)[:, None]
        if g is not None:
            taper(self)
            shared_gate(self).set(g)
        if gone:
            self.attn_norm = nn.Identity()
        self.inputs = {"attn_norm": [], "ln_f": []}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = self.embed(batch[:, :-1].clamp(min=0))
        y = x + self.linear(self.attn_norm(x)) ** 2
        for name, h in (("attn_norm", x), ("ln_f", y)):
            self.inputs[name].append((h.double(), batch[:, 1:] != -100))
        return token_losses(self.head, self.ln_f(y), batch[:, 1:], 4096)

    test_step = validation_step

    def expected(self, centred=False):
        ratios = {}
        for name, seen in self.inputs.items():
            h = torch.cat([part[counted] for part, counted in seen])
            h = h - h.mean(-1, keepdim=True) if centred else h
            s = h.square().mean(-1).sqrt()
            ratios[name] = (s.max() / s.mean()).item()
        return ratios


def run(tmp_path, model, capsys, command="validate", loaders=1):
    data = [DataLoader(blocks(), batch_size=4)] * loaders
    one = trainer(tmp_path, LossTails(), limit_val_batches=1.0)
    figures = getattr(one, command)(model, data if loaders > 1 else data[0], verbose=False)
    return figures, capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "centred"),
    [
        ({}, False),
        ({"kind": nn.LayerNorm}, True),
        ({"g": 1.0}, False),
        ({"g": 0.0, "kind": nn.LayerNorm}, True),
        ({"g": 0.0, "gone": True}, False),
    ],
)
@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_the_ratios_are_those_of_float64(tmp_path, capsys, words, centred, command, split):
    model = Normed(**words)
    (figures,), out = run(tmp_path, model, capsys, command)
    expected = model.expected(centred)
    assert figures[f"{split}/scale_max"] == pytest.approx(max(expected.values()), rel=1e-5)
    assert f"attn_norm {expected['attn_norm']:.3g}, ln_f {expected['ln_f']:.3g}\n" in out
    worst = max(expected, key=expected.get)
    assert f"largest scale / mean at the norms' inputs: {expected[worst]:.3g} at {worst}; of each:\n" in out
    assert not any(
        name in ("attn_norm", "ln_f") and module._forward_pre_hooks for name, module in model.named_modules()
    )


def test_several_loaders_are_told_apart(tmp_path, capsys):
    model = Normed()
    figures, out = run(tmp_path, model, capsys, loaders=2)
    assert out.count("largest scale / mean") == 2
    assert figures[0]["val/scale_max/dataloader_idx_0"] == figures[1]["val/scale_max/dataloader_idx_1"]


def test_the_reference_and_other_passes_do_not_count(tmp_path, capsys, monkeypatch):
    from types import SimpleNamespace

    from taperlit.checkpoint import folded

    model = Normed()

    class Reference(nn.Module):
        vocab_size, block_size = VOCAB, T

        def token_losses(self, tokens, targets, chunk_tokens=4096):
            model.attn_norm(torch.full((*tokens.shape, 6), 1e6))
            return torch.ones(targets.shape)

    found = SimpleNamespace(model=Reference(), tokenizer_json=None)
    monkeypatch.setattr(folded, "load_any", lambda source: found)
    one = trainer(tmp_path, LossTails("somewhere"), limit_val_batches=1.0)
    (figures,) = one.validate(model, DataLoader(blocks(), batch_size=4), verbose=False)
    assert figures["val/scale_max"] == pytest.approx(max(model.expected().values()), rel=1e-5)


class Shared(Normed):
    def val_dataloader(self):
        return DataLoader(blocks()[self.global_rank :: self.trainer.world_size], batch_size=4)


class Keep(L.Callback):
    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(trainer.callback_metrics, f"{trainer.default_root_dir}/metrics.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    found = []
    for options in ({}, on_two()):
        trainer(tmp_path, LossTails(), Keep(), limit_val_batches=1.0, **options).validate(Shared(), verbose=False)
        found.append(torch.load(tmp_path / "metrics.pt"))
    assert found[1]["val/scale_max"].item() == pytest.approx(found[0]["val/scale_max"].item(), rel=1e-6)
