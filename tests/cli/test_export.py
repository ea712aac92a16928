"""``taperlit export``: from a folded model's directory and from a checkpoint, to each program."""

import json
import sys

import pytest
import small_models
import torch
import transformers as tf
from families import close_with_random_maps
from safetensors.torch import load_file
from tokenizers import Tokenizer

from taperlit.checkpoint.folded import load_model, write_folded
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.cli import main
from taperlit.data.tokenizer import train_tokenizer
from taperlit.decode.onnx_engine import OnnxEngine
from taperlit.folding import fold
from taperlit.hub.lens import load_hooked
from taperlit.hub.load import load_pretrained
from taperlit.norm import shared_gate, tapered_norms
from taperlit.surgery import taper


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


def test_a_folder_with_a_dot_in_its_name_gives_its_whole_name(folded, capsys):
    dotted = folded.rename(folded.with_name("llama-3.2-1b"))
    assert main(["export", "--to=onnx", "--model", str(dotted)]) == 0, capsys.readouterr().err
    assert f"wrote {dotted}-onnx" in capsys.readouterr().out


def test_the_folder_one_is_in_is_a_path_too(folded, monkeypatch, capsys):
    monkeypatch.chdir(folded)
    assert main(["export", "--to=onnx", "--model=."]) == 0, capsys.readouterr().err
    assert OnnxEngine("../folded-onnx").filled == 0
    monkeypatch.chdir(folded.with_name("folded-onnx"))
    command = ["export", "--to=onnx", f"--model={folded}", "--out=."]
    assert main(command) == 1
    assert "exists; name another --out or pass --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0, capsys.readouterr().err
    monkeypatch.chdir(folded)  # the other one is gone
    OnnxEngine("../folded-onnx")
    assert main(["stress", "--quick", "--model=."]) == 0, capsys.readouterr().err
    for command in (["fold", "--ckpt=/"], ["export", "--to=onnx", "--model=/"]):
        assert main(command) == 1
        assert "/ is the root of all folders; name another" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "..", "folded", "../folded"])
@pytest.mark.parametrize("command", [["export", "--to=onnx", "--model"], ["fold", "--ckpt"]])
def test_what_is_read_is_never_written_over(folded, monkeypatch, capsys, command, out):
    where = folded if out.startswith(".") else folded.parent
    monkeypatch.chdir(where)
    before = {path: path.read_bytes() for path in folded.iterdir()}
    assert main([*command, str(folded), f"--out={out}", "--force"]) == 1
    assert "is or holds" in (line := capsys.readouterr().err)
    assert "would be lost; name another --out" in line
    assert {path: path.read_bytes() for path in folded.iterdir()} == before


