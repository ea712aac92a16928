"""A seed and a checkpoint's path that mean nothing; the Trainer's own numbers it checks itself."""

from jsonargparse import Namespace

from taperlit.errors import TaperlitError
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
