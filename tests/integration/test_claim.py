"""A run's folder belongs to one process at a time."""

import os
import signal
import time
from pathlib import Path

import lightning as L
import pytest
from filelock import FileLock
from lightning.pytorch.loggers import TensorBoardLogger
from processes import Run, fit_args
from small import error_of, fit, fit_command, versions

from taperlit.cli.claim import LOCK, claimed_folder
from taperlit.errors import TaperlitError


@pytest.fixture
def text(corpus):
    return f"{corpus}/*.py"


@pytest.mark.slow
def test_runs_that_begin_together_have_folders_of_their_own(tmp_path, corpus):
    args = fit_args(tmp_path / "runs", corpus, "--trainer.max_steps=12", "--taper.gate.warmup=4", "--taper.gate.end=8")
    together = [Run(args, tmp_path) for _ in range(3)]
    for run in together:
        run.succeed()
    for number in range(3):
        folder = tmp_path / f"runs/run/version_{number}"
        assert (folder / "checkpoints/last.ckpt").exists()
        assert len(list(folder.glob("events.*"))) == 1
        assert not (folder / LOCK).exists()
    assert not (tmp_path / "runs/run/version_3").exists()


def test_of_two_that_go_on_with_one_run_one_does(tmp_path, text, capsys):
    folder = fit(tmp_path, text)
    before = (folder / "checkpoints/last.ckpt").read_bytes()
    with FileLock(folder / LOCK):
        line = error_of(capsys, *fit_command(tmp_path, text, "--ckpt_path=last", "--trainer.max_steps=30"))
        assert "version_0 is being written by another run; wait until it has ended, or stop it" in line
        assert (folder / "checkpoints/last.ckpt").read_bytes() == before
    fit(tmp_path, text, "--ckpt_path=last", "--trainer.max_steps=30")
    assert versions(tmp_path) == [folder]


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock(tmp_path, corpus):
    args = fit_args(tmp_path / "runs", corpus, "--trainer.max_steps=1000", "--ckpt_path=last")
    run = Run(args, tmp_path)
    last = tmp_path / "runs/run/version_0/checkpoints/last.ckpt"
    while not last.exists():
        time.sleep(0.1)
        assert run.processes[0].is_alive(), run.log.read_text()
    assert (last.parents[1] / LOCK).exists()
    os.kill(run.processes[0].pid, signal.SIGKILL)
    run.wait()
    Run([*args, "--trainer.max_steps=1"], tmp_path).wait()
    assert not (last.parents[1] / LOCK).exists()
    assert not (tmp_path / "runs/run/version_1").exists()


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path, capsys):
    assert "no file matches" in error_of(capsys, *fit_command(tmp_path, str(tmp_path / "nothing/*")))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    assert "no file matches" in error_of(capsys, *fit_command(tmp_path, str(tmp_path / "nothing/*")))
    assert list((tmp_path / "runs").iterdir()) == []  # which was there before, and stays


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.batch_size=100000", "less than one batch of 100000"),
        ("--taper.gate.end=100000", "longer than the run's"),
    ],
)
def test_a_run_that_is_refused_after_its_loggers_have_begun_leaves_no_folder(tmp_path, text, capsys, option, words):
    assert words in error_of(capsys, *fit_command(tmp_path, text, option))
    assert not (tmp_path / "runs").exists()
    folder = fit(tmp_path, text)
    before = sorted(tmp_path.rglob("*"))
    assert words in error_of(capsys, *fit_command(tmp_path, text, option))
    assert versions(tmp_path) == [folder]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_fails_in_its_first_batch_keeps_what_it_logged(tmp_path, text, capsys):
    assert "is not finite" in error_of(capsys, *fit_command(tmp_path, text, "--model.lr=1e30"))
    (folder,) = versions(tmp_path)
    assert (folder / "config.yaml").exists()


def claim(root, version=None):
    logger = TensorBoardLogger(str(root), name="a/b", version=version)
    trainer = L.Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    return logger, claimed_folder(trainer)


@pytest.mark.parametrize("there", ["", "runs", "runs/a", "runs/a/b", "runs/a/b/version_7"])
def test_only_folders_that_the_run_made_go_and_only_where_they_are_empty(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    logger, held = claim(tmp_path / "runs", version=7 if there.endswith("7") else None)
    with held:
        assert (Path(logger.log_dir) / LOCK).exists()
    assert sorted(tmp_path.rglob("*")) == before
    logger, held = claim(tmp_path / "runs")
    with held:
        (Path(logger.log_dir).parent / "kept").touch()
    assert (tmp_path / "runs/a/b/kept").exists()
    assert not Path(logger.log_dir).exists()


def test_a_file_in_the_folders_place_is_told_and_nothing_is_left(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a").touch()
    with pytest.raises(TaperlitError, match=r"runs/a.* cannot be written: "), claim(tmp_path / "runs")[1]:
        pass
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs/a"]


@pytest.mark.parametrize("option", ["version=../../x", "sub_dir=../../../x"])
def test_no_part_of_a_loggers_folder_leaves_the_output_folder(tmp_path, text, capsys, option):
    line = error_of(capsys, *fit_command(tmp_path, text, f"--trainer.logger.{option}"))
    assert "leaves the output folder" in line
    assert not (tmp_path / "x").exists()


def test_without_a_logger_the_root_is_held(tmp_path, text, capsys):
    args = fit_command(tmp_path, text)
    args = [word for word in args if not word.startswith("--trainer.logger")]
    args += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}/root", "--taper.monitor=null"]
    (tmp_path / "root").mkdir()
    with FileLock(tmp_path / "root" / LOCK):
        assert "is being written by another run" in error_of(capsys, *args)
