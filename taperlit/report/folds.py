"""What folding did to a run's model, by the record in the folded folder."""

from pathlib import Path
from typing import NamedTuple

from taperlit.checkpoint.plain import check_fields
from taperlit.structure import Structure


class Fold(NamedTuple):
    """A folded model.

    Args:
        folder: where it is.
        model_class: the name of its class.
        structure: see :class:`taperlit.structure.Structure`.
        step: optimizer steps that its run had taken, or None where that was not stored.
    """

    folder: Path
    model_class: str
    structure: Structure
    step: int | None = None


def read_fold(folder: Path) -> Fold:
    """Read the record of a folded model without its weights.

    Raises:
        TaperlitError: as :func:`taperlit.checkpoint.folded.read_config`, or nothing was measured when it was folded.
    """
    from taperlit.checkpoint.folded import MEND, read_config  # here: it brings all that builds models

    config = read_config(folder)
    check_fields(config["structure"], Structure, folder / "config.json", "structure", MEND)
    return Fold(folder, config["model_class"], config["structure"], config.get("step"))
