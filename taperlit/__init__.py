"""Train language models whose normalization layers are tapered away, then fold them.

Names are imported when first used, so that ``import taperlit`` (and ``taperlit --help``) does not import torch.
"""

from importlib import import_module
from importlib.metadata import version

from taperlit.hub.registered import register_when_imported

__version__ = version("taperlit")

_HOMES = {
    "AlignmentFreeze": "taperlit.callbacks",
    "BoundedWrites": "taperlit.callbacks",
    "DecayWithGate": "taperlit.callbacks",
    "EqualRows": "taperlit.callbacks",
    "FakeLNSchedule": "taperlit.callbacks",
    "FiniteGuard": "taperlit.callbacks",
    "FirstPosition": "taperlit.callbacks",
    "FoldOnEnd": "taperlit.callbacks",
    "GateHold": "taperlit.callbacks",
    "GateSchedule": "taperlit.callbacks",
    "LearningRateDip": "taperlit.callbacks",
    "LossTails": "taperlit.callbacks",
    "RngState": "taperlit.callbacks",
    "RunCheckpoint": "taperlit.callbacks",
    "ScaleAnchor": "taperlit.callbacks",
    "ShrinkMassive": "taperlit.callbacks",
    "TailPenalty": "taperlit.callbacks",
    "TaperMonitor": "taperlit.callbacks",
    "TaperlitError": "taperlit.errors",
    "Engine": "taperlit.decode.engine",
    "Sampling": "taperlit.decode.sampling",
    "Gate": "taperlit.norm",
    "TaperLayerNorm": "taperlit.norm",
    "TaperNorm": "taperlit.norm",
    "TaperRMSNorm": "taperlit.norm",
    "apply_structure": "taperlit.structure",
    "fold": "taperlit.folding",
    "LanguageModel": "taperlit.training.module",
    "TextDataModule": "taperlit.data",
    "Trainer": "taperlit.training.trainer",
    "Transformer": "taperlit.transformer",
    "TransformerConfig": "taperlit.transformer",
    "load_folded": "taperlit.checkpoint.folded",
    "load_model": "taperlit.checkpoint.folded",
    "taper": "taperlit.surgery",
    "write_folded": "taperlit.checkpoint.folded",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'taperlit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_when_imported()
