"""Whole runs through the command line, on text in the Pile's format."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from processes import scalars
from safetensors.torch import load_file
from small import CONFIGS, SMALL, error_of, fit, fit_command, versions

from taperlit.checkpoint.folded import load_model
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT, read_checkpoint
from taperlit.checkpoint.sharded import digest
from taperlit.cli import main
from taperlit.cli.bench import BENCHES
from taperlit.cli.table import COMMANDS


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        rows = []
        for i in range(30):
            text = "\n".join(f"def function_{shard}_{i}_{j}(x):\n    return x * {j}" for j in range(10))
            rows.append(json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}))
        (folder / f"{shard:02}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(rows).encode()))
    return str(folder / "*.jsonl.zst")


def test_train_fold_generate_and_the_rest(tmp_path, shards, capsys):
    run = fit(tmp_path, shards)
    logged = scalars(run)
    gates = dict(logged["taper/gate"])
    assert [gates[k] for k in (0, 4, 10, 19)] == [1, 1, 0, 0]
    assert 0 < gates[6] < 1
    for tag in (
        "train/loss", "val/loss", "val/perplexity", "train/lr", "train/grad_norm", "train/tokens", "train/scale_loss",
        "taper/pre_logit_rms", "taper/logit_norm",
    ):  # fmt: skip
        assert logged[tag], tag
    assert logged["train/tokens"][-1][1] == 20 * 4 * 32
    assert len([tag for tag in logged if tag.startswith("taper/alignment/")]) == 4
    for (_, loss), (_, perplexity) in zip(logged["val/loss"], logged["val/perplexity"], strict=True):
        assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)

    # beside the run: its exact config, its tokenizer, its checkpoints, and what FoldOnEnd wrote
    assert {"config.yaml", "tokenizer.json", "checkpoints", "folded"} <= set(os.listdir(run))
    ckpt = str(run / "checkpoints/last.ckpt")
    assert read_checkpoint(ckpt)["global_step"] == 20

    capsys.readouterr()
    assert main(["fold", "--ckpt", ckpt, "--out", str(tmp_path / "folded")]) == 0
    out = capsys.readouterr().out
    assert "removed 4 norms" in out
    assert float(re.search(r"validation tokens: (\S+)", out)[1]) < 1e-4
    mine, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "folded", run / "folded"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    folded, unfolded = load_model(tmp_path / "folded"), load_model(ckpt)
    assert not any("attn_norm" in name or "mlp_norm" in name for name in folded.model.state_dict())
    tokens = unfolded.sample[:, :-1].long()
    with torch.no_grad():
        torch.testing.assert_close(folded.model(tokens), unfolded.model(tokens), rtol=1e-3, atol=1e-4)

    texts = []
    for model in (str(tmp_path / "folded"), ckpt):
        command = ["generate", "--model", model, "--prompt", "def f", "--max_new_tokens=12", "--temperature=0"]
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def f")
    assert texts[0] == texts[1]

    # the saved config runs again, and evaluates the checkpoint to the loss that was logged
    saved = ["--config", str(run / "config.yaml"), "--ckpt_path", ckpt, "--trainer.logger=false"]
    assert main(["validate", *saved]) == 0
    printed = re.search(r"val/loss\W+([\d.]+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(logged["val/loss"][-1][1], rel=1e-5)
    assert main(["test", *saved]) == 0
    assert "test/perplexity" in capsys.readouterr().out
    (stale := tmp_path / "predictions.jsonl.1").write_text("a second process's, of an earlier call\n")
    assert main(["predict", *saved, f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert not stale.exists()
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    mean = sum(line["loss"] for line in lines) / len(lines)
    assert mean == pytest.approx(logged["val/loss"][-1][1], rel=1e-4)
    assert all(len(line["logprobs"]) == 32 for line in lines)
    assert {line["step"] for line in lines} == {folded.step, unfolded.step} == {20}


def test_resumed_mid_epoch_is_bit_identical_to_uninterrupted(tmp_path, shards):
    whole = fit(tmp_path, shards)
    states = [read_checkpoint(whole / "checkpoints/last.ckpt")]
    for stop in (3, 8):  # in warm-up, in the taper
        every = f"{{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: {stop}, save_top_k: -1}}}}"
        part = fit(tmp_path, shards, f"--trainer.callbacks+={every}")
        middle = next((part / "checkpoints").glob(f"*step={stop}.ckpt"))
        again = fit(tmp_path, shards, "--ckpt_path", str(middle))
        states.append(read_checkpoint(again / "checkpoints/last.ckpt"))
        assert scalars(again)["train/loss"] == scalars(whole)["train/loss"][stop:]
    for state in states[1:]:
        assert state["global_step"] == 20
        for key, value in states[0]["state_dict"].items():
            assert torch.equal(value, state["state_dict"][key]), key


def test_layernorm_all_taper_with_a_tied_head(tmp_path, shards, capsys):
    run = fit(tmp_path, shards, "--config", str(CONFIGS / "taper/all_aux.yaml"), config="gpt2_124m_owt.yaml")
    ckpt = str(run / "checkpoints/last.ckpt")
    for how, count in (("untie", 5), ("scale", 4)):
        assert main(["fold", "--ckpt", ckpt, "--tied", how, "--out", str(tmp_path / how)]) == 0
        assert f"removed {count} norms" in capsys.readouterr().out
        model = load_model(tmp_path / how).model
        assert (model.head.weight is model.tok_embed.weight) == (how == "scale")
        with torch.no_grad():
            tokens = load_model(ckpt).sample[:, :-1].long()
            torch.testing.assert_close(model(tokens), load_model(ckpt).model(tokens), rtol=1e-3, atol=1e-4)


def test_what_goes_wrong_is_one_line(tmp_path, shards, capsys):
    run = fit(tmp_path, shards, "--taper.gate.end=20", "--trainer.max_steps=12", "--taper.gate.end=12")
    ckpt = str(run / "checkpoints/best.ckpt")  # of step 10: inside the taper
    assert "The gate is 0." in error_of(capsys, "fold", "--ckpt", ckpt)
    assert "no such checkpoint" in error_of(capsys, "fold", "--ckpt", str(tmp_path / "none.ckpt"))
    last = Path(run / "checkpoints/last.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:5000])
    assert "cut.ckpt is truncated" in error_of(capsys, "fold", "--ckpt", str(tmp_path / "cut.ckpt"))
    assert "cut.ckpt is truncated" in error_of(capsys, "generate", "--model", str(tmp_path / "cut.ckpt"), "--prompt=x")
    base = ["--config", str(run / "config.yaml")]
    assert "cut.ckpt is truncated" in error_of(capsys, "fit", *base, "--ckpt_path", str(tmp_path / "cut.ckpt"))
    (run / "checkpoints/last-folded").mkdir()
    assert "last-folded exists" in error_of(capsys, "fold", "--ckpt", str(last))
    assert "prompt has no tokens" in error_of(capsys, "generate", "--model", str(last), "--prompt=")
    assert "layers" in error_of(capsys, "fit", *base, "--model.layers=3", status=2)
    assert "nothing.yaml" in error_of(capsys, "fit", "--config", "nothing.yaml", status=2)
    (tmp_path / "wrong.yaml").write_text("trainer: {max_step: 3}\n")
    assert "max_step" in error_of(capsys, "fit", *base, "--config", str(tmp_path / "wrong.yaml"), status=2)
    assert "no file matches" in error_of(capsys, "fit", *base, "--data.files=/nowhere/*.txt")
    assert "longer than the run's" in error_of(capsys, "fit", *base, "--taper.gate.end=100")
    assert "lower warmup, or raise end" in error_of(capsys, "fit", *base, "--taper.gate.warmup=100")
    assert "No preset 'gpt9'" in error_of(capsys, "fit", *base, "--model.preset=gpt9")
    assert "set model.overrides.vocab_size to 305" in error_of(capsys, "fit", *base, "--data.vocab_size=305")
    evaluate = ["validate", *base, "--ckpt_path", ckpt]
    line = error_of(capsys, *evaluate, "--data.vocab_size=305")
    assert "set data.tokenizer to the tokenizer.json beside the checkpoint's run" in line
    assert main([*evaluate, "--data.vocab_size=305", f"--data.tokenizer={run / 'tokenizer.json'}"]) == 0
    assert "lower data.block_size to 32" in error_of(capsys, *evaluate, "--data.block_size=64")
    assert main([*evaluate, "--data.block_size=32"]) == 0
    assert "best is not looked for; name the file" in error_of(capsys, "fit", *base, "--ckpt_path=best")
    other = ["--data.vocab_size=290", "--ckpt_path", str(last)]
    assert "tokenizer" in error_of(capsys, "validate", *base, *other)
    other = ["--data.max_documents=50", "--data.tokenizer", str(run / "tokenizer.json"), "--ckpt_path", str(last)]
    assert "other training data" in error_of(capsys, "fit", *base, *other)
    assert "nonsense" in error_of(capsys, "fit", *base, "--trainer.strategy=nonsense")
    assert "there is no command 'train'" in error_of(capsys, "train", status=2)
    baseline = fit(tmp_path, shards, "--config", str(CONFIGS / "taper/baseline.yaml"), "--trainer.max_steps=10")
    plain = str(baseline / "checkpoints/last.ckpt")
    assert "has no tapered norms" in error_of(capsys, "fold", "--ckpt", plain)
    assert "taper/gate" not in scalars(baseline)
    assert scalars(baseline)["taper/logit_norm"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["file", "sharded", "metadata"])
def test_no_command_runs_the_code_in_a_checkpoint(tmp_path, shards, capsys, monkeypatch, form):
    path, ran = tmp_path / "evil.ckpt", tmp_path / "ran"
    content = {"state_dict": {}, "hyper_parameters": {"preset": Evil(ran)}, "taperlit": {"format": CHECKPOINT_FORMAT}}
    if form == "file":
        torch.save(content, path)
    else:
        path.mkdir()
        torch.save({} if form == "metadata" else content, path / "meta.pt")
        (path / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
        (path / ".metadata.sha256").write_text(digest(path))
    others = {
        "fold": ["--ckpt", str(path)],
        "generate": ["--model", str(path), "--prompt=x"],
        "stress": ["--model", str(path)],
        "export": ["--to=onnx", "--model", str(path)],
    }
    run = ["--config", str(CONFIGS / "pile_350m.yaml"), "--data.files", shards, "--ckpt_path", str(path)]
    for command in COMMANDS.keys() - {"bench", "report"}:  # one makes its own, the other is below
        args = others.get(command, run)
        assert "evil.ckpt" in error_of(capsys, command, *args), command
    # nor does --ckpt_path last, which finds it by itself
    checkpoints = tmp_path / "runs/run/version_0/checkpoints"
    checkpoints.mkdir(parents=True)
    path.rename(checkpoints / "last.ckpt")
    args = ["fit", "--config", str(CONFIGS / "pile_350m.yaml"), "--data.files", shards, *SMALL, "--ckpt_path=last"]
    args += [f"--trainer.logger.save_dir={tmp_path}/runs", "--trainer.logger.name=run"]
    assert "last.ckpt" in error_of(capsys, *args)
    # nor a report, which reads what it can of a run
    (checkpoints.parent / "config.yaml").write_text("model: {taper: none}\n")
    (checkpoints.parent / "metrics.csv").write_text("step,val/loss\n1,2.0\n")
    assert main(["report", str(checkpoints.parent)]) == 0
    # nor a job that SLURM started again, whose checkpoint Lightning looks for unasked
    (checkpoints / "last.ckpt").rename(tmp_path / "hpc_ckpt_1.ckpt")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "hpc_ckpt_1.ckpt" in error_of(capsys, *args[:-3], *args[-2:], f"--trainer.default_root_dir={tmp_path}")
    assert not ran.exists()


def test_last_goes_on_with_the_newest_run_or_says_why_not(tmp_path, shards, capsys):
    last = ["--ckpt_path", "last"]
    run = fit(tmp_path, shards, *last, "--trainer.max_steps=12", "--taper.gate.end=12")  # begins anew
    assert run.name == "version_0"
    again = fit(tmp_path, shards, *last, "--trainer.max_steps=20", "--taper.gate.end=12")
    assert again == run
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 20
    assert "ckpt_path: last" in (run / "config.resumed.yaml").read_text()
    assert "max_steps: 12" in (run / "config.yaml").read_text()  # the record of the run as it began
    capsys.readouterr()
    evaluate = ["validate", "--config", str(run / "config.yaml"), *last]
    assert main(evaluate) == 0
    printed = float(re.search(r"val/loss\W+([\d.]+)", capsys.readouterr().out)[1])
    assert printed == pytest.approx(scalars(run)["val/loss"][-1][1], rel=1e-5)
    nothing = ["--trainer.logger.init_args.name=nothing"]
    assert "no checkpoint yet" in error_of(capsys, *evaluate, *nothing)
    assert "--ckpt_path best" in error_of(capsys, *evaluate[:-1], "best")
    done = fit(tmp_path, shards, *last, "--taper.gate.end=12")  # it is at its end: nothing to do, and nothing harmed
    assert done == run
    assert read_checkpoint(done / "checkpoints/last.ckpt")["global_step"] == 20
    base = ["fit", "--config", str(CONFIGS / "pile_350m.yaml"), "--data.files", shards, *SMALL, "--taper.gate.end=12"]
    base += last
    here = [f"--trainer.logger.save_dir={tmp_path}/runs", "--trainer.logger.name=run"]
    assert "of another model" in error_of(capsys, *base, *here, "--model.taper=all")
    assert "had 4 blocks a batch" in error_of(capsys, *base, *here, "--data.batch_size=8", "--trainer.max_steps=30")
    csv = ["--trainer.logger", f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"]
    assert "CSVLogger begins a new folder" in error_of(capsys, *base, *csv)
    assert "leaves the output folder" in error_of(capsys, *base, *here[:1], "--trainer.logger.name=../elsewhere")
    keep = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {filename: ../../x}}"
    assert "leaves the output folder" in error_of(capsys, *base, *here, keep)
    assert not (tmp_path / "elsewhere").exists()


def test_help_does_not_import_torch():
    code = "import sys; from taperlit.cli import main; main(['--help']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    assert all(re.search(rf"^  {command} +\w", result.stdout, re.M) for command in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - {"bench"}), *(f"bench {what}" for what in BENCHES)])
def test_print_config(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--print_config"])
    assert exit.value.code == 0
    assert ("ckpt_path" if command in ("fit", "validate", "test", "predict") else ":") in capsys.readouterr().out


@pytest.mark.slow
def test_tools_report_and_draw_a_run(tmp_path, shards, capsys):
    run = fit(tmp_path, shards)
    assert main(["fold", "--ckpt", str(run / "checkpoints/last.ckpt")]) == 0

    def tool(name, *args):
        command = [sys.executable, str(CONFIGS.parent / "tools" / name), *map(str, args)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    capsys.readouterr()
    assert main(["report", str(run), "--measure"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"gate +1 -> 0\n", report)
    assert len(re.findall(r"\d tokens/s", report)) == 2
    assert float(re.search(r"largest logit difference +(\S+)", report)[1]) < 1e-4
    tool("plot_traces.py", run, tmp_path / "traces.png")
    assert (tmp_path / "traces.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path, shards):
    one = scalars(fit(tmp_path, shards))
    options = ["--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-m", "taperlit", *fit_command(tmp_path, shards, *options)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)  # and the second process, which it begins
    two = scalars(versions(tmp_path)[-1])
    for tag in ("val/loss", "val/perplexity", "taper/pre_logit_rms", "train/grad_norm"):
        rel = 0.05 if tag == "taper/pre_logit_rms" else 1e-3  # the first is rank 0's own
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]], rel=rel), tag
    for tag in [tag for tag in one if tag.startswith("taper/alignment/")]:
        assert two[tag][-1][1] == pytest.approx(one[tag][-1][1], rel=1e-4)
    assert two["train/tokens"] == one["train/tokens"]
