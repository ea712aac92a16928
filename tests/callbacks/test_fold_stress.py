"""The line that FoldOnEnd tells about a folded model on unusual input."""

import logging

import lightning as L
import pytest
import torch
from torch import nn
from toy import Toy, fit

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, load_folded, taper
from taperlit.stress.probe import brief_line

VOCAB = 50
IDS = torch.zeros(1, 3, dtype=torch.int64)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)) ** 2)


class Words(L.LightningModule):
    """A tapered model of tokens, in the form that somebody else would give it."""

    def __init__(self, planted=1.0, keyword=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.out = nn.Embedding(VOCAB, 8), Layer(), nn.Linear(8, VOCAB)
        taper(self)
        with torch.no_grad():
            self.table.weight[33] *= planted
        self.table.requires_grad_(False)
        example = torch.arange(6)[None]
        self.example_input_array = {"ids": example} if keyword else example

    def forward(self, ids):
        return self.out(self.layer(self.table(ids)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        tokens = torch.randint(30, (40, 7), generator=torch.Generator().manual_seed(0))  # never the planted one
        return torch.utils.data.DataLoader(tokens, batch_size=4)


def folded(tmp_path, model, caplog, recwarn):
    caplog.set_level(logging.INFO)
    steps = 8
    fit(tmp_path, model, GateSchedule(2, 4), AlignmentFreeze(), FoldOnEnd(str(tmp_path / "folded")), steps=steps)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stress: ")]
    warned = [str(warning.message) for warning in recwarn if str(warning.message).startswith("stress: ")]
    return told, warned


@pytest.mark.parametrize("keyword", [False, True])
def test_a_calm_model_has_its_line(tmp_path, caplog, recwarn, keyword):
    told, warned = folded(tmp_path, Words(keyword=keyword), caplog, recwarn)
    assert warned == []
    (line,) = told
    assert line.startswith("stress: no non-finite logits in ")
    assert "largest scale " in line


def test_a_token_that_training_never_saw_is_warned_of_by_name(tmp_path, caplog, recwarn):
    _, (line,) = folded(tmp_path, Words(planted=1e22), caplog, recwarn)
    assert "logits are not finite in " in line
    assert "single tokens: token 33 at position 0" in line
    assert load_folded(tmp_path / "folded", build=lambda: untapered()) is not None  # it is written all the same


def untapered():
    model = Words()
    model.layer.norm = nn.RMSNorm(8)
    return model


def test_a_model_of_something_else_is_folded_with_one_line_that_says_so(tmp_path, caplog, recwarn):
    told, warned = folded(tmp_path, Toy(), caplog, recwarn)
    assert warned == []
    assert told == [
        "stress: left out, since token ids cannot be fed here (the example is not one (B, T) tensor of them)"
    ]
    assert (tmp_path / "folded/config.json").exists()


class Padded(nn.Module):
    """More logits than embeddings."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB + 14)

    def forward(self, ids):
        return self.out(self.table(ids))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (nn.Linear(4, 4), torch.randn(2, 4), "not one (B, T) tensor of them"),
        (Padded(), (IDS,) * 2, "not one (B, T) tensor of them"),
        (Padded(), {}, "not one (B, T) tensor of them"),
        (Padded(), IDS[:, :0], "the example has none"),
        (nn.Embedding(VOCAB, 4).requires_grad_(False), {"ids": IDS}, "TypeError"),
        (
            nn.Sequential(nn.Embedding(VOCAB, 1), nn.Flatten()),
            IDS,
            "(1, 3) for (1, 3)",
        ),
        (Padded(), IDS, "index out of range"),
    ],
)
def test_whatever_cannot_be_fed_is_left_out_in_one_line(model, example, words):
    line, calm = brief_line(model, example)
    assert line.startswith("stress: left out, since token ids cannot be fed here (")
    assert words in line
    assert "\n" not in line
    assert calm
