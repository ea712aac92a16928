"""What libraries say in every run that nobody who reads it can act on; all else is shown."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from lightning.pytorch.utilities.rank_zero import rank_zero_module

# How lines of Lightning's begin: advertisements, and devices, which RunSummary tells.
ADVERTS = ("💡 Tip: ", "GPU available: ", "TPU available: ")
# Warnings about how one library calls another, by how they begin.
BETWEEN_LIBRARIES = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


def _worth_reading(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(ADVERTS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep them from the screen while it is entered."""
    logger = rank_zero_module.log  # of all that Lightning says once, whatever the number of processes
    logger.addFilter(_worth_reading)
    try:
        with warnings.catch_warnings():
            for message in BETWEEN_LIBRARIES:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.removeFilter(_worth_reading)
