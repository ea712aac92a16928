"""How fast some positive numbers still change from step to step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

RATE = 0.1  # of the moving average over steps


@dataclass
class Drift:
    """Moving averages of the relative changes per step, with their signs, so that noise about a fixed value cancels.

    Args:
        last: logarithms of the numbers at the last step, (n,); None before the first.
        mean: the averages so far, (n,), not corrected for their bias; None before the second.
        weight: of all changes in the averages, which corrects them.
    """

    last: Tensor | None = None
    mean: Tensor | None = None
    weight: float = 0.0

    def update(self, numbers: Tensor) -> None:
        """Take in the numbers (n,) after one more step. The first step has no change."""
        logs = numbers.detach().float().log()
        if self.last is not None:
            change = logs - self.last.to(logs.device)
            mean = torch.zeros_like(logs) if self.mean is None else self.mean.to(logs.device)
            self.mean = mean.lerp(change, RATE)
            self.weight += (1 - self.weight) * RATE
        self.last = logs

    @property
    def largest(self) -> Tensor:
        """The largest relative change per step, up or down, 0-d; infinite while none is known or one is no number."""
        if self.mean is None:
            return torch.tensor(math.inf)
        return (self.mean / self.weight).abs().amax().nan_to_num(nan=math.inf, posinf=math.inf)

    def state_dict(self) -> dict[str, Any]:
        """The arguments that make it anew, tensors on the CPU."""
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in asdict(self).items()}
