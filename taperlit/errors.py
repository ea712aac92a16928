"""The exceptions that the command line tells in one line."""


class TaperlitError(ValueError):
    """Bad input, told in one line that names the thing and the mend.

    The command line prints the message and exits with ``status``, without a traceback.
    """

    status = 1


class Terminated(TaperlitError):
    """The run was told to stop (SIGTERM); the message says how to go on. The status is the shell's: 128 + 15."""

    status = 143