@torch.no_grad()
def test_a_pretrained_model_to_onnx(tmp_path, capsys):
    model = load_pretrained(str(small_models.saved("gpt2", tmp_path / "in")))
    taper(model, ["*"])
    close_with_random_maps(tapered_norms(model))
    prompt = torch.tensor([[5, 9, 2, 40, 77]])
    structure = fold(model, lambda: model(prompt))
    write_folded(tmp_path / "folded", model, structure)
    assert main(["export", "--to=onnx", "--model", str(tmp_path / "folded")]) == 0, capsys.readouterr().err
    got = OnnxEngine(tmp_path / "folded-onnx").prefill(prompt)
    torch.testing.assert_close(got, model(prompt)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra_it_says_what_to_install(folded, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", "--to=onnx", "--model", str(folded)]) == 1
    line = f"taperlit: error: ONNX needs {missing}, which is not installed: pip install 'taperlit[onnx]'.\n"
    assert capsys.readouterr().err == line
    assert not folded.with_name("folded-onnx").exists()


@torch.no_grad()
def test_a_folded_model_to_transformers(folded, capsys):
    figures = folded.with_name("figures.json")
    figures.write_text('{"loss before": 3.25, "loss after": 3.5}')
    command = ["export", "--to=transformers", "--model", str(folded)]
    assert main([*command, f"--results={figures}"]) == 0, capsys.readouterr().err
    out = folded.with_name("folded-transformers")
    printed = capsys.readouterr().out
    assert printed.startswith("loads with transformers alone\nexported against folded, ")
    assert "largest logit difference" in printed
    assert "mean KL divergence" in printed
    assert f"wrote {out} (" in printed
    assert "| loss after | 3.5 |" in (out / "README.md").read_text()
    loaded = load_model(folded)
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("def f(", return_tensors="pt")
    exported = tf.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(exported) is tf.LlamaForCausalLM
    wanted = loaded.model(ids["input_ids"])
    torch.testing.assert_close(exported(**ids).logits, wanted, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err == f"taperlit: error: {out} exists; name another --out or pass --force.\n"
    assert main([*command, "--force", "--dtype=bfloat16"]) == 0
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert main([*command, "--force", "--dtype=float16"]) == 1
    assert "float16 ends at 65504" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A checkpoint whose gate is 0."""
    model = tiny(["*"]).eval()
    shared_gate(model).set(0.0)
    config = {name: getattr(model.config, name) for name in ("block_size", "n_layer", "n_head", "d_model", "d_ff")}
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {
            "preset": "small_1m",
            "taper": "all",
            "overrides": {**config, "vocab_size": 300, "tied": False},
        },
        "TextDataModule": {"sample": torch.randint(300, (2, 17)), "tokenizer": None},
        "taperlit": {"format": CHECKPOINT_FORMAT},
    }
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("to", ["transformers", "transformer-lens"])
def test_a_checkpoint_is_folded_first(checkpoint, capsys, to):
    command = ["export", f"--to={to}", "--out", str(checkpoint.with_name("out")), "--model"]
    assert main([*command, str(checkpoint)]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"taperlit: error: {checkpoint} is not folded; run `taperlit fold --ckpt {checkpoint}`")
    assert main(line.partition("`taperlit ")[2].partition("`")[0].split()) == 0  # as it says
    assert main([*command, str(checkpoint.with_name("last-folded"))]) == 0, capsys.readouterr().err


def test_a_checkpoint_with_its_norms_has_nothing_to_export(tiny, checkpoint, capsys):
    content = torch.load(checkpoint)
    content["state_dict"] = {f"model.{name}": value for name, value in tiny().state_dict().items()}
    content["hyper_parameters"]["taper"] = "none"
    torch.save(content, checkpoint)
    assert main(["export", "--to=transformers", "--model", str(checkpoint)]) == 1
    assert "has its norms as they were, so there is nothing to export" in capsys.readouterr().err


def test_figures_that_are_none(folded, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    for text, words in (
        ('{"loss": "small"}', ": it.loss is 'small', not a finite number; "),
        ('{"loss": 1e999}', ": it.loss is inf, not a finite number; "),
        ('{"loss": NaN}', " is damaged (NaN is no number of JSON); "),
        ("[3]", ": it is a list of 1, not a dictionary; "),
        ("{", " is damaged (Expecting property name"),
        (None, " is missing; "),
    ):
        figures.unlink(missing_ok=True) if text is None else figures.write_text(text)
        assert main(["export", "--to=transformers", "--model", str(folded), f"--results={figures}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"taperlit: error: {figures}{words}")
        assert line.endswith('give --results a JSON object of numbers, such as {"loss before": 3.01}.')
    assert main(["export", "--to=onnx", "--model", str(folded), "--results=figures.json"]) == 1
    assert "is for the model card of --to transformers" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
def test_a_folded_model_to_transformer_lens(folded, capsys):
    command = ["export", "--to=transformer-lens", "--model", str(folded)]
    assert main(command) == 0, capsys.readouterr().err
    hooked = load_hooked(folded.with_name("folded-transformer-lens"))
    prompt = hooked.to_tokens("def f(", prepend_bos=False)
    assert prompt[0].tolist() == Tokenizer.from_str(load_model(folded).tokenizer_json).encode("def f(").ids
    torch.testing.assert_close(hooked(prompt), load_model(folded).model(prompt), rtol=0, atol=1e-4)
    assert main([*command, "--force", "--dtype=bfloat16"]) == 1
    assert "Export to transformer-lens has float32, not bfloat16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_final_norm_is_named_and_how_it_goes(tiny, tmp_path, capsys):
    model = tiny(["blocks.*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(8)[None]))
    folded = write_folded(tmp_path / "folded", model, structure)
    assert main(["export", "--to=transformer-lens", "--model", str(folded)]) == 1
    assert "The model still has a norm, final_norm (RMSNorm)" in capsys.readouterr().err
    assert main(["export", "--to=transformers", "--model", str(folded)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "loads after `import taperlit`, since model.norm stays, and all norms share one epsilon\n"
    )
    config = json.loads((tmp_path / "folded-transformers" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("taperlit", "llama")
