"""``last.ckpt`` saved every so many minutes, and written while training goes on."""

import errno
import os
import signal
import threading
import time

import lightning as L
import pytest
import torch
from processes import CONTEXT
from torch import nn
from toy import Toy, fit, rows

from taperlit.callbacks import RngState, RunCheckpoint
from taperlit.callbacks.checkpoint import Stopped
from taperlit.checkpoint.background import BackgroundWriter, can_copy, host_copy
from taperlit.cli.signals import Stops
from taperlit.errors import TaperlitError, Terminated
from taperlit.training import trainer
from taperlit.training.trainer import RunCheckpointIO, Trainer

ALWAYS = 1e-9  # minutes: due after every step


@pytest.fixture(autouse=True)
def _answers_ctrl_c():
    """A shell's background jobs, of which these tests may be one, begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read(path):
    return torch.load(path, weights_only=True)


def run(tmp_path, *callbacks, model=None, minutes=ALWAYS, **options):
    callback = RunCheckpoint(monitor=None, save_top_k=0, minutes=minutes)
    model = model or Toy()
    fit(tmp_path, model, *callbacks, callback, kind=Trainer, enable_checkpointing=True, **options)
    return model


@pytest.fixture
def writing(monkeypatch):
    """Puts a function before each write in the background; it gets the checkpoint."""

    def put(function):
        save = RunCheckpointIO.save_checkpoint

        def before(self, checkpoint, path, storage_options=None):
            if threading.current_thread() is not threading.main_thread():
                function(checkpoint)
            save(self, checkpoint, path)

        monkeypatch.setattr(RunCheckpointIO, "save_checkpoint", before)

    return put


class States(L.Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}


def test_training_goes_on_while_the_state_of_one_step_is_written(tmp_path, writing):
    states, go, written = States(), threading.Event(), []

    class Release(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 6:  # long after the first was begun
                assert not (tmp_path / "checkpoints/last.ckpt").exists()
                callback.minutes = ALWAYS
                go.set()

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.checkpoint_callback.minutes = ALWAYS
            elif trainer.global_step == 2:
                trainer.checkpoint_callback.minutes = 60

    def wait(checkpoint):
        assert go.wait(60)
        weights = {name: weight.clone() for name, weight in checkpoint["state_dict"].items()}
        written.append((checkpoint["global_step"], weights))

    writing(wait)
    callback = RunCheckpoint(monitor=None, save_top_k=0, minutes=60)
    fit(tmp_path, Toy(), states, Release(), callback, kind=Trainer, enable_checkpointing=True)
    steps = [step for step, _ in written]
    assert steps == sorted(set(steps))
    assert steps[:2] == [1, 7]
    for step, weights in written:
        assert all(torch.equal(weight, states.weights[step][name]) for name, weight in weights.items())
    assert read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 12


@pytest.mark.parametrize("at", [3, 12])
def test_a_full_disk_is_told_at_the_next_step_or_at_the_end(tmp_path, writing, at):
    ended = []

    def fail(checkpoint):
        if checkpoint["global_step"] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Wait(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            ended.append(trainer.global_step)
            trainer._writer._thread and trainer._writer._thread.join()

    writing(fail)
    with pytest.raises(TaperlitError, match=r"last.ckpt cannot be written: No space left on device. What was saved"):
        run(tmp_path, Wait())
    assert ended[-1] == min(at, 11)  # the step under way when it was noticed
    assert read(tmp_path / "checkpoints/last.ckpt")["global_step"] == at - 1
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]


def test_the_end_and_a_stop_wait_for_what_is_being_written(tmp_path, writing):
    writing(lambda checkpoint: time.sleep(0.2))
    run(tmp_path / "end", steps=2)
    assert read(tmp_path / "end/checkpoints/last.ckpt")["global_step"] == 2
    assert os.listdir(tmp_path / "end/checkpoints") == ["last.ckpt"]

    class Terminate(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tmp_path / "stop", Terminate())
    assert read(tmp_path / "stop/checkpoints/last.ckpt")["global_step"] == 3
    assert os.listdir(tmp_path / "stop/checkpoints") == ["last.ckpt"]


def test_a_run_that_goes_on_from_one_ends_as_if_nothing_had_been(tmp_path):
    class ByStep(Toy):
        """Its data do not depend on where the loader is, which is torch's own and cannot go on."""

        def training_step(self, batch, batch_idx):
            return self.loss(rows()[self.global_step :][:4] * torch.rand(()))

    whole = run(tmp_path / "whole", RngState(), model=ByStep(), minutes=None)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "part", RngState(), Fail(7), model=ByStep())
    assert read(tmp_path / "part/checkpoints/last.ckpt")["global_step"] in (6, 7)
    again = run(tmp_path / "part", RngState(), model=ByStep(), ckpt_path="last")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    first, second = (read(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "part"))
    for a, b in zip(*(c["optimizer_states"][0]["state"].values() for c in (first, second)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


class Fail(L.Callback):
    """The process dies, in a way that tests can look at."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.after:
            raise ZeroDivisionError


def killed(folder, moment):
    """Kill -9 while the second ``last.ckpt`` is written in the background."""
    save, written = torch.save, []

    def half(checkpoint, file):
        save(checkpoint, file)
        written.append(checkpoint)
        if len(written) == 2:
            file.flush()
            os.truncate(file.fileno(), 100)
            os.kill(os.getpid(), signal.SIGKILL)

    def unnamed(partial, target):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(partial, target)

    torch.set_num_threads(1)
    trainer.torch.save = half if moment == "half" else lambda *args: written.append(save(*args))
    commit, trainer.commit = trainer.commit, unnamed
    run(folder)


@pytest.mark.slow
def test_killed_while_it_is_written_the_one_before_is_there(tmp_path):
    for moment in ("half", "unnamed"):
        child = CONTEXT.Process(target=killed, args=(tmp_path / moment, moment))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert read(tmp_path / moment / "checkpoints/last.ckpt")["global_step"] == 1
        run(tmp_path / moment, ckpt_path="last")
        assert os.listdir(tmp_path / moment / "checkpoints") == ["last.ckpt"]
        assert read(tmp_path / moment / "checkpoints/last.ckpt")["global_step"] == 12


def test_never_and_nonsense(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Fail(3), minutes=None)
    assert not (tmp_path / "checkpoints").exists()
    for minutes in (0, -1.0, float("nan")):
        with pytest.raises(TaperlitError, match="must be above 0: null is never"):
            RunCheckpoint(minutes=minutes)


def test_ctrl_c_saves_and_a_second_one_does_not(tmp_path, capfd):
    class Interrupt(L.Callback):
        def __init__(self, times):
            self.times = times

        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as stop:
        run(tmp_path / "once", Interrupt(1), minutes=None)
    assert (stop.value.code, stop.value.signum) == (130, signal.SIGINT)
    assert stop.value.checkpoint == str(tmp_path / "once/checkpoints/last.ckpt")
    assert read(stop.value.checkpoint)["global_step"] == 3
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Terminated) as stop, Stops():
        run(tmp_path / "twice", Interrupt(2), minutes=None)
    assert stop.value.status == 130
    assert not (tmp_path / "twice/checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_copy_is_of_its_own_and_shares_memory_as_the_original_does():
    embedding = torch.randn(4, 3)
    tree = {"a": embedding, "b": embedding, "row": embedding[1:3].t(), "n": [1, (torch.ones(2), "x")], "none": None}
    tree["empty"] = torch.empty(0)
    tree["module"] = nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    assert can_copy(tree)
    copied = host_copy(tree)
    embedding.zero_()
    tree["n"].append(2)
    assert copied["a"].abs().min() > 0
    assert torch.equal(copied["row"], copied["a"][1:3].t())
    assert copied["a"].data_ptr() == copied["b"].data_ptr()
    assert copied["n"][0] == 1
    assert len(copied["n"]) == 2
    assert copied["module"]._metadata == tree["module"]._metadata
    assert not can_copy({"a": torch.ones(2).to_sparse()})


def test_one_piece_of_work_at_a_time():
    writer, go = BackgroundWriter(), threading.Event()
    writer.start(go.wait)
    with pytest.raises(RuntimeError, match="not waited for"):
        writer.start(go.wait)
    assert writer.wait(timeout=0.01) is None
    go.set()
    assert writer.wait() is None
    writer.start(lambda: 1 / 0)
    error = writer.wait()
    assert isinstance(error, ZeroDivisionError)
    assert (writer.failed, writer.wait()) == (False, None)
