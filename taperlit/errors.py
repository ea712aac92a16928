"""The one exception that means "the user can mend this"."""


class TaperlitError(ValueError):
    """Bad input, told in one line that names the thing and the mend.

    The command line prints the message and exits with status 1, without a traceback.
    """
