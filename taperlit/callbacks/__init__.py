"""Callbacks that taper, anchor, fold and watch; each works alone on anybody's LightningModule.

Their order in the Trainer does not matter.
"""

from taperlit.callbacks.alignment import AlignmentFreeze
from taperlit.callbacks.anchor import ScaleAnchor
from taperlit.callbacks.checkpoint import RunCheckpoint
from taperlit.callbacks.finite import FiniteGuard
from taperlit.callbacks.fold import FoldOnEnd
from taperlit.callbacks.gate import GateSchedule
from taperlit.callbacks.monitor import TaperMonitor
from taperlit.callbacks.progress import StepProgressBar
from taperlit.callbacks.rng import RngState
from taperlit.callbacks.throughput import TokenThroughput

__all__ = [
    "AlignmentFreeze",
    "FiniteGuard",
    "FoldOnEnd",
    "GateSchedule",
    "RngState",
    "RunCheckpoint",
    "ScaleAnchor",
    "StepProgressBar",
    "TaperMonitor",
    "TokenThroughput",
]
