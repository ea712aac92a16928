"""``taperlit export --to onnx``: from a folded model's directory and from a checkpoint."""

import sys

import pytest
import torch
from tokenizers import Tokenizer

from taperlit.checkpoint.folded import load_model, write_folded
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.cli import main
from taperlit.data.tokenizer import train_tokenizer
from taperlit.decode.onnx_engine import OnnxEngine
from taperlit.folding import fold
from taperlit.norm import shared_gate


@pytest.fixture
def folded(tiny, tmp_path):
    """A folded model's directory."""
    model = tiny(["*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(8)[None]))
    tokenizer = train_tokenizer(iter(["def f(x):\n    return x\n" * 20]), 270)
    return write_folded(tmp_path / "folded", model, structure, tokenizer.to_str())


@torch.no_grad()
def test_a_folded_model(folded, capsys):
    out = folded.with_name("folded-onnx")
    command = ["export", "--to=onnx", "--model", str(folded)]
    assert main(command) == 0, capsys.readouterr().err
    assert f"wrote {out}" in capsys.readouterr().out
    loaded = load_model(folded)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.to_str() == Tokenizer.from_str(loaded.tokenizer_json).to_str()
    prompt = tokenizer.encode("def f(").ids
    tokens = list(prompt)
    for _ in range(5):
        tokens.append(loaded.model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert OnnxEngine(out).generate([prompt], 5) == [tokens[len(prompt) :]]
    # It is there now, so it stays unless told otherwise.
    assert main(command) == 1
    assert capsys.readouterr().err == f"taperlit: error: {out} exists; name another --out or pass --force.\n"
    assert main([*command, "--force", "--dtype=float16"]) == 0
    assert OnnxEngine(out).dtype == torch.float16


def test_a_checkpoint(tiny, tmp_path, capsys):
    model = tiny().eval()
    config = {name: getattr(model.config, name) for name in ("block_size", "n_layer", "n_head", "d_model", "d_ff")}
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {
            "preset": "small_1m",
            "taper": "none",
            "overrides": {**config, "vocab_size": 300, "tied": False},
        },
        "taperlit": {"format": CHECKPOINT_FORMAT},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert main(["export", "--to=onnx", "--model", str(tmp_path / "last.ckpt")]) == 0, capsys.readouterr().err
    prompt = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        wanted = model(prompt)[:, -1]
    torch.testing.assert_close(OnnxEngine(tmp_path / "last-onnx").prefill(prompt), wanted)
    assert not (tmp_path / "last-onnx" / "tokenizer.json").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_it_says_what_to_install(folded, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", "--to=onnx", "--model", str(folded)]) == 1
    line = f"taperlit: error: ONNX needs {missing}, which is not installed: pip install 'taperlit[onnx]'.\n"
    assert capsys.readouterr().err == line
    assert not folded.with_name("folded-onnx").exists()
