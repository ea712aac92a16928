"""Runs that are killed, told to stop, moved, or out of disk: nothing saved is lost, and they go on as the same run."""

import functools
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from processes import FSDP2, Run, differences, fit_args, scalars

from taperlit.checkpoint.folded import load_model
from taperlit.checkpoint.reader import open_checkpoint, read_checkpoint
from taperlit.cli import main

pytestmark = pytest.mark.slow
TWO_FSDP2 = ["--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy", FSDP2, "--taper.monitor.every=12"]
TWO_DDP = ["--trainer.devices=2", "--data.batch_size=2", "--trainer.strategy=ddp"]
ONE_FILE = [*TWO_FSDP2, "--trainer.strategy.init_args.save_distributed_checkpoint=false"]
RESUME = ["--ckpt_path", "last"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus and a token cache for all runs here."""
    folder = tmp_path_factory.mktemp("recovery")
    write_corpus(folder / "corpus")
    return folder


def start(home, name, *extra, ranks=1, setup=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        return Run(fit_args(home, home / "corpus", *extra, name=name), home, ranks, setup)


def last(home, name):
    return home / name / "version_0/checkpoints/last.ckpt"


def content(path):
    """All of a checkpoint that says what the run is; not the clock, and not where its folder lies."""
    checkpoint = read_checkpoint(path)
    del checkpoint["callbacks"]["RunRecord"]  # its config names the folder
    keys = [key for key in checkpoint["callbacks"] if key.startswith("RunCheckpoint")]
    for key in keys:
        state = checkpoint["callbacks"][key]
        checkpoint["callbacks"][key] = {k: v for k, v in state.items() if k in ("best_model_score", "current_score")}
    return checkpoint


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing disturbed."""
    start(home, "whole").succeed()
    return content(last(home, "whole"))


@pytest.fixture(scope="module")
def sharded_whole(home):
    """The same on two processes, with checkpoints that are directories."""
    start(home, "sharded whole", *TWO_FSDP2, ranks=2).succeed()
    return last(home, "sharded whole")


def die_at_step(step, rank):
    """Kill -9 when the given optimizer step begins."""
    from taperlit.callbacks import GateSchedule

    begin = GateSchedule.on_train_batch_start

    def hook(self, trainer, *args):
        if trainer.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self, trainer, *args)

    GateSchedule.on_train_batch_start = hook


def test_killed_at_any_step_it_ends_bit_identical(home, whole):
    draw = random.Random(int(os.environ.get("TAPERLIT_TEST_SEED", "0")))
    # inside the warm-up (before any checkpoint, and after), at the boundary, in the taper, at its end, after it
    steps = [draw.randint(2, 4), draw.randint(5, 8), 9, draw.randint(10, 15), 16, draw.randint(17, 24)]
    for step in steps:
        killed = start(home, "killed", *RESUME, setup=functools.partial(die_at_step, step))
        assert killed.wait() == [-signal.SIGKILL], (step, killed.log.read_text())
    start(home, "killed", *RESUME).succeed()
    assert os.listdir(home / "killed") == ["version_0"]  # it was one run all along
    assert differences(whole, content(last(home, "killed"))) == []
    logged, expected = (scalars(home / name / "version_0") for name in ("killed", "whole"))
    for tag in ("train/loss", "taper/gate", "val/loss", "train/lr", "epoch"):  # a step run twice is there once
        assert logged[tag] == expected[tag], tag


