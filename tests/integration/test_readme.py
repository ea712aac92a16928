"""The README's lines, as they stand: a model of somebody else's trained in one process and loaded in another."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch

from taperlit.checkpoint.folded import write_folded
from taperlit.folding import fold
from taperlit.norm import shared_gate

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MINE = """
import lightning as L
import torch
from torch import nn

class MyEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)
        self.example_input_array = torch.randn(2, 5, 16)

    def forward(self, x):
        return self.head(self.encoder(x)).mean(1)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

x = torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(1))
datamodule = torch.utils.data.DataLoader(list(zip(x, (x.mean((1, 2)) > 0).long())), batch_size=8)
"""
FIRST = """
import torch
from mine import MyEncoder, datamodule
torch.manual_seed(0)
{lines}
from taperlit.norm import Phase, shared_gate
assert shared_gate(model).phase is Phase.LINEAR
x = torch.randn(7, 5, 16)
with torch.no_grad():
    torch.save((x, model.eval()(x)), "outputs.pt")
"""
SECOND = """
import torch
from mine import MyEncoder
{lines}
from torch import nn
assert not any(isinstance(m, nn.LayerNorm) for m in model.encoder.layers.modules())
assert isinstance(model.encoder.norm, nn.LayerNorm)
x, expected = torch.load("outputs.pt")
with torch.no_grad():
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
model.train()
with torch.no_grad():  # nor does torch's fused path, off in training, make a difference
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
"""


def test_taper_train_fold_and_load_in_a_fresh_process(tmp_path):
    first, second, _ = BLOCKS
    assert sum(bool(line.strip()) for line in (first + second).splitlines()) < 20
    (tmp_path / "mine.py").write_text(MINE)
    for script, lines in ((FIRST, first.replace("10_000", "40")), (SECOND, second)):
        code = script.format(lines=lines)
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "outputs.pt").exists()
    assert torch.load(tmp_path / "outputs.pt")[1].shape == (7, 3)


def test_decode_a_folded_model(tmp_path, tiny, monkeypatch, capsys):
    model = tiny(["*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(9)[None]))
    write_folded(tmp_path / "folded", model, structure)
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[2], {})
    steps = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert len(steps) == 30  # the context is 32, and the longer prompt has 3 tokens
    assert all(len(block) == 1 and len(block[0]) == 2 for block in steps)
