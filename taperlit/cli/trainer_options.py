"""Numbers of the Trainer that Lightning takes without a word, and a seed and a path that mean nothing."""

from typing import Any

from jsonargparse import Namespace

from taperlit.errors import TaperlitError
from taperlit.ranges import require_range, require_seed

RANGES: dict[str, dict[str, Any]] = {
    "gradient_clip_val": {"least": 0, "mend": "0 or null clips nothing"},  # below 0 it would turn the gradients round
    "accumulate_grad_batches": {"least": 1},
    "log_every_n_steps": {"least": 1},
    "val_check_interval": {"above": 0},
    "check_val_every_n_epoch": {"least": 1, "mend": "null validates by val_check_interval alone"},
    "num_sanity_val_steps": {"least": -1, "mend": "-1 is all of them"},
    "num_nodes": {"least": 1},
    "min_epochs": {"least": 0},
    "min_steps": {"least": 0},
    "overfit_batches": {"least": 0},
}


def check_options(options: Namespace) -> None:
    """Refuse what Lightning would take and then do nothing, something else, or fail on in the middle of a run.

    Args:
        options: of a command that trains or evaluates, parsed.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    for name, bounds in RANGES.items():
        value = options.trainer.get(name)
        if isinstance(value, int | float):  # an interval may be a time, in words
            require_range(f"trainer.{name}", value, **bounds)
    if not isinstance(options.seed_everything, bool):
        require_seed("seed_everything", options.seed_everything)
    if options.ckpt_path == "":
        raise TaperlitError("ckpt_path is empty; give a checkpoint, or last, or leave it out.")