def die_while_saving(moment, skip, rank):
    """Kill -9 in the middle of writing a ``last.ckpt``, after letting some be written."""
    import taperlit.checkpoint.atomic as files
    import taperlit.training.trainer as trainer

    count = iter(range(100))

    def die(path):
        return Path(path).name.strip(".").startswith("last.ckpt") and next(count) >= skip

    def now():
        os.kill(os.getpid(), signal.SIGKILL)

    save, sync, rename, replace = torch.save, files._sync, Path.rename, Path.replace
    if moment == "half":

        def half(data, file, **options):
            save(data, file, **options)
            path = file if isinstance(file, Path) else Path(str(getattr(file, "name", "")))
            if path.exists() and die(path.parent if path.name == "meta.pt" else path):
                if hasattr(file, "flush"):
                    file.flush()
                os.truncate(path, path.stat().st_size // 2)
                now()

        trainer.torch.save = half
    elif moment == "unsynced":
        files._sync = lambda path: now() if die(path) else sync(path)
    elif moment == "unnamed":

        def before(self, target):
            if die(target):
                now()
            return (rename if self.is_dir() else replace)(self, target)

        Path.rename = Path.replace = before
    elif moment == "named":

        def after(self, target):
            result = (rename if self.is_dir() else replace)(self, target)
            if die(target):
                now()
            return result

        Path.rename = Path.replace = after


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "directory"])
def test_killed_while_saving_nothing_saved_is_lost(home, sharded, request):
    name = f"saving {sharded}"
    ranks, extra = (2, TWO_FSDP2) if sharded else (1, [])
    path, reached = last(home, name), 0
    for moment in ("half", "unsynced", "unnamed", "named"):
        # a few checkpoints later each time; a directory takes two renames, and each of them is a moment to die
        for skip in (1, 2) if sharded and moment in ("unnamed", "named") else (1,):
            run = start(
                home, name, *extra, *RESUME, ranks=ranks, setup=functools.partial(die_while_saving, moment, skip)
            )
            run.processes[0].join()
            run.kill()
            assert run.processes[0].exitcode == -signal.SIGKILL, (moment, run.log.read_text()[-3000:])
            step = open_checkpoint(path)["global_step"]  # every byte of it is checked
            assert step >= reached, moment
            reached = step
    assert 0 < reached < 24
    start(home, name, *extra, *RESUME, ranks=ranks).succeed()
    assert not list(path.parent.glob(".*"))  # no debris
    whole = content(request.getfixturevalue("sharded_whole")) if sharded else request.getfixturevalue("whole")
    assert differences(whole, content(path)) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_in_one_line(home, whole, ranks):
    name = f"terminated {ranks}"
    extra = TWO_DDP if ranks == 2 else []

    def logged():
        return list(home.glob(f"{name}/version_0/checkpoints/best.ckpt"))

    run = start(home, name, *extra, "--trainer.val_check_interval=7", ranks=ranks, setup=slowly)
    while not logged():
        assert run.processes[0].is_alive(), run.log.read_text()
        time.sleep(0.05)
    os.kill(run.processes[-1].pid, signal.SIGTERM)  # of two, only the second is told
    assert run.wait() == [143] * ranks, run.log.read_text()
    assert run.errors() == ["taperlit: error: stopped by SIGTERM; go on with --ckpt_path last."]
    assert "Traceback" not in run.log.read_text()
    stopped = read_checkpoint(last(home, name))["global_step"]
    assert 7 <= stopped < 24
    start(home, name, *extra, "--trainer.val_check_interval=7", *RESUME, ranks=ranks).succeed()
    final = content(last(home, name))
    assert final["global_step"] == 24
    if ranks == 1:
        assert differences(whole["state_dict"], final["state_dict"]) == []
        assert differences(whole["optimizer_states"], final["optimizer_states"]) == []


def interrupted_at(step, rank):
    """Ctrl-C, which a terminal sends to all processes, when the given optimizer step begins."""
    from taperlit.callbacks import GateSchedule

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    begin = GateSchedule.on_train_batch_start

    def hook(self, trainer, *args):
        if trainer.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        begin(self, trainer, *args)

    GateSchedule.on_train_batch_start = hook


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_names_the_command_that_goes_on(home, whole, ranks):
    name = f"interrupted {ranks}"
    # every step is saved, in the background
    timed = ["--trainer.callbacks+=taperlit.RunCheckpoint", "--trainer.callbacks.minutes=1e-9"]
    extra = [*(TWO_DDP if ranks == 2 else []), *timed]
    run = start(home, name, *extra, ranks=ranks, setup=functools.partial(interrupted_at, 11))
    assert run.wait() == [130] * ranks, run.log.read_text()
    (line,) = run.errors()
    assert line.startswith("taperlit: error: interrupted, and last.ckpt is saved; go on with: taperlit fit --config ")
    assert "Traceback" not in run.log.read_text()
    assert read_checkpoint(last(home, name))["global_step"] == 11
    if ranks == 2:
        return  # on one it is bit-identical
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        Run(shlex.split(line.partition(" taperlit ")[2]), home, ranks).succeed()
    assert differences(whole, content(last(home, name))) == []
    assert not list(last(home, name).parent.glob(".*"))
    logged, expected = (scalars(home / n / "version_0") for n in (name, "whole"))
    for tag in expected.keys() - {"train/tokens_per_s"}:
        assert logged[tag] == expected[tag], tag  # each step once


def terminated_in_validation(at, log, rank):
    """SIGTERM to the second process in the second batch of the validation after a step; 0 is the sanity check."""
    from taperlit.training.module import LanguageModel

    validate, batches = LanguageModel.validation_step, []

    def step(self, *args):
        if self.trainer.global_step == at:
            batches.append(at)
            Path(f"{log}.{rank}").write_text(str(len(batches)))
            if len(batches) == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        validate(self, *args)

    LanguageModel.validation_step = step


