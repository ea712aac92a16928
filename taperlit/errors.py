"""The exceptions that the command line tells in one line."""

import signal


class TaperlitError(ValueError):
    """Bad input, told in one line that names the thing and the mend.

    The command line prints the message and exits with ``status``, without a traceback.
    """

    status = 1


class Terminated(TaperlitError):
    """The run was told to stop by a signal; the message says how to go on. The status is the shell's: 128 more.

    Args:
        message: for the command line to print.
        signum: of the signal.
    """

    def __init__(self, message: str, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = 128 + signum
