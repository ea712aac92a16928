"""Which checkpoint a run goes on with, what evaluation leaves behind, and what a resumed run does differently."""

import functools
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from processes import differences, scalars
from small import error_of, fit, fit_command, versions

from taperlit.checkpoint.reader import read_checkpoint
from taperlit.cli import main
from taperlit.schedule import gate_at, warmup_cosine
from taperlit.training.module import LanguageModel
from taperlit.training.trainer import Trainer

LAST = ["--ckpt_path", "last"]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j}" for j in range(10)]
        (folder / f"{i:02}.txt").write_text("\n".join(lines))
    return str(folder / "*.txt")


def state_of(run):
    checkpoint = read_checkpoint(run / "checkpoints/last.ckpt")
    return {key: checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def test_evaluation_leaves_no_run_folder_and_last_is_the_newest_with_a_checkpoint(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(tmp_path, text, "--trainer.max_steps=10")
    before = sorted(tmp_path.rglob("*"))
    for command in ("validate", "test", "predict"):
        for which in ("last", str(run / "checkpoints/last.ckpt")):
            assert main([command, "--config", str(run / "config.yaml"), "--ckpt_path", which]) == 0
    predictions = run / "checkpoints/last-predictions.jsonl"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, predictions])
    assert len(predictions.read_text().splitlines()) > 10

    # what a run left that was killed before its first checkpoint
    (tmp_path / "runs/run/version_7").mkdir()
    assert fit(tmp_path, text, *LAST).name == "version_7"
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 20
    assert [(step, gate) for step, gate in scalars(run)["taper/gate"]] == [
        (step, pytest.approx(gate_at(step + 1, 5, 10), abs=1e-6)) for step in range(20)
    ]

    # a newer run of which only the best is left is not passed over in silence
    newer = tmp_path / "runs/run/version_7/checkpoints"
    newer.mkdir()
    shutil.copy(run / "checkpoints/best.ckpt", newer)
    assert "has no last.ckpt, only best.ckpt" in error_of(capsys, *fit_command(tmp_path, text, *LAST))
    assert "validate needs --ckpt_path" in error_of(capsys, "validate", "--config", str(run / "config.yaml"))


def test_a_run_without_any_checkpoint_begins_in_its_folder(tmp_path, text):
    (tmp_path / "runs/run/version_3").mkdir(parents=True)
    fit(tmp_path, text, *LAST, "--trainer.max_steps=10")
    assert [path.name for path in versions(tmp_path)] == ["version_3"]


def learning_rates(run):
    return dict(scalars(run)["train/lr"])


