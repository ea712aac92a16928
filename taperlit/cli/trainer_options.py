"""What no class checks that the options are for: a seed, a checkpoint's path, and the slots as a whole."""

from jsonargparse import Namespace

from taperlit.errors import TaperlitError
from taperlit.fields import shown
from taperlit.ranges import require_seed


def check_options(options: Namespace) -> None:
    """Refuse what would fail in the middle of a run, or do something else.

    Args:
        options: of a command that trains or evaluates, parsed.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    if not isinstance(options.seed_everything, bool):
        require_seed("seed_everything", options.seed_everything)
    if options.ckpt_path == "":
        raise TaperlitError("ckpt_path is empty; give a checkpoint, or last, or leave it out.")
    if not isinstance(options.taper, Namespace):  # a group of options, whose kind the parser leaves open
        raise TaperlitError(f"taper is {shown(options.taper)}, not a dictionary; give its slots, or leave it out.")
