"""Mixtures of experts, and other branches that a run may never take."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, matrix, zoo

SHORT = [{"B": 2, "T": 5}] * 4
UNTOUCHED = r"did not touch|untouched|never"


class Experts(Normed):
    """A router and ``n`` expert MLPs."""

    n = 3

    def __init__(self, norm):
        super().__init__(norm)
        self.router = nn.Linear(D, self.n)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D)) for _ in range(self.n))


@zoo("all experts on all tokens, weighted by a softmax", FOLDS)
class SoftMixture(Experts):
    def forward(self, x):
        h = self.norm(x)
        weights = self.router(h).softmax(-1)
        return x + sum(weights[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))


@zoo("all experts on all tokens, top 1 by a one-hot weight", FOLDS)
class HardMixture(Experts):
    def forward(self, x):
        h = self.norm(x)
        weights = F.one_hot(self.router(h).argmax(-1), self.n).to(x.dtype)
        return x + sum(weights[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))


class TopK(Experts):
    """Mixtral's loop: the tokens of each expert are picked and added back."""

    bias: tuple[float, ...] = (0.0, 0.0, 0.0)

    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        scores = self.router(h) + torch.tensor(self.bias, dtype=x.dtype)
        weights, picked = scores.softmax(-1).topk(2, -1)
        out = torch.zeros_like(x).flatten(0, 1)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(picked == i)
            if rows.numel():
                out.index_add_(0, rows, expert(h[rows]) * weights[rows, place, None])
        return x + out.view_as(x)


class TopKSelect(TopK):
    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        picked = (self.router(h) + torch.tensor(self.bias, dtype=x.dtype)).argmax(-1)
        out = torch.zeros_like(x).flatten(0, 1)
        for i, expert in enumerate(self.experts):
            rows = (picked == i).nonzero().squeeze(1)
            if rows.numel():
                out.index_copy_(0, rows, expert(h.index_select(0, rows)))
        return x + out.view_as(x)


class NeverRouted(TopK):
    """The last expert gets no token in any batch."""

    bias = (0.0, 0.0, -1e9)


class NeverRoutedSelect(TopKSelect):
    bias = (0.0, 0.0, -1e9)


WIDE = [{"B": 4, "T": 16}] * 4
for cls, about, verdict in [
    (TopK, "top 2 of 3 by h[rows] and index_add_ (Mixtral)", EITHER),
    (TopKSelect, "top 1 of 3 by index_select and index_copy_ (Switch)", EITHER),
    (NeverRouted, "an expert that is never routed to", REFUSED),
    (NeverRoutedSelect, "an expert that is never routed to, index_select", REFUSED),
]:
    why = rf"{UNTOUCHED}|{'not a linear map'}" if verdict == REFUSED else "."
    add(cls.__name__, about, cls, verdict, theme="experts", sizes=WIDE, why=why)