def test_what_is_given_on_resume_is_applied_from_the_next_step_on(tmp_path, text, caplog):
    begin = ["--model.lr=1e-3", "--model.warmup=4", "--model.decay_start=0", "--trainer.max_steps=10"]
    run = fit(tmp_path, text, *begin)
    for step, lr in learning_rates(run).items():
        assert lr == pytest.approx(1e-3 * warmup_cosine(step, 4, 10, 0.1), rel=1e-5)
    saved = read_checkpoint(run / "checkpoints/last.ckpt")["optimizer_states"][0]
    given = ["--model.lr=2e-4", "--model.warmup=12", "--model.min_lr_ratio=0.5", "--model.weight_decay=0.3",
             "--model.betas=[0.8,0.9]", "--model.chunk_tokens=64", "--model.decay_start=13",
             "--trainer.gradient_clip_val=0.7", "--trainer.max_steps=16"]  # fmt: skip
    caplog.clear()
    assert fit(tmp_path, text, *begin[:-1], *LAST, *given) == run
    rates = learning_rates(run)
    assert [step for step in rates if step >= 10] == [*range(10, 16)]
    for step in range(10, 16):
        assert rates[step] == pytest.approx(2e-4 * warmup_cosine(step, 12, 16, 0.5, 13), rel=1e-5)
    decay, keep = read_checkpoint(run / "checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    assert tuple(decay["betas"]) == tuple(keep["betas"]) == (0.8, 0.9)
    assert [group["params"] for group in (decay, keep)] == [group["params"] for group in saved["param_groups"]]
    (told,) = [record.message for record in caplog.records if record.message.startswith("From step 11 on: ")]
    for option in ("lr 0.0002 (before: 0.001)", "warmup 12", "min_lr_ratio", "decay_start 13", "weight_decay", "betas",
                   "chunk_tokens"):  # fmt: skip
        assert f"model.{option}" in told
    assert "trainer.gradient_clip_val 0.7 (before: " in told
    assert "trainer.max_steps 16 (before: 10), and the gate keeps its steps" in told


def test_slots_that_are_turned_or_changed_on_resume_are_told(tmp_path, text, caplog, capsys):
    stored = ["--taper.hold.latest=10", "--taper.massive.begin=1", "--taper.massive.end=3"]
    run = fit(tmp_path, text, "--taper.tail=true", "--taper.decay=true", *stored, "--trainer.max_steps=10")
    for option, began in (
        ("hold.back", "0.1"),
        ("hold.latest", "10"),
        ("massive.multiple", "4.0"),
        ("massive.end", "3"),
    ):
        line = error_of(capsys, *fit_command(tmp_path, text, *LAST, *stored, f"--taper.{option}=12"))
        assert f"--taper.{option} is 12" in line
        assert f" began with {began}, which cannot change under way" in line
    caplog.clear()
    given = ["--taper.tail=TailPenalty", "--taper.tail.weight=0.5", "--taper.lr_dip=true", "--taper.monitor.every=3"]
    given += [*stored, "--taper.hold.band=9", "--taper.massive=false"]
    fit(tmp_path, text, *LAST, *given, "--taper.anchor.fade=15", "--trainer.max_steps=20")
    (told,) = [record.message for record in caplog.records if record.message.startswith("From step 11 on: ")]
    for change in ("taper.tail.weight 0.5 (before: 1.0)", "taper.lr_dip on (before: off)", "taper.monitor.every 3 (",
                   "taper.anchor.fade 15 (before: 0.5)", "taper.decay off (before: on)", "taper.hold.band 9",
                   "taper.massive off (before: on)"):  # fmt: skip
        assert change in told
    saved = read_checkpoint(run / "checkpoints/last.ckpt")
    assert "LearningRateDip" in saved["callbacks"]
    assert saved["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1
    caplog.clear()
    fit(tmp_path, text, *LAST, *given, "--taper.anchor.fade=15", "--trainer.max_steps=22")
    (told,) = [record.message for record in caplog.records if record.message.startswith("From step 21 on: ")]
    assert "taper." not in told


def test_a_path_is_resumed_with_what_is_given_too(tmp_path, text):
    run = fit(tmp_path, text, "--model.lr=1e-3", "--trainer.max_steps=10")
    given = ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--model.lr=2e-4", "--model.decay_start=0"]
    again = fit(tmp_path, text, *given)
    assert again.name == "version_1"
    for step in range(10, 20):
        assert learning_rates(again)[step] == pytest.approx(2e-4 * warmup_cosine(step, 1, 20, 0.1), rel=1e-5)


def test_unchanged_options_change_no_bit(tmp_path, text):
    whole = fit(tmp_path / "whole", text)
    every = (
        f"{{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: 7, save_top_k: -1, dirpath: {tmp_path}}}}}"
    )
    part = fit(tmp_path / "parts", text, "--trainer.callbacks+", every)
    again = fit(tmp_path / "parts", text, "--ckpt_path", str(next(tmp_path.glob("*step=7.ckpt"))))
    assert part != again
    assert differences(state_of(whole), state_of(again)) == []


def test_a_checkpoint_from_between_two_batches_of_a_step_is_told(tmp_path, text, caplog):
    every = f"{{class_path: RunCheckpoint, init_args: {{save_top_k: -1, filename: '{{step}}', dirpath: {tmp_path}}}}}"
    given = ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=10", "--trainer.max_steps=12"]
    given += ["--trainer.enable_model_summary=true"]
    fit(tmp_path, text, *given, "--trainer.callbacks+", every)
    caplog.clear()
    fit(tmp_path, text, *given, "--ckpt_path", str(tmp_path / "step=2.ckpt"))  # after 2 of its 4 batches
    (told,) = [record.message for record in caplog.records if record.message.startswith("From step 3 on: ")]
    assert "one step over 2 batches, not 4: the checkpoint is from between two of them" in told
    assert re.search(r"steps +12\n.*\nval/loss +\d\.\d+ \(step 10\)", caplog.text)  # validated after batch 40 of 48
    caplog.clear()
    fit(tmp_path, text, *given, "--ckpt_path", str(tmp_path / "step=5.ckpt"))
    assert not [record.message for record in caplog.records if record.message.startswith("From step ")]


def test_a_run_of_before_an_option_goes_on_with_its_default(tmp_path, text, capsys):
    run = fit(tmp_path, text, "--trainer.max_steps=10")
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    taper = checkpoint["callbacks"]["RunRecord"]["config"]["taper"]
    del taper["gate"]["init_args"]["stages"], taper["alignment"]["init_args"]["moments"]
    torch.save(checkpoint, path)
    staged = fit_command(tmp_path, text, *LAST, "--taper.gate.stages=depth")
    assert "taper.gate.stages is depth" in error_of(capsys, *staged)
    assert fit(tmp_path, text, *LAST) == run
    assert read_checkpoint(path)["global_step"] == 20


def test_what_cannot_change_is_refused_by_name(tmp_path, text, capsys):
    run = fit(tmp_path, text, "--trainer.max_steps=10")
    command = fit_command(tmp_path, text, *LAST)
    for option, value, word in (
        ("model.taper", "all", "taper internal, not all"),
        ("model.overrides.d_ff", "128", "d_ff 64, not 128"),
        ("model.preset", "gpt2_124m", "norm rmsnorm, not layernorm"),
        ("taper.gate.warmup", "0.3", "--taper.gate.warmup is 0.3 .* began with 5"),
        ("taper.gate.end", "0.9", "--taper.gate.end is 0.9 .* began with 10"),
        ("taper.gate.shape", "linear", "--taper.gate.shape is linear .* began with cosine"),
        ("taper.alignment.at", "3", "--taper.alignment.at is 3 .* began with None"),
        ("taper.ema_rate", "0.2", "--taper.alignment.ema_rate is 0.2 .* began with 0.01"),
        ("trainer.accumulate_grad_batches", "3", "--trainer.accumulate_grad_batches is 3 .* began with 1"),
        ("data.block_size", "16", r"had data\.block_size 32, not 16; resume it with that"),
    ):
        line = error_of(capsys, *command, f"--{option}={value}")
        assert re.search(word, line), (option, line)
    split = [f"--data.tokenizer={run / 'tokenizer.json'}", "--data.val_fraction=0.3"]
    assert re.search(
        r"had data\.val_fraction 0\.\d+, not 0\.3; resume it with that", error_of(capsys, *command, *split)
    )
    named = fit_command(tmp_path, text, "--ckpt_path", str(run / "checkpoints/last.ckpt"))
    for option, word in (("model.taper=all", "taper internal, not all"), ("taper.gate.end=0.9", "began with 10")):
        assert word in error_of(capsys, *named, f"--{option}")
    assert [path.name for path in versions(tmp_path)] == ["version_0"]
    # the scale loss may be weighted otherwise, and left out
    fit(tmp_path, text, *LAST, "--taper.anchor.weight=0.5", "--trainer.max_steps=12")
    fit(tmp_path, text, *LAST, "--taper.anchor=false", "--trainer.max_steps=14")
    assert [step for step, _ in scalars(run)["train/scale_loss"]][-1] == 11


def test_the_saved_config_lists_what_ran_and_runs_again(tmp_path, text, monkeypatch):
    ran, original = [], Trainer.fit

    @functools.wraps(original)
    def watched(self, *args, **options):
        ran.append(self.callbacks)
        return original(self, *args, **options)

    monkeypatch.setattr(Trainer, "fit", watched)
    run = fit(tmp_path, text, "--taper.fold=null", "--taper.ema_rate=0.02")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    named = [callback["class_path"] for callback in saved["trainer"]["callbacks"]]
    named += [saved["taper"][slot]["class_path"] for slot in saved["taper"] if isinstance(saved["taper"][slot], dict)]
    assert saved["taper"]["fold"] is None
    classes = sorted(type(callback).__name__ for callback in ran[0])
    assert classes == sorted([*(name.rpartition(".")[2] for name in named), "RunRecord"])
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    again = versions(tmp_path)[-1]
    assert again != run
    assert sorted(type(callback).__name__ for callback in ran[1]) == classes
    assert yaml.safe_load((again / "config.yaml").read_text()) == saved
    assert differences(state_of(run), state_of(again)) == []


def killing(monkeypatch, method, at):
    """SIGTERM in the given call of a method of the module."""
    original, calls = getattr(LanguageModel, method), []

    def step(self, *args):
        calls.append(self.trainer.global_step)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(LanguageModel, method, step)
    return calls


def test_sigterm_in_validation_stops_after_one_batch_and_the_pass_is_done_again(tmp_path, text, capsys):
    whole = fit(tmp_path / "whole", text)
    batches = len(scalars(whole)["val/loss"])
    assert batches == 2
    for name, at in (("first", 4), ("last", None)):  # after step 10, and after the last step
        home = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            calls = killing(patch, "validation_step", 0)
            if at is None:
                fit(tmp_path / "count", text)
                at = calls.index(20) + 2  # the last pass's second batch
                calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            calls = killing(patch, "validation_step", at)
            line = error_of(capsys, *fit_command(home, text), status=143)
            assert line == "taperlit: error: stopped by SIGTERM; go on with --ckpt_path last."
            assert len(calls) == at
        (run,) = versions(home)
        assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == (10 if name == "first" else 20)
        assert fit(home, text, *LAST) == run
        assert differences(state_of(whole), state_of(run)) == []
        for tag in ("val/loss", "train/loss", "train/lr", "taper/gate"):
            assert scalars(run)[tag] == scalars(whole)[tag], tag
        both = [read_checkpoint(path / "checkpoints/best.ckpt") for path in (whole, run)]
        assert differences(*[b["state_dict"] for b in both]) == []
        assert (run / "folded/config.json").exists()


def test_sigterm_in_a_step_before_validation_or_at_the_end_costs_neither(tmp_path, text, capsys):
    whole = fit(tmp_path / "whole", text)
    for at, status in ((10, 143), (13, 143), (20, 143)):
        home = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, "training_step", at)
            assert main(fit_command(home, text)) == status
        (run,) = versions(home)
        assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == at
        fit(home, text, *LAST)
        assert differences(state_of(whole), state_of(run)) == []
        assert scalars(run)["val/loss"] == scalars(whole)["val/loss"]
        assert (run / "folded/config.json").exists()
    # no validation comes after the last step: the run just ends
    with pytest.MonkeyPatch.context() as patch:
        killing(patch, "training_step", 20)
        run = fit(tmp_path / "end", text, "--trainer.val_check_interval=15")
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 20
    assert (run / "folded/config.json").exists()


def test_sigterm_in_the_sanity_check_has_nothing_to_save(tmp_path, text, capsys, monkeypatch):
    calls = killing(monkeypatch, "validation_step", 1)
    line = error_of(capsys, *fit_command(tmp_path, text), status=143)
    assert line == "taperlit: error: stopped by SIGTERM before a last.ckpt was saved; start it again."
    assert calls == [0]
