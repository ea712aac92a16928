"""The table of commands, and what becomes of their errors."""

import errno
import inspect
import subprocess
import sys
import time
import types
from importlib import import_module

import pytest

from taperlit.cli import main
from taperlit.cli.options import Texts
from taperlit.cli.table import COMMANDS, TRAINER, Command
from taperlit.errors import TaperlitError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_names_a_function_that_is_there(name):
    command = COMMANDS[name]
    function = getattr(import_module(command.module), command.function)
    parameters = list(inspect.signature(function).parameters.values())
    assert len(parameters) == 2 if command.parses else all(p.annotation is not p.empty for p in parameters)
    assert inspect.getdoc(function)


@pytest.mark.parametrize("word", ["--help", "--nothing=1"])
def test_only_the_trainer_imports_torch_before_its_options_are_read(word):
    names = [name for name, command in COMMANDS.items() if command.module != TRAINER[0]]
    program = """
import contextlib, io, sys
from taperlit.cli import main
for name in sys.argv[2:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([name, sys.argv[1]])
    print(name, sorted({"torch", "lightning", "transformers"} & {*sys.modules}))
"""
    told = subprocess.run([sys.executable, "-c", program, word, *names], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [f"{name} []" for name in names]
    assert told.stderr.count("\n") == (len(names) if word != "--help" else 0)


@pytest.fixture
def greet(monkeypatch):
    """A command that is no more than a function and a row."""
    called = []

    def greet(name: str, times: int = 1) -> None:
        """Greet somebody."""
        called.append((name, times))

    module = types.ModuleType("greetings")
    module.greet = greet
    monkeypatch.setitem(sys.modules, "greetings", module)
    monkeypatch.setitem(COMMANDS, "greet", Command("greet somebody", "greetings", "greet"))
    module.called = called
    return module


def test_a_new_command_needs_a_row_and_no_more(greet, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("times: 3\n")
    assert main(["greet", "--name=you", "--config", str(tmp_path / "options.yaml")]) == 0
    assert greet.called == [("you", 3)]
    assert main(["--help"]) == 0
    assert "greet somebody" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["greet", "--nobody=1"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_texts_are_taken_as_they_stand(greet, monkeypatch, tmp_path, capsys):
    def greet_all(names: Texts, times: int | None = None) -> None:
        """Greet everybody.

        Args:
            names: who they
                are.
            times: how often.
        """
        greet.called.append((names, times))

    monkeypatch.setattr(greet, "greet", greet_all)
    assert main(["greet", "--names=null", "--names", "[you]", "--times=null"]) == 0
    (tmp_path / "one.yaml").write_text("names: you\n")
    assert main(["greet", "--config", str(tmp_path / "one.yaml")]) == 0
    assert main(["greet", "--config", str(tmp_path / "one.yaml"), "--names=1"]) == 0
    (tmp_path / "more.yaml").write_text("names: [you, '1']\ntimes: 2\n")
    assert main(["greet", "--config", str(tmp_path / "more.yaml")]) == 0
    assert greet.called == [(["null", "[you]"], None), (["you"], None), (["you", "1"], None), (["you", "1"], 2)]
    (tmp_path / "wrong.yaml").write_text("names: [you, 1]\n")
    for args in (["--config", str(tmp_path / "wrong.yaml")], []):  # what YAML reads as a number; none at all
        with pytest.raises(SystemExit) as exit:
            main(["greet", *args])
        assert exit.value.code == 2
        assert "names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["greet", "--help"])
    assert "who they are. (required, type: str, several times)" in " ".join(capsys.readouterr().out.split())


def failing(error):
    def greet(name: str) -> None:
        """Fail."""
        raise error

    return greet


def disk(number):
    return OSError(number, "the disk says no", "folder/file")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (TaperlitError("it is so; mend it."), 1, "error: it is so; mend it."),
        (disk(errno.ENOSPC), 1, "error: folder/file: the disk says no; make room first."),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.yaml"), 1, "error: [Errno 2] No such file: 'a.yaml'"),
        (KeyboardInterrupt(), 130, "error: interrupted."),
    ],
)
def test_what_the_user_can_mend_is_one_line(greet, monkeypatch, capsys, error, status, line):
    monkeypatch.setattr(greet, "greet", failing(error))
    assert main(["greet", "--name=you"]) == status
    assert capsys.readouterr().err == f"taperlit: {line}\n"


@pytest.mark.parametrize("error", [disk(errno.EINVAL), RuntimeError("a bug")])
def test_what_is_a_bug_keeps_its_traceback(greet, monkeypatch, error):
    monkeypatch.setattr(greet, "greet", failing(error))
    with pytest.raises(type(error)):
        main(["greet", "--name=you"])


@pytest.mark.parametrize(
    ("environment", "speaker", "waits"),
    [
        ({}, "error:", False),
        ({"LOCAL_RANK": "0"}, "error:", False),
        ({"LOCAL_RANK": "1"}, "[rank 1]", True),  # Lightning's launcher started it
        ({"RANK": "3", "LOCAL_RANK": "1"}, "[rank 3]", False),  # torchrun's
        ({"SLURM_PROCID": "2"}, "[rank 2]", False),
    ],
)
def test_the_first_process_speaks_for_all(greet, monkeypatch, capsys, environment, speaker, waits):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(greet, "greet", failing(TaperlitError("no.")))
    assert main(["greet", "--name=you"]) == 1
    assert capsys.readouterr().err == f"taperlit: {speaker} no.\n"
    assert bool(slept) == waits