@pytest.mark.parametrize("at", [0, 8, 24])
def test_sigterm_in_validation_stops_at_the_batch_and_the_pass_is_done_again(home, whole, at):
    """On two processes, of which the second is told; on one, see test_resume."""
    name = f"terminated in validation {at}"
    extra = [*TWO_DDP, "--trainer.num_sanity_val_steps=-1"]
    setup = functools.partial(terminated_in_validation, at, home / name)
    run = start(home, name, *extra, ranks=2, setup=setup)
    assert run.wait() == [143, 143], run.log.read_text()
    assert [(home / f"{name}.{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    (line,) = run.errors()
    if at == 0:
        assert line == "taperlit: error: stopped by SIGTERM before a last.ckpt was saved; start it again."
    else:
        assert line == "taperlit: error: stopped by SIGTERM; go on with --ckpt_path last."
        assert read_checkpoint(last(home, name))["global_step"] == at
    start(home, name, *extra, *RESUME, ranks=2).succeed()
    assert os.listdir(home / name) == ["version_0"]
    assert (home / name / "version_0/folded/config.json").exists()
    logged, expected = (scalars(home / n / "version_0")["val/loss"] for n in (name, "whole"))
    assert [step for step, _ in logged] == [step for step, _ in expected]
    assert [loss for _, loss in logged] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def slowly(rank):
    """A step takes at least 50 ms, so that a signal comes before the run's end."""
    from taperlit.callbacks import GateSchedule

    begin = GateSchedule.on_train_batch_start

    def hook(self, *args):
        time.sleep(0.05)
        begin(self, *args)

    GateSchedule.on_train_batch_start = hook


MOVES = {
    "two DDP processes to one": (TWO_DDP, 2, [], 1),
    "two FSDP2 processes to one": (TWO_FSDP2, 2, [], 1),
    "one process to two FSDP2": ([], 1, TWO_FSDP2, 2),
    "two FSDP2 processes to two DDP": (TWO_FSDP2, 2, TWO_DDP, 2),
    "two FSDP2 processes, in one file, to one": (ONE_FILE, 2, [], 1),
    "two FSDP2 processes, in one file, to two": (ONE_FILE, 2, ONE_FILE, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_moves(home, whole, move):
    before, ranks_before, after, ranks_after = MOVES[move]
    killed = start(home, move, *before, ranks=ranks_before, setup=functools.partial(die_at_step, 14))
    killed.processes[0].join()
    killed.kill()
    assert open_checkpoint(last(home, move))["global_step"] == 12
    start(home, move, *after, *RESUME, ranks=ranks_after).succeed()
    final = content(last(home, move))
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(final["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    expected = [v for _, v in scalars(home / "whole/version_0")["train/loss"]]
    resumed = [v for _, v in scalars(home / move / "version_0")["train/loss"]]
    assert resumed[-12:] == pytest.approx(expected[12:], rel=1e-5)


def test_fold_takes_each_form(home, whole, sharded_whole, capsys):
    outputs = {}
    for form, ckpt in {"file": last(home, "whole"), "directory": sharded_whole}.items():
        assert ckpt.is_dir() == (form == "directory")
        assert main(["fold", "--ckpt", str(ckpt), "--out", str(home / f"folded {form}")]) == 0
        outputs[form] = load_model(home / f"folded {form}").model
    tokens = load_model(last(home, "whole")).sample[:, :-1].long()
    with torch.no_grad():
        torch.testing.assert_close(outputs["file"](tokens), outputs["directory"](tokens), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            outputs["file"](tokens), load_model(last(home, "whole")).model(tokens), rtol=1e-3, atol=1e-4
        )
    for command in ("validate", "predict"):
        args = fit_args(home, home / "corpus", "--ckpt_path", str(sharded_whole), name="evaluated")
        drop = ("--taper.gate",)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
            assert main([command, *(arg for arg in args[1:] if not arg.startswith(drop))]) == 0


def fill_the_disk(limit, step, rank):
    """From a step on, no file may grow beyond the limit: writes then fail as on a full disk."""
    from taperlit.callbacks import GateSchedule

    begin = GateSchedule.on_train_batch_start

    def hook(self, trainer, *args):
        if trainer.global_step + 1 == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        begin(self, trainer, *args)

    GateSchedule.on_train_batch_start = hook


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_with_one_line(home, ranks):
    name = f"full {ranks}"
    extra = TWO_FSDP2 if ranks == 2 else []
    run = start(home, name, *extra, ranks=ranks, setup=functools.partial(fill_the_disk, 150_000, 10))
    assert run.wait() == [1] * ranks, run.log.read_text()
    (line,) = run.errors()
    assert re.search(r"(best|last)\.ckpt cannot be written: .*What was saved before is intact", line), line
    assert "Traceback" not in run.log.read_text()
    assert open_checkpoint(last(home, name))["global_step"] == 8
    assert not list(last(home, name).parent.glob(".*.partial"))
    start(home, name, *extra, *RESUME, ranks=ranks).succeed()


def test_a_damaged_last_checkpoint_is_named(home, whole):
    shutil.copytree(home / "whole", home / "damaged")
    path = last(home, "damaged")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = start(home, "damaged", *RESUME)
    assert run.wait() == [1]
    (line,) = run.errors()
    assert str(path) in line
    assert "damaged" in line