@zoo("experts stacked in one parameter, bmm", EITHER)
class StackedBmm(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(3, D, 6)

    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        return torch.bmm(h.expand(3, -1, -1), self.w)


@zoo("experts stacked in one parameter, square, bmm with the transpose", FOLDS, EITHER)
class StackedSquare(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(3, D, D)

    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        return torch.bmm(h.expand(3, -1, -1), self.w.transpose(1, 2))


@zoo("experts stacked in one parameter, einsum btd,edh->bteh", EITHER)
class StackedEinsum(StackedBmm):
    def forward(self, x):
        return torch.einsum("btd,edh->bteh", self.norm(x), self.w)


@zoo("experts stacked in one parameter, indexed one by one", EITHER)
class StackedIndexed(StackedBmm):
    def forward(self, x):
        h = self.norm(x)
        return torch.stack([h @ self.w[i] for i in range(3)])


@zoo("experts stacked in one parameter, one of them used, the others by the raw input", EITHER)
class StackedHalfRaw(StackedBmm):
    def forward(self, x):
        return self.norm(x) @ self.w[0] + x @ self.w[1] * (x @ self.w[2])


@zoo("experts stacked in one parameter, unbound", EITHER)
class StackedUnbound(StackedBmm):
    def forward(self, x):
        h = self.norm(x)
        return sum((h @ w).relu() for w in self.w.unbind())


@zoo("soft MoE: slots as weighted sums of the normed tokens", EITHER, REFUSED)
class SoftMoE(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.slots, self.linear = matrix(D, 4), nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        logits = h @ self.slots
        y = self.linear(logits.softmax(1).mT @ h)
        return x + logits.softmax(2) @ y


@zoo("soft MoE whose dispatch does not sum to one", EITHER, REFUSED)
class SoftDispatch(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.router, self.linear = nn.Linear(D, 4), nn.Linear(D, D)

    def forward(self, x):
        return self.linear(self.router(x).sigmoid().mT @ self.norm(x))


@zoo("mixture of depths: half the tokens go through the block", FOLDS)
class MixtureOfDepths(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.router, self.up, self.down = nn.Linear(D, 1), nn.Linear(D, 16), nn.Linear(16, D)

    def forward(self, x):
        index = self.router(x).squeeze(-1).topk(x.shape[1] // 2, 1).indices[..., None].expand(-1, -1, D)
        chosen = x.gather(1, index)
        return x.scatter_add(1, index, self.down(self.up(self.norm(chosen)).relu()))


class Lengths(Normed):
    """One linear map for long inputs and one for short ones."""

    def __init__(self, norm):
        super().__init__(norm)
        self.long, self.short = nn.Linear(D, 6), nn.Linear(D, 6)

    def forward(self, x):
        h = self.norm(x)
        return self.long(h) if x.shape[1] > 4 else self.short(h)


BOTH = [{"B": 2, "T": 5}, {"B": 2, "T": 3}, {"B": 1, "T": 7}, {"B": 1, "T": 2}]
add(
    "BranchNotTaken",
    "if x.shape[1] > 4, and the run is long",
    Lengths,
    REFUSED,
    theme="experts",
    why=rf"short.*({UNTOUCHED})|({UNTOUCHED}).*short",
    sizes=BOTH,
)
add("BothBranchesRun", "if x.shape[1] > 4, and fold is given runs of both kinds", Lengths, FOLDS, theme="experts",
    sizes=BOTH, more=1)  # fmt: skip
add("BranchVouchedFor", "if x.shape[1] > 4, the short one named in untouched=", Lengths, FOLDS, theme="experts",
    sizes=SHORT, options={"untouched": ("short.*",)})  # fmt: skip


class EarlyExit(Normed):
    """Leaves after the first head if it is sure."""

    def __init__(self, norm, sure=1e9):
        super().__init__(norm)
        self.exit, self.linear, self.last, self.head = nn.Linear(D, 3), nn.Linear(D, D), norm(D), nn.Linear(D, 3)
        self.sure = sure

    def forward(self, x):
        early = self.exit(self.norm(x))
        if early.abs().amax() > self.sure:
            return early
        return self.head(self.last(x + self.linear(x).relu()))


add("EarlyExitNotTaken", "an early exit that the run does not take", EarlyExit, FOLDS, theme="experts")
add(
    "EarlyExitTaken",
    "an early exit that the run takes: the last norm does not run",
    lambda norm: EarlyExit(norm, 0.0),
    REFUSED,
    theme="experts",
    blames="last",
    why="did not run",
)


@zoo("a branch on the norm's values through a linear map, one side never taken", REFUSED, why=UNTOUCHED)
class ValueBranch(Lengths):
    def forward(self, x):
        h = self.norm(x)
        y = self.long(h)
        return y if y.isfinite().all() else self.short(h)


@zoo("a branch to a linear map of the raw input, one side never taken", EITHER)
class RawBranch(Lengths):
    def forward(self, x):
        y = self.long(self.norm(x))
        return y if x.shape[1] > 1 else y + self.short(x)


@zoo("a parameter that is never used", EITHER)
class UnusedParameter(Lengths):
    def forward(self, x):
        return self.long(self.norm(x))


@zoo("a linear map that short inputs reach raw, and fold is given runs of both kinds", REFUSED, sizes=BOTH, more=1)
class RawWhenShort(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x)) + (self.linear(x) if x.shape[1] < 4 else 0)
