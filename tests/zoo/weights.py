"""Weights that are not plainly the matrix they multiply with."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, floats, matrix, zoo


class OneLinear(Normed):
    def __init__(self, norm, width=6):
        super().__init__(norm)
        self.linear = nn.Linear(D, width)

    def forward(self, x):
        return self.linear(self.norm(x))


class Parametrized(OneLinear):
    """One linear map of ``width`` whose weight goes through ``change``, which gets the module."""

    def __init__(self, norm, change, width=6):
        super().__init__(norm, width)
        change(self.linear)


class Fn(nn.Module):
    """A function as a parametrization."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, w):
        return self.function(w)


def parametrized(name, about, function, rms=EITHER, layer=None, width=6, **words):
    def change(linear):
        parametrize.register_parametrization(linear, "weight", Fn(function), unsafe=True)

    add(name, about, lambda norm: Parametrized(norm, change, width), rms, layer, theme="weights", **words)


parametrized("ParametrizedAlias", "a parametrization that returns its argument", lambda w: w, FOLDS, EITHER)
parametrized("ParametrizedView", "a parametrization that returns a view of it", lambda w: w.view_as(w), FOLDS, EITHER)
parametrized("ParametrizedTranspose", "a square parametrization that transposes", lambda w: w.T, FOLDS, EITHER, width=D)
parametrized("ParametrizedCopy", "a parametrization that transposes and copies", lambda w: w.T.contiguous(), width=D)
parametrized("ParametrizedDouble", "a parametrization that doubles", lambda w: 2 * w)
parametrized(
    "ParametrizedSymmetric", "symmetric by a parametrization", lambda w: w.triu() + w.triu(1).T, REFUSED, width=D
)
parametrized("ParametrizedSoftmax", "rows made to sum to one", lambda w: w.softmax(-1), REFUSED)
parametrized("ParametrizedTernary", "ternary weights (BitNet)", lambda w: w + (w.sign() - w).detach(), REFUSED)

for made, about, verdict in [
    (parametrizations.weight_norm, "torch's weight_norm", EITHER),
    (parametrizations.spectral_norm, "torch's spectral_norm", EITHER),
    (parametrizations.orthogonal, "torch's orthogonal", REFUSED),
]:
    name = "Torch" + "".join(word.title() for word in made.__name__.split("_"))
    add(name, about, lambda norm, made=made: Parametrized(norm, made, D), verdict, theme="weights")

add(
    "OldWeightNorm",
    "the old weight_norm, a hook that sets a plain attribute",
    lambda norm: Parametrized(norm, lambda linear: nn.utils.weight_norm(linear)),
    EITHER,
    theme="weights",
)
add(
    "Pruned",
    "pruned: weight_orig times a mask",
    lambda norm: Parametrized(norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.3)),
    EITHER,
    theme="weights",
)
add(
    "Frozen",
    "requires_grad=False",
    lambda norm: Parametrized(norm, lambda linear: linear.requires_grad_(False)),
    FOLDS,
    theme="weights",
)


@zoo("everything is frozen", FOLDS)
class FrozenWhole(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.requires_grad_(False)


@zoo("the weight is rounded in forward", REFUSED)
class Rounded(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), (self.linear.weight * 8).round() / 8, self.linear.bias)


@zoo("the weight is standardized in forward", REFUSED)
class Standardized(OneLinear):
    def forward(self, x):
        w = self.linear.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return F.linear(self.norm(x), w, self.linear.bias)


@zoo("equalized learning rate: the weight times a constant", EITHER)
class ConstantScale(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight * D**-0.5, self.linear.bias)


@zoo("the weight times a learned scalar", EITHER)
class LearnedScale(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.s = nn.Parameter(torch.tensor(1.7))

    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight * self.s, self.linear.bias)


@zoo("the weight times a learned scale per row (DoRA without its norm)", EITHER)
class RowScale(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.s = matrix(6, 1)

    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight * self.s, self.linear.bias)


@zoo("DoRA: a magnitude per row times the normalized row", REFUSED)
class DoRA(RowScale):
    def forward(self, x):
        return F.linear(self.norm(x), self.s * F.normalize(self.linear.weight, dim=1), self.linear.bias)


@zoo("the weight times a triangular mask", EITHER, REFUSED)
class MaskedWeight(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.register_buffer("mask", torch.ones(6, D).tril())

    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight * self.mask, self.linear.bias)


@zoo("the weight plus the identity", REFUSED)
class PlusIdentity(OneLinear):
    def __init__(self, norm):
        super().__init__(norm, D)

    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight + torch.eye(D, dtype=x.dtype), self.linear.bias)


@zoo("LoRA beside the matrix: W x + B A x", FOLDS)
class LoRA(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return self.linear(h) + 0.5 * self.b(self.a(h))


@zoo("LoRA with raw matrices: x @ A @ B", FOLDS, REFUSED, why="bias")
class RawLoRA(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = matrix(D, 2), matrix(2, 6)

    def forward(self, x):
        h = self.norm(x)
        return self.linear(h) + 0.5 * (h @ self.a @ self.b)


@zoo("LoRA added to the weight in forward: (W + B A) x", EITHER)
class MergedLoRA(RawLoRA):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight + (self.a @ self.b).T, self.linear.bias)


@zoo("weight.detach(): the map is not trained", FOLDS)
class Detached(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x).detach(), self.linear.weight.detach(), self.linear.bias.detach())


