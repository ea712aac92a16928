"""Where a pretrained model came from, and the small files that go with it wherever it goes."""

import json
from dataclasses import dataclass
from typing import Any, cast

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files beside a pretrained model's weights that are kept in checkpoints and written on export; the tokenizer's own
file, ``tokenizer.json``, is kept with the data's."""


@dataclass(frozen=True)
class Origin:
    """A pretrained model without its weights: enough to build its class again with no file and no network.

    Args:
        name: what was asked for: a name on the hub, or the last part of a path.
        files: the text of each file of :data:`CARRIED` that it has; ``config.json`` always.
    """

    name: str
    files: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``, as ``transformers`` reads it."""
        return cast("dict[str, Any]", json.loads(self.files["config.json"], object_hook=_number))


def _number(read: dict[str, Any]) -> Any:
    """What ``transformers`` writes for an infinite number, which JSON has not: ``{"__float__": "Infinity"}``."""
    special = read.get("__float__") if len(read) == 1 else None
    return float(special) if special in ("Infinity", "-Infinity", "NaN") else read
