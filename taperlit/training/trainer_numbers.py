"""Numbers of the Trainer that Lightning takes without a word."""

from collections.abc import Mapping
from typing import Any

from taperlit.ranges import require_range

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


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse what Lightning would take and then do nothing, something else, or fail on in the middle of a run.

    Args:
        options: arguments of :class:`lightning.Trainer` by name; those that are left out are not checked.

    Raises:
        TaperlitError: names the option, its value and its range.
    """
    for name, bounds in RANGES.items():
        value = options.get(name)
        if isinstance(value, int | float):  # an interval may be a time, in words
            require_range(f"trainer.{name}", value, **bounds)
