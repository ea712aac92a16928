"""Being told to stop: SIGTERM (a scheduler, ``kill``) and SIGINT (Ctrl-C) end a command within seconds."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from taperlit.errors import Terminated

HANDLED = (signal.SIGTERM, signal.SIGINT)
UNANSWERED = 3.0  # seconds that one call into C++ or Rust may still take
UNFINISHED = 20.0  # seconds that cleaning up may take
_active: "Stops | None" = None


class ToldToStop(SystemExit):
    """Raised where the command stands when a signal tells it to stop, so that what it has begun is cleaned up.

    It is no ``Exception`` (nothing that handles errors handles it) and no ``KeyboardInterrupt``, which Lightning makes
    an exit status of its own of.

    Args:
        signum: of the signal. The exit status is the shell's for it, 128 more.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def how(signum: int) -> str:
    """What a command says that a signal ended."""
    return "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"


class Stops:
    """While it is entered, SIGTERM and SIGINT raise :class:`ToldToStop`, unless the process was started to ignore them.

    Python runs a handler only between two steps of its own. Where the process is in one long call (a tokenizer is
    trained, a barrier waited at) or something swallows the exception, a thread ends the process, once what it was
    writing aside is removed. A handler that takes the place of this one, as that of a fit which saves first, is left
    alone.

    Forked processes do not answer: SIGTERM ends them, and Ctrl-C, which a terminal sends to all, is their parent's to
    decide.

    Attributes:
        told: the signal's number; None before one came.
    """

    def __init__(self) -> None:
        self.told: int | None = None
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Stops":
        """Listen; in any thread but the main one, which alone may, do nothing."""
        global _active
        if threading.current_thread() is not threading.main_thread():
            return self
        for signum in HANDLED:
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._raise)
        told, self._telling = socket.socketpair()
        self._telling.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._telling.fileno(), warn_on_full_buffer=False)
        _active = self
        threading.Thread(target=self._watch, args=(told,), name="taperlit-stops", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back.

        Raises:
            Terminated: one came, whatever error it has become on its way here.
        """
        global _active
        self._over.set()
        if _active is self:
            _active = None
            signal.set_wakeup_fd(self._wakeup_before)
            for signum, handler in self._before.items():
                signal.signal(signum, handler)
            self._telling.close()
        if self.told is not None and error is not None and not isinstance(error, Terminated):
            raise Terminated(f"{how(self.told)}.", self.told) from error

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        self.told = signum
        raise ToldToStop(signum)

    def _watch(self, told: socket.socket) -> None:
        """Read the numbers of the signals that came, which the system's own handler writes at once."""
        with told:
            while number := told.recv(1):
                signum = number[0]
                if signum not in self._before or signal.getsignal(signum) != self._raise:
                    continue
                if self._over.wait(UNANSWERED) or (self.told is not None and self._over.wait(UNFINISHED)):
                    return
                self._end(signum)

    def _end(self, signum: int) -> None:
        # Not imported before: the process may be told to stop while it imports.
        if (atomic := sys.modules.get("taperlit.checkpoint.atomic")) is not None:
            with contextlib.suppress(OSError):
                atomic.remove_own_asides()
        os.write(2, f"taperlit: error: {how(signum)}.\n".encode())
        os._exit(128 + signum)


def _in_forked() -> None:
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _active = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked)
