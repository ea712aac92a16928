"""LossTails on a LightningModule of nobody's design, against the losses that it returned."""

import copy
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from processes import on_two
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from toy import trainer

from taperlit.callbacks import LossTails
from taperlit.checkpoint import folded
from taperlit.data.tokenizer import train_tokenizer
from taperlit.errors import TaperlitError
from taperlit.loss import token_losses

VOCAB, T = 30, 12


def blocks(rows=14):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (rows, T + 1), generator=generator)
    tokens[-2, 5:] = -100
    tokens[-1] = -100  # padding of a process that has run out
    return tokens


class Bigram(nn.Module):
    """Predicts the next token from the one before; the larger the scale, the worse its surprises."""

    vocab_size, block_size = VOCAB, T

    def __init__(self, scale=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    def token_losses(self, tokens, targets, chunk_tokens=4096):
        assert not self.training
        return token_losses(self.head, self.embed(tokens), targets, chunk_tokens)


class Foreign(L.LightningModule):
    def __init__(self, scale=1.5):
        super().__init__()
        self.net, self.loss = Bigram(scale), MeanMetric()
        self.returned = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        losses = self.net.token_losses(batch[:, :-1].clamp(min=0), batch[:, 1:])
        self.returned.append(losses)
        return losses

    test_step = validation_step

    def training_step(self, batch, batch_idx):
        return self.net.head(self.net.embed(batch[:, :-1].clamp(min=0))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loader(rows=14):
    return DataLoader(blocks(rows), batch_size=4)


def run(tmp_path, callback, model=None, data=None, command="validate", **options):
    model = Foreign() if model is None else model
    one = trainer(tmp_path, callback, **{"limit_val_batches": 1.0, **options})
    if isinstance(data, L.LightningDataModule):
        return getattr(one, command)(model, datamodule=data, verbose=False)[0]
    return getattr(one, command)(model, loader() if data is None else data, verbose=False)[0]


@pytest.fixture
def reference(monkeypatch):
    """Stands in for what ``load_any`` reads: what was asked for, and how often."""
    asked = SimpleNamespace(sources=[], model=Bigram(0.5, seed=1).train(), tokenizer_json=None)

    def load_any(source):
        asked.sources.append(source)
        return SimpleNamespace(model=asked.model, tokenizer_json=asked.tokenizer_json)

    monkeypatch.setattr(folded, "load_any", load_any, raising=False)
    return asked


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_what_is_logged_and_printed(tmp_path, capsys, command, split):
    model = Foreign()
    figures = run(tmp_path, LossTails(), model, command=command)
    counted = blocks()[:, 1:] != -100
    losses = torch.cat(model.returned)[counted].double().numpy()
    for name, q in (("median", 0.5), ("p999", 0.999)):
        expected = np.quantile(losses, q, method="inverted_cdf")
        assert figures.pop(f"{split}/loss_{name}") == pytest.approx(expected, rel=2**-12)
    assert figures.pop(f"{split}/loss_max") == pytest.approx(losses.max(), rel=1e-6)
    assert figures.pop(f"{split}/loss_nonfinite") == 0
    by_position = torch.cat(model.returned)[:, 8:12][counted[:, 8:12]]
    assert figures[f"{split}/loss_at/8-11"] == pytest.approx(by_position.mean().item(), rel=1e-6)
    assert figures.keys() == {f"{split}/loss_at/{bucket}" for bucket in ("0", "1", "2-3", "4-7", "8-11")}
    out = capsys.readouterr().out
    assert f"{split}: losses of {len(losses)} tokens, in nats" in out
    assert f"mean {losses.mean():.4g}" in out
    worst = (torch.cat(model.returned) == losses.max()) & counted  # a bigram's loss is the same wherever it stands
    ties = [(*blocks()[row, position : position + 2].tolist(), position) for row, position in worst.nonzero().tolist()]
    before, token, position = min(ties)
    assert f"largest {losses.max():.4g}: token {token} after token {before} at position {position}\n" in out


def test_with_a_reference(tmp_path, reference, capsys):
    model, callback = Foreign(), LossTails("somewhere", threshold=1.0)
    figures = run(tmp_path, callback, model)
    assert reference.sources == ["somewhere"]
    tokens = blocks()
    counted = tokens[:, 1:] != -100
    logits = reference.model.head(reference.model.embed(tokens[:, :-1].clamp(min=0))).double()
    theirs = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    rise = (torch.cat(model.returned).double() - theirs)[counted]
    assert 0 < (rise > 1).sum() < len(rise)
    assert figures["val/tokens_risen"] == (rise > 1).sum()
    assert figures["val/share_risen"] == pytest.approx((rise > 1).double().mean().item())
    assert figures["val/rise_mean"] == pytest.approx(rise.mean().item(), rel=1e-5)
    assert figures["val/rise_max"] == pytest.approx(rise.max().item(), rel=1e-5)
    assert figures["val/reference_nonfinite"] == 0
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert callback._model is None  # released
    out = capsys.readouterr().out
    assert f"{(rise > 1).sum()} ({(rise > 1).double().mean():.3%}) rose by more than 1 over somewhere" in out


def test_the_model_against_itself_rises_nowhere(tmp_path, reference):
    model = Foreign()
    reference.model = copy.deepcopy(model.net)
    figures = run(tmp_path, LossTails("itself", threshold=0), model)
    assert figures["val/tokens_risen"] == figures["val/rise_max"] == figures["val/rise_mean"] == 0


def test_a_fit_is_left_alone_unless_asked(tmp_path, reference, capsys):
    for during, expected in ((False, set()), (True, {"val/loss_max", "val/rise_max"})):
        callback = LossTails("somewhere", during_fit=during)
        one = trainer(tmp_path, callback, steps=2, limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=1)
        one.fit(Foreign(), loader(), loader())
        assert {"val/loss_max", "val/rise_max"} & one.callback_metrics.keys() == expected
        assert reference.sources == ["somewhere"] * during
        assert not callback.state_dict()
        one.save_checkpoint(tmp_path / "it.ckpt")
        saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == Foreign().state_dict().keys()
    assert "losses of" not in capsys.readouterr().out


def test_a_second_run_counts_anew(tmp_path):
    model, callback = Foreign(), LossTails()
    assert run(tmp_path, callback, model) == run(tmp_path, callback, model)


def test_each_data_loader_has_its_own(tmp_path):
    figures = run(tmp_path, LossTails(), data=[loader(), loader(5)])
    for i, rows in enumerate((14, 5)):
        alone = run(tmp_path, LossTails(), data=loader(rows))
        assert figures[f"val/loss_p999/dataloader_idx_{i}"] == alone["val/loss_p999"]


def test_losses_that_are_not_finite_are_told(tmp_path, reference):
    model = Foreign()
    reference.model = copy.deepcopy(model.net)
    mine, theirs = blocks()[0, 3:5].tolist()  # tokens that spoil what is predicted from them
    with torch.no_grad():
        model.net.embed.weight[mine] = float("nan")
        reference.model.embed.weight[theirs] = float("nan")
    before, counted = blocks()[:, :-1], blocks()[:, 1:] != -100
    bad, left_out = ((before == mine) & counted).sum(), ((before == theirs) & counted).sum()
    with pytest.warns(UserWarning, match="token losses are not finite") as warned:
        figures = run(tmp_path, LossTails("it"), model)
    assert figures["val/loss_nonfinite"] == figures["val/tokens_risen"] == bad
    assert figures["val/reference_nonfinite"] == left_out
    assert figures["val/loss_max"] == float("inf")
    told = [str(warning.message) for warning in warned if "not finite" in str(warning.message)]
    assert told[0].startswith(f"{bad} of val's 148 token losses are not finite, among them token ")
    assert f" after token {mine} at position " in told[0]
    assert told[1].startswith(f"{left_out} of val's 148 token losses are not finite in LossTails.reference it; ")


class Data(L.LightningDataModule):
    def __init__(self, tokenizer, vocab_size=VOCAB):
        super().__init__()
        self.tokenizer_json, self.vocab_size = tokenizer.to_str(), vocab_size

    def val_dataloader(self):
        return loader()


@pytest.fixture(scope="module")
def tokenizers():
    """Two that have as many tokens, and not the same."""
    return [train_tokenizer(iter([text] * 20), 262) for text in ("the cat sat on the mat", "ein Hund lief um das Haus")]


def test_tokens_are_told_as_text(tmp_path, reference, tokenizers, capsys):
    data = Data(tokenizers[0])
    reference.tokenizer_json = tokenizers[0].to_str(pretty=True)
    assert "val/rise_max" in run(tmp_path, LossTails("it"), data=data)
    ids = range(VOCAB)
    line = next(line for line in capsys.readouterr().out.splitlines() if "  largest rise" in line)
    texts = [f"{tokenizers[0].decode([i], skip_special_tokens=False)!r} ({i})" for i in ids]
    assert any(f": {one} after " in line for one in texts)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("tokenizer", "it has another tokenizer than the data; name a model"),
        ("size", "it has 30 tokens and the data's tokenizer 31; name a model"),
        ("token", "it has 20 tokens and the data a token 29; name a model"),
        ("context", "context of 8 tokens and the blocks 12; set data.block_size to 8 or less"),
    ],
)
def test_a_reference_that_does_not_fit(tmp_path, reference, tokenizers, case, message):
    data = None
    if case == "tokenizer":
        data, reference.tokenizer_json = Data(tokenizers[0]), tokenizers[1].to_str()
    elif case == "size":
        data = Data(tokenizers[0], 31)
    elif case == "token":
        reference.model.vocab_size = 20
    else:
        reference.model.block_size = 8
    callback = LossTails("it")
    with pytest.raises(TaperlitError, match=message) as error:
        run(tmp_path, callback, data=data)
    assert "\n" not in str(error.value)
    assert callback._model is None


