"""What folding did to a run's model, by the record in the folded folder."""

import json
from pathlib import Path
from typing import NamedTuple, cast

from taperlit.checkpoint.checksum import checksum_of
from taperlit.errors import TaperlitError
from taperlit.structure import Structure


class Fold(NamedTuple):
    """A folded model.

    Args:
        folder: where it is.
        model_class: the name of its class.
        structure: see :class:`taperlit.structure.Structure`.
    """

    folder: Path
    model_class: str
    structure: Structure


def read_fold(folder: Path) -> Fold:
    """Read the record of a folded model without its weights.

    Raises:
        TaperlitError: there is none, it is another program's, or it was changed since it was written.
    """
    path = folder / "config.json"
    again = "fold the checkpoint again"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        structure, model_class = config["structure"], config["model_class"]
        if config["checksums"]["config.json"] != checksum_of(config):
            raise TaperlitError(f"{path} is not as it was written, its checksum differs; {again}.")
        fold = Fold(folder, str(model_class), cast(Structure, structure))
        if not all(key in structure for key in Structure.__annotations__):
            raise KeyError("structure")
    except TaperlitError:
        raise
    except FileNotFoundError as error:
        raise TaperlitError(f"{path} is missing; {again}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaperlitError(
            f"{path} is no record of a folded model ({' '.join(str(error).split())}); {again}."
        ) from error
    return fold
