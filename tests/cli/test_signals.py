"""A command that is told to stop does so within seconds, says so in one line, and leaves nothing half-written."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from taperlit.cli import main
from taperlit.cli.signals import Stops, ToldToStop
from taperlit.cli.table import COMMANDS, Command
from taperlit.errors import TaperlitError, Terminated

LINES = {
    signal.SIGTERM: (143, "taperlit: error: stopped by SIGTERM."),
    signal.SIGINT: (130, "taperlit: error: interrupted."),
}
# Writes a directory with a file in it, and comes no further.
PROGRAM = """
import contextlib, hashlib, os, signal, sys, time, types
from pathlib import Path
import taperlit.cli.signals as signals
from taperlit.checkpoint.atomic import write_directory
from taperlit.cli import main
from taperlit.cli.table import COMMANDS, Command

signal.signal(signal.SIGINT, signal.default_int_handler)
signals.UNANSWERED = signals.UNFINISHED = 0.3

def prepare(folder: str, way: str) -> None:
    def fill(partial):
        (partial / "half").write_text("half")
        Path(folder, "begun").touch()
        if way == "one call":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes, without a step of Python's
        while True:
            with contextlib.suppress(BaseException if way == "swallowed" else ()):
                time.sleep(1000)
    write_directory(Path(folder, "out"), fill)

sys.modules["prepares"] = types.SimpleNamespace(prepare=prepare)
COMMANDS["prepare"] = Command("prepare", "prepares", "prepare")
sys.exit(main(["prepare", "--folder", sys.argv[1], "--way", sys.argv[2]]))
"""


@pytest.fixture(autouse=True)
def _answers_ctrl_c():
    """A shell's background jobs, of which these tests may be one, begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", LINES)
@pytest.mark.parametrize("way", ["between steps", "one call", "swallowed"])
def test_a_command_that_writes_stops_and_leaves_nothing(tmp_path, way, signum):
    command = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, way], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert command.poll() is None, command.stderr.read()
        time.sleep(0.02)
    command.send_signal(signum)
    _, err = command.communicate()
    assert (command.returncode, err.splitlines()) == (LINES[signum][0], [LINES[signum][1]])
    assert os.listdir(tmp_path) == ["begun"]


@pytest.fixture
def command(monkeypatch):
    """Makes a command of a function without parameters; runs it in this process."""

    def run(function):
        monkeypatch.setitem(sys.modules, "made_here", types.SimpleNamespace(made=function))
        monkeypatch.setitem(COMMANDS, "made", Command("made here", "made_here", "made"))
        return main(["made"])

    return run


def handlers():
    return [signal.getsignal(signum) for signum in LINES], signal.set_wakeup_fd(-1)


def test_whatever_error_a_stop_has_become_it_is_told_as_one(command, capsys):
    def reads() -> None:
        """Read a file with a library that makes one kind of error of all."""
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise TaperlitError("the tokenizer cannot be loaded") from error

    before = handlers()
    assert command(reads) == 143
    assert capsys.readouterr().err == "taperlit: error: stopped by SIGTERM.\n"
    assert handlers() == before


def test_a_process_started_to_ignore_ctrl_c_does(command):
    def interrupted() -> None:
        """Interrupt."""
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command(interrupted) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_do_not_speak_for_the_command(command, capsys):
    statuses = []

    def forks() -> None:
        """Fork a process as a data loader does, interrupt it in vain, and end it."""
        child = os.fork()
        if not child:
            time.sleep(1000)
            os._exit(7)
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        statuses.append(os.waitpid(child, 0)[1])
        time.sleep(0.2)

    assert command(forks) == 0
    assert statuses == [signal.SIGTERM]
    assert capsys.readouterr().err == ""


def test_another_handler_in_its_place_decides():
    answered = []
    with Stops() as stops:
        signal.signal(signal.SIGTERM, lambda *_: answered.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
        assert answered == [1]
    assert stops.told is None
    with pytest.raises(Terminated) as stop, Stops():
        os.kill(os.getpid(), signal.SIGINT)
    assert (str(stop.value), stop.value.status) == ("interrupted.", 130)
    assert isinstance(stop.value.__cause__, ToldToStop)
