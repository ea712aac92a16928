"""Commands that prepare data or fold, told to stop: one line, the shell's status, nothing half-written."""

import os
import signal

import pytest
from small import error_of, fit_command

import taperlit.checkpoint.folded as folded
import taperlit.data.module as data
import taperlit.data.tokenizer as tokenizer


@pytest.fixture(autouse=True)
def _answers_ctrl_c():
    """A shell's background jobs, of which these tests may be one, begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopping(monkeypatch, module, name, signum):
    """Let the signal come while a function runs, which then would go on for ever."""

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signum)
        while True:
            pass

    monkeypatch.setattr(module, name, stop)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_while_the_tokens_are_prepared_and_while_folding(tmp_path, corpus, capsys, monkeypatch):
    command = fit_command(tmp_path, f"{corpus}/*.py")
    before = everything(tmp_path)
    for module, name, signum, line in (
        (data, "write_tokens", signal.SIGTERM, "stopped by SIGTERM"),
        (tokenizer.Tokenizer, "train_from_iterator", signal.SIGINT, "interrupted"),
    ):
        with monkeypatch.context() as patch:
            stopping(patch, module, name, signum)
            told = error_of(capsys, *command, status=128 + signum)
        assert told.startswith(f"taperlit: error: {line}; go on with: taperlit fit --config ")
        assert told.endswith(" --ckpt_path last")
        left = [path for path in everything(tmp_path) if path not in before]
        assert all((tmp_path / path).is_dir() and "partial" not in path for path in left), left
    with monkeypatch.context() as patch:
        stopping(patch, folded, "load_checkpoint", signal.SIGTERM)
        told = error_of(capsys, "fold", "--ckpt", str(tmp_path / "last.ckpt"), status=143)
    assert told == "taperlit: error: stopped by SIGTERM."
    assert not list(tmp_path.glob("last*"))
    with pytest.raises(KeyboardInterrupt):  # the handlers are the process's own again
        os.kill(os.getpid(), signal.SIGINT)
