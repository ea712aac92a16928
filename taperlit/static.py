"""What keeps tokens alike in size by the weights alone, and so costs nothing at inference.

Both functions change a weight in place, and are meant to be called after every optimizer step. What they leave is a
weight as any other: it is saved, loaded and folded without them.
"""

import torch
from torch import Tensor

from taperlit.errors import TaperlitError


@torch.no_grad()
def equalize_rows(weight: Tensor) -> None:
    """Give the rows of an embedding one norm, the mean of theirs: ``w_i <- w_i mean_j |w_j| / |w_i|``.

    That is the nearest matrix whose rows have equal norms. The mean follows what an optimizer does to all of them, so
    that the common norm is learned. Rows that are 0 stay 0 and do not count.

    Args:
        weight: (rows, width), in place; a DTensor may be split in any way, and then every process must ask.
    """
    # Not vector_norm: of rows that are split between processes torch 2.13 sums the parts' norms wrongly.
    norms = weight.to(_wide(weight)).square().sum(1, keepdim=True).sqrt()  # (rows, 1)
    there = norms > 0
    mean = norms.sum() / there.sum().clamp(min=1)
    weight.mul_(torch.where(there, mean / norms, 1.0))


@torch.no_grad()
def cap_singular_values(weight: Tensor, multiple: float) -> None:
    """Project a matrix to singular values of at most ``multiple`` times their root mean square.

    With ``W = U S V^T`` it becomes ``U min(S, cap) V^T``, the nearest matrix with that bound, where ``cap = multiple *
    |W|_F / sqrt(n)`` and ``n`` singular values there are. So no input of a given size, whatever its direction, has an
    output larger than ``multiple`` times a typical direction's. A cap on the norms of the columns would not say so: in
    small trained models no column is three times the median, while the largest singular value is up to ten times.

    Capping lowers the root mean square too, a little; called again and again it settles where the bound holds for the
    matrix as it is. Below the cap nothing changes, to the last bit.

    Args:
        weight: (d_out, d_in) or (d_in, d_out), in place; whole, on this process.
        multiple: at least 1; of a random square matrix it is 2, and less of others.

    Raises:
        TaperlitError: the weight is not finite.
    """
    wide = weight.to(_wide(weight))
    short = wide if wide.shape[0] <= wide.shape[1] else wide.T  # (n, m), n <= m
    gram = short @ short.T  # (n, n), whose eigenvalues are the squares
    if not gram.isfinite().all():
        raise TaperlitError("a weight is not finite, so its singular values cannot be capped; add FiniteGuard.")
    squares, directions = torch.linalg.eigh(gram)
    cap = multiple * (gram.trace() / len(gram)).sqrt()
    values = squares.clamp(min=0).sqrt()
    excess = (1 - cap / values.clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0)  # 0 of most
    short -= (directions * excess) @ (directions.T @ short)
    weight.copy_(wide)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
