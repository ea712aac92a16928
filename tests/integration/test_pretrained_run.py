"""A pretrained model through the command line: in, tapered, validated, folded, read by every command."""

import re

import pytest
import torch
from processes import scalars
from small import CONFIGS, error_of, versions
from small_models import build, saved, write_gguf

from taperlit.checkpoint.folded import load_any, load_model, read_model
from taperlit.cli import main

pytestmark = pytest.mark.slow
SMALL = [
    "--data.block_size=32", "--data.batch_size=4", "--data.val_fraction=0.2", "--data.num_workers=0",
    "--data.max_tokens=null", "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=1",
    "--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.val_check_interval=10",
    "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false", "--model.warmup=2", "--model.lr=1e-3",
    "--taper.gate.warmup=5", "--taper.gate.end=10", "--taper.monitor.every=1", "--taper.ema_rate=0.2",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + the_other(value, {i % 7})" for j in range(8)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def fit(tmp_path, text, config, *extra):
    args = ["fit", "--config", str(CONFIGS / "finetune" / config), "--data.files", text, *SMALL]
    assert main([*args, f"--trainer.logger.save_dir={tmp_path}/runs", "--trainer.logger.name=run", *extra]) == 0
    return versions(tmp_path)[-1]


def test_gpt2_goes_the_whole_way(tmp_path, text, capsys):
    folder = saved("gpt2", tmp_path / "gpt2")
    run = fit(tmp_path, text, "gpt2_small_owt.yaml", f"--model.pretrained={folder}", "--model.taper=all")
    logged = scalars(run)
    assert logged["taper/gate"][-1][1] == 0
    assert len([tag for tag in logged if tag.startswith("taper/alignment/")]) == 5
    ckpt = str(run / "checkpoints/last.ckpt")

    # against the model that it began as
    evaluate = ["--config", str(run / "config.yaml"), "--ckpt_path", ckpt, "--trainer.logger=false"]
    capsys.readouterr()
    assert main(["validate", *evaluate, f"--taper.tails.reference={folder}"]) == 0
    out = capsys.readouterr()
    printed = re.search(r"val/loss\W+([\d.]+)", out.out)[1]
    assert float(printed) == pytest.approx(logged["val/loss"][-1][1], rel=1e-5)
    share = float(re.search(r"val/share_risen\W+([\d.]+)", out.out)[1])
    loaded, own = read_model(ckpt), load_any(folder)
    assert 0 <= share < 1

    folder.rename(tmp_path / "gone")  # from here on the checkpoint is enough
    assert main(["fold", "--ckpt", ckpt, "--out", str(tmp_path / "folded")]) == 0
    assert "removed 5 norms" in capsys.readouterr().out
    tokens = loaded.sample[:, :-1].long()
    with torch.no_grad():
        expected = loaded.model(tokens)
        torch.testing.assert_close(read_model(tmp_path / "folded").model(tokens), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(load_model(tmp_path / "folded").model(tokens), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(own.model(tokens), expected, atol=1e-2)
    texts = []
    for model in (str(tmp_path / "folded"), ckpt):
        assert main(["generate", "--model", model, "--prompt", "def f", "--max_new_tokens=9", "--temperature=0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_stopped_run_of_a_gguf_file_goes_on_where_it_was(tmp_path, text):
    file = write_gguf(build("llama_tied"), tmp_path / "tiny.gguf")
    options = ("smollm2_135m.yaml", f"--model.pretrained={file}", "--taper.first=true", "--model.lora.rank=2")
    options += ("--taper.massive.init_args.end=3",)
    whole = fit(tmp_path, text, *options)
    every = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 8, save_top_k: -1}}"
    part = fit(tmp_path, text, *options, every)
    middle = next((part / "checkpoints").glob("*step=8.ckpt"))
    again = fit(tmp_path, text, *options, "--ckpt_path", str(middle))
    models = [read_model(run / "checkpoints/last.ckpt").model.state_dict() for run in (whole, again)]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    for run in (whole, again):
        assert read_model(run / "folded").structure["difference"] < 1e-9


def test_a_run_is_refused_another_model_on_resume(tmp_path, text, capsys):
    folder, other = saved("gpt2", tmp_path / "gpt2"), saved("llama", tmp_path / "llama")
    run = fit(tmp_path, text, "gpt2_small_owt.yaml", f"--model.pretrained={folder}")
    again = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    line = error_of(capsys, *again, f"--model.pretrained={other}", f"--data.tokenizer={other}")
    assert "is of another model" in line
    assert "model_type gpt2, not llama" in line