@zoo("weight.data", FOLDS)
class Data(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight.data, self.linear.bias.data)


@zoo("the weight cast to the input's dtype", FOLDS)
class CastWeight(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype))


@zoo("the weight is a buffer", EITHER)
class BufferWeight(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.register_buffer("weight", matrix(6, D).detach())
        self.register_buffer("bias", matrix(6).detach())

    def forward(self, x):
        return F.linear(self.norm(x), self.weight, self.bias)


@zoo("the weight is a buffer that no state dict holds", REFUSED)
class HiddenBuffer(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.register_buffer("weight", torch.linspace(-1, 1, 6 * D).view(6, D).sin(), persistent=False)

    def forward(self, x):
        return F.linear(self.norm(x), self.weight)


@zoo("the weight is a plain tensor attribute", REFUSED)
class PlainTensor(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight = torch.linspace(-1, 1, 6 * D).view(6, D).sin()

    def forward(self, x):
        return F.linear(self.norm(x), self.weight.to(x.dtype))


@zoo("a constant matrix made in forward", REFUSED)
class ConstantMatrix(Normed):
    def forward(self, x):
        return self.norm(x) @ torch.ones(D, 6, dtype=x.dtype)


@zoo("a linear map kept in a plain list, so that the model does not know it", REFUSED)
class UnregisteredLinear(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        linear = nn.Linear(D, 6).double()
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(-1, 1, 6 * D).view(6, D).sin())
            linear.bias.copy_(torch.linspace(-1, 1, 6))
        self.hidden = [linear]

    def forward(self, x):
        return self.hidden[0](self.norm(x).double()).to(x.dtype)


@zoo("a hypernetwork: the matrix comes from another input", REFUSED, inputs=(floats("B", "T", D), floats("B", 3)))
class HyperNetwork(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.hyper = nn.Linear(3, 6 * D)

    def forward(self, x, z):
        return self.norm(x) @ self.hyper(z).view(-1, D, 6)


@zoo("a hypernetwork whose input is normed", FOLDS)
class HyperNetworkInput(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.hyper = nn.Linear(D, D * 6)

    def forward(self, x):
        return x @ self.hyper(self.norm(x[:, 0])).view(-1, D, 6)


@zoo("torch.func.functional_call of the linear map", FOLDS)
class FunctionalCall(OneLinear):
    def forward(self, x):
        return torch.func.functional_call(self.linear, dict(self.linear.named_parameters()), (self.norm(x),))


@zoo("torch.func.functional_call with a doubled weight", EITHER)
class FunctionalCallDoubled(OneLinear):
    def forward(self, x):
        parameters = {name: 2 * p for name, p in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, parameters, (self.norm(x),))


@zoo("torch.vmap over the linear map", FOLDS)
class Vmap(OneLinear):
    def forward(self, x):
        return torch.vmap(self.linear)(self.norm(x))


@zoo("torch.vmap over an ensemble of stacked weights", EITHER)
class VmapEnsemble(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight, self.bias = matrix(3, 6, D), matrix(3, 6)

    def forward(self, x):
        return torch.vmap(F.linear, in_dims=(None, 0, 0))(self.norm(x), self.weight, self.bias)


@zoo("one nn.Linear under two names", FOLDS)
class LinearTwoNames(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.alias = self.linear

    def forward(self, x):
        return self.alias(self.norm(x))


@zoo("nn.Linear with hooks that look and do nothing", FOLDS)
class WatchedLinear(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear.register_forward_hook(lambda module, inputs, output: None)
        self.linear.register_forward_pre_hook(lambda module, inputs: None)


@zoo("a forward hook that puts the linear map's output through tanh", FOLDS)
class HookOnOutput(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear.register_forward_hook(lambda module, inputs, output: output.tanh())


@zoo("a forward hook that adds the linear map's input to its output", REFUSED)
class HookAddsInput(OneLinear):
    def __init__(self, norm):
        super().__init__(norm, D)
        self.linear.register_forward_hook(lambda module, inputs, output: output + inputs[0])


@zoo("a forward pre-hook that squares the linear map's input", REFUSED)
class PreHookSquares(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear.register_forward_pre_hook(lambda module, inputs: (inputs[0].square(),))


@zoo("weights computed once from the weight and kept (a cache)", REFUSED)
class CachedWeight(OneLinear):
    def forward(self, x):
        if not hasattr(self.linear, "kept"):
            self.linear.kept = self.linear.weight.detach().sin()
        return F.linear(self.norm(x), self.linear.kept.to(x.dtype), self.linear.bias)


@zoo("a full backward hook on the linear map", FOLDS)
class BackwardHook(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear.register_full_backward_hook(lambda module, inputs, outputs: None)


@zoo("a parameter of a class of its own", EITHER)
class OwnParameter(OneLinear):
    class Marked(nn.Parameter):
        """Marks what is sharded, quantized or decayed."""

    def __init__(self, norm):
        super().__init__(norm)
        self.linear.weight = self.Marked(self.linear.weight.data)


@zoo("a run under torch's cache of parametrizations", EITHER)
class CachedParametrization(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        parametrizations.weight_norm(self.linear)

    def forward(self, x):
        with parametrize.cached():
            return super().forward(x) + super().forward(x.flip(1))
