"""What a watcher of tensor operations does not see: state, numpy, scripts, operators of one's own."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, zoo


class OneLinear(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, D)


@zoo("the linear map done by numpy", REFUSED)
class ByNumpy(OneLinear):
    def forward(self, x):
        w, b = self.linear.weight.detach().numpy(), self.linear.bias.detach().numpy()
        return torch.from_numpy(np.matmul(self.norm(x).detach().numpy(), w.T) + b)


@zoo("mapped by torch, and its mean taken by numpy", REFUSED, whole=True)
class MeanByNumpy(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        return self.linear(h) + float(np.mean(h.detach().numpy()))


@zoo("numpy writes into the norm's memory", REFUSED, whole=True)
class WrittenByNumpy(OneLinear):
    def forward(self, x):
        h = self.norm(x).detach().clone()
        h.numpy()[..., 0] = 1.0
        return self.linear(h)


@zoo("kept on the module and read by another", REFUSED)
class KeptOnModule(OneLinear):
    def forward(self, x):
        self.kept = self.norm(x)
        return self.linear(self.kept) + self.late()

    def late(self):
        return self.kept.tanh()


@zoo("the last batch's norm is read in the next call", EITHER)
class LastBatch(OneLinear):
    last = None

    def forward(self, x):
        h = self.norm(x).detach()
        y = self.linear(h) + (0 if self.last is None else self.last.mean())
        self.last = h
        return y


@zoo("counts its calls in a buffer", FOLDS)
class CountsCalls(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.linear(self.norm(x))


@zoo("a running mean of its input in a buffer, added to the output", EITHER)
class RunningMean(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.register_buffer("mean", torch.zeros(D))

    @torch.no_grad()
    def forward(self, x):
        self.mean.lerp_(x.mean((0, 1)), 0.5)
        return self.linear(self.norm(x)) + self.mean


@zoo("a running mean of the norm in a buffer", REFUSED)
class RunningMeanOfNorm(RunningMean):
    @torch.no_grad()
    def forward(self, x):
        h = self.norm(x)
        self.mean.lerp_(h.mean((0, 1)), 0.5)
        return self.linear(h)


@zoo("changes its own weight in forward (fast weights)", REFUSED, whole=True)
class FastWeights(OneLinear):
    @torch.no_grad()
    def forward(self, x):
        y = self.linear(self.norm(x))
        self.linear.weight.add_(0.1 * torch.eye(D, dtype=x.dtype))
        return y


@zoo("changes its input in place", EITHER)
class ChangesInput(OneLinear):
    def forward(self, x):
        with torch.no_grad():
            x *= 1.5
        return self.linear(self.norm(x))


@zoo("a table made in the first call, of the first input's dtype (rotary caches)", FOLDS)
class LazyTable(OneLinear):
    table = None

    def __init__(self, norm):
        super().__init__(norm)
        self.out = nn.Linear(D, 6)

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, D).to(x.dtype)
        return self.out(self.linear(self.norm(x)) * self.table)


@zoo("an operator of one's own that reads the norm and the matrix", REFUSED)
class OwnOperator(OneLinear):
    def forward(self, x):
        return own_operator(self.norm(x), self.linear.weight)


@torch.library.custom_op("zoo::gated_linear", mutates_args=())
def own_operator(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x W^T`` times the sigmoid of the mean of ``x``."""
    return F.linear(x, w) * x.mean(-1, keepdim=True).sigmoid()


@zoo("a linear map that calls itself nn.Linear and is not", REFUSED)
class FalseLinear(Normed):
    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x.abs())

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = self.Linear(D, D)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("a linear map over a random half of its input", EITHER)
class RandomHalf(OneLinear):
    def forward(self, x):
        keep = torch.randperm(D)[: D // 2]
        return F.linear(self.norm(x)[..., keep], self.linear.weight[:, keep], self.linear.bias)


@zoo("two norms told apart by isinstance", EITHER)
class AsksForClass(OneLinear):
    def forward(self, x):
        y = self.linear(self.norm(x))
        return y + isinstance(self.norm, nn.RMSNorm | nn.LayerNorm)


@zoo("norms found by a loop over modules", FOLDS)
class LoopsOverNorms(OneLinear):
    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                x = module(x)
        return self.linear(x)


@zoo("the norm is kept in a plain list as well", EITHER)
class NormInList(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.listed = [self.norm]

    def forward(self, x):
        return self.linear(self.listed[0](x))


@zoo("the norm is kept in an nn.ModuleDict and called by key", FOLDS)
class NormByKey(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.parts = nn.ModuleDict({"layer.norm".replace(".", "_"): norm(D), "out": nn.Linear(D, 6)})

    def forward(self, x):
        return self.parts["out"](self.parts["layer_norm"](x))


@zoo("forward swapped on the instance", EITHER)
class ForwardOnInstance(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        inner = self.linear.forward
        self.linear.forward = lambda x: inner(x) + x.tanh()

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("the norm's parameters used by F.linear's neighbour, not the norm", EITHER)
class NormByFunction(OneLinear):
    def forward(self, x):
        y = F.rms_norm(x, (D,), self.norm.weight, 1e-6)
        return self.linear(self.norm(x)) + y


@zoo("a nested tensor of rows of different lengths", EITHER, why=".")
class Nested(OneLinear):
    def forward(self, x):
        rows = [row[: len(row) - i % 2] for i, row in enumerate(x)]
        nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
        return self.linear(self.norm(nested)).values()


@zoo("traced by torch.jit", EITHER)
class Traced(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.example = nn.Linear(D, D)
        self.traced = torch.jit.trace(nn.Sequential(self.example, nn.Tanh()), torch.zeros(1, D))

    def forward(self, x):
        return self.traced(self.norm(x))


@zoo("threads: the two branches run at once", FOLDS)
class Threads(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        a = torch.jit.fork(lambda: self.linear(h))
        return torch.jit.wait(a) + x


@zoo("a Python thread reads the norm", REFUSED, whole=True)
class PythonThread(OneLinear):
    def forward(self, x):
        from concurrent.futures import ThreadPoolExecutor

        h = self.norm(x)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: h.detach().tanh()).result()
        return self.linear(h) + other


@zoo("the linear map runs in a Python thread", EITHER, why=".")
class MapInThread(OneLinear):
    def forward(self, x):
        from concurrent.futures import ThreadPoolExecutor

        h = self.norm(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: self.linear(h)).result()