class Silent(Foreign):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


class Meaned(Foreign):
    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx).mean()


class Short(Foreign):
    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx)[:, 1:]


class Logprobs(Foreign):
    def validation_step(self, batch, batch_idx):
        return -super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Silent,
            r"Silent.validation_step to return the \(B, T\) losses .* not a NoneType for a int64 tensor of \(4, 13\)",
        ),
        (Meaned, r"not a float32 tensor of \(\)"),
        (Short, r"not a float32 tensor of \(4, 11\)"),
        (Logprobs, "which no cross-entropy is"),
    ],
)
def test_a_module_that_returns_no_token_losses_is_told_what_is_needed(tmp_path, kind, message):
    with pytest.raises(TaperlitError, match=message) as error:
        run(tmp_path, LossTails(), kind())
    assert "\n" not in str(error.value)


def test_a_threshold_out_of_range_is_refused():
    with pytest.raises(TaperlitError, match="threshold is -1"):
        LossTails(threshold=-1)


class Dealt(Foreign):
    """Every process has its share of the blocks, and the first one padding for the one it lacks."""

    def val_dataloader(self):
        rank, count = self.trainer.global_rank, self.trainer.world_size
        rows = blocks(15)[:13]
        padded = torch.cat([rows, torch.full((-len(rows) % count, T + 1), -100)])
        return DataLoader(padded[rank::count], batch_size=4)


class Reference(LossTails):
    """Has its reference at hand in a process of its own, too."""

    def setup(self, trainer, pl_module, stage):
        folded.load_any = lambda source: SimpleNamespace(model=Bigram(0.5, seed=1), tokenizer_json=None)
        super().setup(trainer, pl_module, stage)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folded, "load_any", None, raising=False)
    results = []
    for options in ({"use_distributed_sampler": False}, on_two()):
        one = trainer(tmp_path, Reference("it", 1.0), limit_val_batches=1.0, **options)
        results.append(one.validate(Dealt(), verbose=False)[0])
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) > 10
    assert results[1] == pytest.approx(results[0], rel=1e-7)
    for name in ("loss_max", "loss_p999", "loss_median", "share_risen", "tokens_risen", "rise_max"):
        assert results[1][f"val/{name}"] == results[0][f"val/{name}"]
