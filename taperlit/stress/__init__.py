"""Run a model on input that no text has, and say whether its logits stay finite and its residuals of one size.

Norm-free models can be as good as others on text and explode on a token or a prompt that training never showed them.
"""

from taperlit.stress.probe import stress
from taperlit.stress.report import Outcome, StressReport
from taperlit.stress.sizes import FULL, QUICK, Sizes

__all__ = ["FULL", "QUICK", "Outcome", "Sizes", "StressReport", "stress"]
