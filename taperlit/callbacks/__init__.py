"""Callbacks that taper, anchor, fold and watch, on anybody's LightningModule.

They do not know each other. What one must know of another stands at the norms: the plan of the run at their gate, and
which alignment scalars are frozen. Their order in the Trainer does not matter. GateSchedule needs an AlignmentFreeze
beside it, and GateHold a GateSchedule; AlignmentFreeze, ScaleAnchor and BoundedWrites need a GateSchedule or a step to
act at, FirstPosition somebody who closes the gate, and FakeLNSchedule a model after ``apply_fakeln``; the others work
alone.
"""

from taperlit.callbacks.alignment import AlignmentFreeze
from taperlit.callbacks.anchor import ScaleAnchor
from taperlit.callbacks.checkpoint import RunCheckpoint
from taperlit.callbacks.decay import DecayWithGate
from taperlit.callbacks.fakeln import FakeLNSchedule
from taperlit.callbacks.finite import FiniteGuard
from taperlit.callbacks.first_position import FirstPosition
from taperlit.callbacks.fold import FoldOnEnd
from taperlit.callbacks.gate import GateSchedule
from taperlit.callbacks.hold import GateHold
from taperlit.callbacks.lr_dip import LearningRateDip
from taperlit.callbacks.massive import ShrinkMassive
from taperlit.callbacks.monitor import TaperMonitor
from taperlit.callbacks.progress import StepProgressBar
from taperlit.callbacks.rng import RngState
from taperlit.callbacks.rows import EqualRows
from taperlit.callbacks.tail_penalty import TailPenalty
from taperlit.callbacks.tails import LossTails
from taperlit.callbacks.throughput import TokenThroughput
from taperlit.callbacks.writes import BoundedWrites

__all__ = [
    "AlignmentFreeze",
    "BoundedWrites",
    "DecayWithGate",
    "EqualRows",
    "FakeLNSchedule",
    "FiniteGuard",
    "FirstPosition",
    "FoldOnEnd",
    "GateHold",
    "GateSchedule",
    "LearningRateDip",
    "LossTails",
    "RngState",
    "RunCheckpoint",
    "ScaleAnchor",
    "ShrinkMassive",
    "StepProgressBar",
    "TailPenalty",
    "TaperMonitor",
    "TokenThroughput",
]
