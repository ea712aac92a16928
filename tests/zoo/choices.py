"""Choices by values: a mask, an index or an order that depends on the input and happens to do nothing in the run."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, REFUSED, D, Normed, zoo

RISING = [{"B": 2, "T": 5}, {"B": 2, "T": 6}, {"B": 3, "T": 7}, {"B": 1, "T": 9}]


def many(x):
    """A mask that is True for the sixth token and those after it, as a bound on lengths is: none in the given run."""
    return (torch.arange(x.shape[1]) >= 5)[:, None]


class Headed(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.head = nn.Linear(D, 3)


@zoo("torch.where that takes the raw input for no token of the run", REFUSED, sizes=RISING)
class WhereNeverChosen(Headed):
    def forward(self, x):
        return self.head(torch.where(many(x), x, self.norm(x)))


@zoo("masked tokens written over in place, none in the run", REFUSED, sizes=RISING)
class WriteNeverUsed(Headed):
    def forward(self, x):
        h = self.norm(x).clone()
        rows = many(x)[..., 0].expand(x.shape[:2])
        h[rows] = x[rows]
        return self.head(h)


@zoo("masked_scatter of other numbers, none in the run", REFUSED, sizes=RISING)
class ScatterNeverUsed(Headed):
    def forward(self, x):
        return self.head(self.norm(x).masked_scatter(many(x).expand_as(x), x))


@zoo("masked_fill with the value of a parameter, nowhere in the run", REFUSED, sizes=RISING)
class FillNeverUsed(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.value = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.head(self.norm(x).masked_fill(many(x), self.value))


@zoo("masked_fill with zero, nowhere in the run", EITHER, REFUSED, sizes=RISING)
class ZeroNeverUsed(Headed):
    def forward(self, x):
        return self.head(self.norm(x).masked_fill(many(x), 0.0))


@zoo("torch.where that takes zero for no token of the run", EITHER, REFUSED, sizes=RISING)
class WhereZeroNeverChosen(Headed):
    def forward(self, x):
        return self.head(torch.where(many(x), torch.zeros_like(x), self.norm(x)))


@zoo("picked by an index from the norm and the raw input, never the raw one in the run", REFUSED, sizes=RISING)
class PickNeverRaw(Headed):
    def forward(self, x):
        both = torch.stack([self.norm(x), x])
        return self.head(both.gather(0, many(x).long().expand(1, *x.shape))[0])


@zoo("rows by an index from the norm and the raw input, never the raw ones in the run", REFUSED, sizes=RISING)
class RowsNeverRaw(Headed):
    def forward(self, x):
        both = torch.stack([self.norm(x), x])
        return self.head(both[many(x)[:, 0].long(), :, torch.arange(x.shape[1])])


@zoo("features in an order that depends on the input, the usual one in the run", REFUSED, sizes=RISING)
class OrderFromInput(Headed):
    def forward(self, x):
        order = (torch.arange(D) + many(x).long()) % D
        return self.head(self.norm(x).gather(-1, order.expand(x.shape)))


@zoo("features by one index that depends on the input, the usual one in the run", REFUSED, sizes=RISING)
class IndexFromInput(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[..., (torch.arange(D) + many(x).any().long()) % D])


@zoo("features by index_select that depends on the input, the usual one in the run", REFUSED, sizes=RISING)
class SelectFromInput(Headed):
    def forward(self, x):
        return self.head(self.norm(x).index_select(-1, (torch.arange(D) + many(x).any().long()) % D))


@zoo("a matrix chosen by an index that depends on the input, always the first in the run", REFUSED, sizes=RISING)
class MatrixFromInput(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = nn.Parameter(torch.randn(2, D, 3))

    def forward(self, x):
        return self.norm(x) @ self.w[many(x).any().long()]


@zoo("a matrix chosen by torch.where, always the first in the run", REFUSED, sizes=RISING)
class MatrixByWhere(MatrixFromInput):
    def forward(self, x):
        return self.norm(x) @ torch.where(many(x).any(), self.w[1], self.w[0])


@zoo("columns of the matrix in an order that depends on the input, the usual one in the run", REFUSED, sizes=RISING)
class ColumnsFromInput(Headed):
    def forward(self, x):
        order = (torch.arange(D) + many(x).any().long()) % D
        return F.linear(self.norm(x), self.head.weight[:, order], self.head.bias)
