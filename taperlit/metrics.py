"""The tails of a language model's token losses: what a mean hides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from taperlit.errors import TaperlitError

# A loss is counted under the leading bits of its float32: all of its exponent and 11 bits of its fraction, so that a
# bin's middle is within 1/4096 of whatever fell into it, from the least loss to the largest. Counts of integers add up
# over batches and processes in any order, in 4 MiB, where sorted losses would grow with the data.
BIN_SHIFT = 12
BINS = 2**31 >> BIN_SHIFT
INFINITE_BIN = 0x7F800000 >> BIN_SHIFT
BUCKETS = 33  # of positions: 0, 1, 2-3, 4-7, ... to 2^31
NOWHERE = (-float("inf"), -1.0, -1.0, -1.0)
ROUNDING = 1e-3  # nats below 0 that a loss may have by rounding


class TokenLossTails(Metric):
    """The largest losses, the quantiles, the losses by position, and what rose against a reference model.

    Losses are in nats. A loss that is NaN counts as infinite, the worst there is: it is in every figure, and the losses
    that are not finite are counted as well.

    :meth:`compute` gives float64 and int64 tensors, 0-d unless said:

    - ``tokens``: how many targets counted; where none did, it is all there is.
    - ``loss_mean``, ``loss_max``; ``loss_max_at``, (3,) int64: the token before, the token predicted, its position.
      Of equal losses it is the one with the lowest numbers.
    - ``loss_median``, ``loss_p999``: the least loss that at least 50% or 99.9% of the tokens do not exceed (numpy's
      ``inverted_cdf``), within 1/4096 of itself.
    - ``loss_nonfinite``: how many losses are NaN or infinite.
    - ``loss_at/<positions>``: mean loss at the positions 0, 1, 2-3, 4-7, ... of the blocks, where any target counted.
    - with a reference, over the targets whose loss is finite in the reference: ``tokens_risen`` and ``share_risen``,
      those that lost more than ``threshold`` nats to it; ``rise_mean``, ``rise_max``, ``rise_max_at`` (as above); and
      ``reference_nonfinite``, the targets left out.

    Its states are sums and maxima: processes that each saw a part give what one gives that saw all, the means up to
    float64 rounding. Keep it on the CPU, or where there is float64.

    Args:
        threshold: nats by which a token's loss must rise above the reference's to count as risen.

    Raises:
        TaperlitError: the threshold is not a finite number of at least 0.
    """

    full_state_update = False

    counts: Tensor
    totals: Tensor
    length: Tensor
    histogram: Tensor
    nonfinite: Tensor
    largest: Tensor
    pairs: Tensor
    risen: Tensor
    rise_total: Tensor
    largest_rise: Tensor
    reference_nonfinite: Tensor

    def __init__(self, threshold: float = 5.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= threshold < float("inf"):
            raise TaperlitError(f"threshold is {threshold}; it is a finite number of nats, at least 0.")
        self.threshold = threshold
        for name in ("nonfinite", "pairs", "risen", "reference_nonfinite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("length", torch.zeros((), dtype=torch.int64), "max")
        self.add_state("counts", torch.zeros(BUCKETS, dtype=torch.int64), "sum")
        self.add_state("totals", torch.zeros(BUCKETS, dtype=torch.float64), "sum")
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.int64), "sum")
        self.add_state("rise_total", torch.zeros((), dtype=torch.float64), "sum")
        for name in ("largest", "largest_rise"):
            self.add_state(name, torch.tensor(NOWHERE, dtype=torch.float64), _worst)

    @torch.no_grad()
    def update(self, losses: Tensor, blocks: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            losses: (B, T) cross-entropy of each target.
            blocks: (B, T + 1) token ids, of which ``blocks[:, 1:]`` are the targets; -100 does not count.
            reference: (B, T) the reference model's losses of the same targets, or None.

        Raises:
            TaperlitError: the shapes do not belong together, or a loss is negative.
        """
        blocks = blocks.to(self.device)
        counted = blocks[:, 1:] != -100  # (B, T)
        values = self._counted(losses, counted)  # (n,)
        if not len(values):
            return
        position = torch.arange(counted.shape[1], device=self.device).expand_as(counted)
        where = torch.stack([each[counted] for each in (blocks[:, :-1], blocks[:, 1:], position)], 1)  # (n, 3)
        bucket = position_bucket(where[:, 2])
        self.counts.index_add_(0, bucket, torch.ones_like(bucket))
        self.totals.index_add_(0, bucket, values.double())
        self.length = self.length.maximum(torch.tensor(counted.shape[1], device=self.device))
        bins = values.view(torch.int32).to(torch.int64) >> BIN_SHIFT
        self.histogram.index_add_(0, bins, torch.ones_like(bins))
        self.nonfinite += values.isinf().sum()
        self.largest = _worst_of(values, where, self.largest)
        if reference is not None:
            self._compare(values, self._counted(reference, counted), where)

    def _counted(self, losses: Tensor, counted: Tensor) -> Tensor:
        if losses.shape != counted.shape:
            raise TaperlitError(
                f"The token losses are {tuple(losses.shape)} and the targets {tuple(counted.shape)}; give one for each."
            )
        values = losses.detach().to(self.device, torch.float32)[counted]
        if (values < -ROUNDING).any():
            raise TaperlitError(
                f"A token loss is {values.min().item():.4g}, which no cross-entropy is; give losses, not log "
                "probabilities."
            )
        # -0.0 has a bit that would put it into no bin, and adding 0 takes it away.
        return values.nan_to_num(float("inf"), float("inf")).clamp(min=0) + 0.0

    def _compare(self, values: Tensor, reference: Tensor, where: Tensor) -> None:
        usable = reference.isfinite()
        rise = values[usable] - reference[usable]
        self.reference_nonfinite += (~usable).sum()
        self.pairs += len(rise)
        self.risen += (rise > self.threshold).sum()
        self.rise_total += rise.sum(dtype=torch.float64)
        if len(rise):
            self.largest_rise = _worst_of(rise, where[usable], self.largest_rise)

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, see the class."""
        tokens = self.counts.sum()
        if not tokens:
            return {"tokens": tokens}
        figures = {
            "tokens": tokens,
            "loss_mean": self.totals.sum() / tokens,
            "loss_median": self._quantile(500),
            "loss_p999": self._quantile(999),
            "loss_max": self.largest[0],
            "loss_max_at": self.largest[1:].long(),
            "loss_nonfinite": self.nonfinite,
        }
        names = bucket_names(int(self.length))
        figures |= {
            f"loss_at/{name}": self.totals[i] / self.counts[i] for i, name in enumerate(names) if self.counts[i]
        }
        if self.pairs or self.reference_nonfinite:
            figures["reference_nonfinite"] = self.reference_nonfinite
        if self.pairs:
            figures |= {
                "tokens_risen": self.risen,
                "share_risen": self.risen.double() / self.pairs,
                "rise_mean": self.rise_total / self.pairs,
                "rise_max": self.largest_rise[0],
                "rise_max_at": self.largest_rise[1:].long(),
            }
        return figures

    def _quantile(self, thousandths: int) -> Tensor:
        below = self.histogram.cumsum(0)
        rank = -(-int(below[-1]) * thousandths // 1000)  # the quantile is the rank-th smallest; integers do not round
        index = int(torch.searchsorted(below, rank))
        if index >= INFINITE_BIN:
            return self.largest[0]
        middle = torch.tensor((index << BIN_SHIFT) + (1 << BIN_SHIFT - 1), dtype=torch.int32).view(torch.float32)
        return middle.to(self.largest).minimum(self.largest[0])


def position_bucket(position: Tensor) -> Tensor:
    """The number of the bucket that each position falls into: 0, 1, 2-3, 4-7, ... are numbers 0, 1, 2, 3, ..."""
    return torch.frexp(position.double()).exponent.long()


def bucket_names(length: int) -> list[str]:
    """The buckets of a block of ``length`` targets, by the positions that are in them: "0", "1", "2-3", ..."""
    names, first = [], 0
    while first < length:
        last = min(max(2 * first, 1), length) - 1
        names.append(str(first) if first == last else f"{first}-{last}")
        first = last + 1
    return names


def _worst_of(values: Tensor, where: Tensor, worst: Tensor) -> Tensor:
    """The worst of (n,) values with their (n, 3) places and of the worst row so far."""
    top = values == values.max()
    rows = torch.cat([values[top, None].double(), where[top].double()], 1)
    return _worst(torch.cat([worst[None], rows]))


def _worst(rows: Tensor) -> Tensor:
    """The row of (n, 4) with the largest value; of equal ones that with the lowest place, whatever their order."""

    def rank(row: Sequence[float]) -> tuple[float, list[float]]:
        return row[0], [-number for number in row[1:]]

    return rows.new_tensor(max(rows.tolist(), key=rank))
