"""Pipes, disks and files that refuse: one line each."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taperlit import TextDataModule
from taperlit.checkpoint.folded import write_folded
from taperlit.cli import main
from taperlit.data.sources import expand_globs
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [["bench", "--help"], ["fit", "--help"]])
def test_a_reader_that_has_gone_is_told_in_one_line(args, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        run = subprocess.run([sys.executable, "-m", "taperlit", *args], stdout=out, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "taperlit: error: nobody reads the standard output any more.\n"


def test_a_full_disk_leaves_no_half_of_a_folded_model(tiny, tmp_path):
    model = tiny(["blocks.*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(8)[None]))
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # what a full disk does: a write comes to an end early
    try:
        with pytest.raises(TaperlitError, match=r"cannot be written: .*too large"):
            write_folded(tmp_path / "folded", model, structure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert (write_folded(tmp_path / "folded", model, structure) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00ckpt", b"ckpt: \x00", b"[1, 2]", b"ckpt: [", b"nothing: 1", b"ckpt: " + b"[" * 20_000],
    ids=["bytes", "null", "list", "open", "unknown", "deep"],
)
def test_a_config_that_is_none_is_one_line(tmp_path, capsys, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        main(["fold", "--config", str(tmp_path / "bad.yaml")])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("taperlit: error: ")


def test_a_bracket_in_a_path_that_exists_is_its_own(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    for name in ("a[b].txt", "ab.txt", "c.txt"):
        (folder / name).write_text("x")
    assert expand_globs(str(folder / "a[b].txt")) == [str(folder / "a[b].txt")]
    assert expand_globs(str(folder / "*.txt")) == sorted(str(folder / name) for name in ("a[b].txt", "ab.txt", "c.txt"))
    assert expand_globs(str(folder / "[c].txt")) == [str(folder / "c.txt")]  # no such file: a class of characters
    assert expand_globs(str(tmp_path / "**/a[b].txt")) == [str(folder / "ab.txt")]  # likewise: ** is no folder
    with pytest.raises(TaperlitError, match="no file matches"):
        expand_globs(str(folder / "[x].txt"))


def test_a_token_cache_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """As root every file can be read, so that the system's answer is given here."""
    (tmp_path / "a.txt").write_text("text")
    data = TextDataModule(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))
    path, ask = data.cache_path(), Path.stat

    def stat(self, **options):
        if path in (self, *self.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return ask(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(TaperlitError) as error:
        data.prepare_data()
    assert str(error.value).startswith(f"The token cache {path} cannot be read: Permission denied; ")


@pytest.mark.parametrize(
    ("number", "line"),
    [(errno.EACCES, "folder/file: Permission denied."), (errno.ENOTDIR, "folder/file: Not a directory.")],
)
def test_a_path_that_refuses_is_one_line(monkeypatch, capsys, number, line):
    def refuse(*args):
        raise OSError(number, os.strerror(number), "folder/file")

    monkeypatch.setattr("taperlit.cli.bench.bench", refuse)
    assert main(["bench", "decode"]) == 1
    assert capsys.readouterr().err == f"taperlit: error: {line}\n"
