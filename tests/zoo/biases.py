"""Biases that nobody reads, that are read elsewhere, or that are not what they look like."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import BIAS, EITHER, FOLDS, REFUSED, D, Normed, add, floats, matrix, zoo


class OneLinear(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6)


@zoo("a bias that forward does not read", EITHER, REFUSED, why=BIAS)
class UnreadBias(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight)


add(
    "UnreadBiasVouchedFor",
    "a bias that forward does not read, named in untouched=",
    UnreadBias,
    FOLDS,
    REFUSED,
    why=BIAS,
    options={"untouched": ("linear.bias",)},
)


@zoo("a scale between the matrix and the bias", FOLDS, EITHER, why=BIAS)
class ScaleBeforeBias(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight) * 0.5 + self.linear.bias


@zoo("nn.Linear with a learned scale between the matrix and the bias (a subclass)", FOLDS, EITHER, why=BIAS)
class ScaledLinear(Normed):
    class Linear(nn.Linear):
        def __init__(self):
            super().__init__(D, 6)
            self.scale = matrix(6)

        def forward(self, x):
            return F.linear(x, self.weight) * self.scale + self.bias

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = self.Linear()

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("an activation between the matrix and the bias", FOLDS, REFUSED, why=BIAS)
class BiasAfterActivation(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight).relu() + self.linear.bias


@zoo("the bias is added twice", FOLDS, EITHER, why=BIAS)
class BiasTwice(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)) + self.linear.bias


@zoo("the bias is subtracted", FOLDS, EITHER, why=BIAS)
class BiasSubtracted(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight) - self.linear.bias


@zoo("F.linear with the bias negated in forward", FOLDS, EITHER, why=BIAS)
class BiasNegated(OneLinear):
    def forward(self, x):
        return F.linear(self.norm(x), self.linear.weight, -self.linear.bias)


@zoo("F.linear with half of a longer bias", FOLDS, EITHER, why=BIAS)
class BiasSliced(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight, self.bias = matrix(6, D), matrix(12)

    def forward(self, x):
        return F.linear(self.norm(x), self.weight, self.bias[:6]) * self.bias[6:]


@zoo("addmm with beta = 0.5", FOLDS, EITHER, why=BIAS, inputs=(floats("B", D),))
class AddmmBeta(OneLinear):
    def forward(self, x):
        return torch.addmm(self.linear.bias, self.norm(x), self.linear.weight.t(), beta=0.5)


@zoo("addmm with alpha = 2", FOLDS, EITHER, inputs=(floats("B", D),))
class AddmmAlpha(OneLinear):
    def forward(self, x):
        return torch.addmm(self.linear.bias, self.norm(x), self.linear.weight.t(), alpha=2)


@zoo("addmm that adds the raw input and no bias", FOLDS, REFUSED, why=BIAS, inputs=(floats("B", D),))
class AddmmResidual(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight = matrix(D, D)

    def forward(self, x):
        return torch.addmm(x, self.norm(x), self.weight)


@zoo("addmm that adds the norm itself", REFUSED, inputs=(floats("B", D),))
class AddmmOfTheNorm(AddmmResidual):
    def forward(self, x):
        h = self.norm(x)
        return torch.addmm(h, h, self.weight)


@zoo("two linear maps with one weight and a bias each, fed by one norm", FOLDS, EITHER)
class OneWeightTwoBiases(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(D, 6), nn.Linear(D, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        h = self.norm(x)
        return self.a(h).sigmoid() * self.b(h)


@zoo("two linear maps with one weight, one of them without a bias", FOLDS, EITHER)
class OneWeightOneBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(D, 6), nn.Linear(D, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        h = self.norm(x)
        return self.a(h).sigmoid() * self.b(h)


@zoo("two linear maps with one bias, both fed by the norm", FOLDS)
class SharedBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(D, 6), nn.Linear(D, 6)
        self.b.bias = self.a.bias

    def forward(self, x):
        h = self.norm(x)
        return self.a(h).sigmoid() * self.b(h)


@zoo("two linear maps with one bias, one fed by the norm and one by the raw input", FOLDS)
class BiasSharedWithRaw(SharedBias):
    def forward(self, x):
        return self.a(self.norm(x)).sigmoid() * self.b(x)


@zoo("a bias that another part of the model reads as a vector", FOLDS, EITHER, why=BIAS)
class BiasReadElsewhere(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)) + self.linear.bias.softmax(0)


@zoo("a bias that goes into the output as a penalty", FOLDS, EITHER, why=BIAS)
class BiasPenalty(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)), self.linear.bias.square().sum()


@zoo("a weight that goes into the output as a penalty", REFUSED, why="elsewhere|other|also|too|differ")
class WeightPenalty(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)), self.linear.weight.square().sum()


@zoo("weight and bias of the root, the bias for something else", FOLDS, EITHER, why=BIAS)
class UnrelatedBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight, self.bias = matrix(6, D), matrix(6)

    def forward(self, x):
        return F.linear(self.norm(x), self.weight).tanh() * self.bias


@zoo("parameters called in_weight and in_bias", FOLDS)
class PrefixedNames(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.in_weight, self.in_bias = matrix(6, D), matrix(6)
        self.out_weight, self.out_bias = matrix(D, 6), matrix(D)

    def forward(self, x):
        h = F.linear(self.norm(x), self.in_weight, self.in_bias)
        return x + F.linear(h.relu(), self.out_weight, self.out_bias)


@zoo("a matrix in an nn.ParameterList", FOLDS, REFUSED, why=BIAS)
class ListedMatrices(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.matrices = nn.ParameterList([matrix(6, D), matrix(4, 6)])

    def forward(self, x):
        return F.linear(F.linear(self.norm(x), self.matrices[0]).relu(), self.matrices[1])


@zoo("weight and bias in an nn.ParameterDict", FOLDS)
class MappedMatrices(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.maps = nn.ParameterDict({"weight": matrix(6, D), "bias": matrix(6)})

    def forward(self, x):
        return F.linear(self.norm(x), self.maps["weight"], self.maps["bias"])


@zoo("linear maps in an nn.ModuleDict with odd keys", FOLDS)
class OddKeys(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.maps = nn.ModuleDict({"a-b c": nn.Linear(D, 6), "bias": nn.Linear(D, 6), "weight": nn.Linear(D, 6)})

    def forward(self, x):
        h = self.norm(x)
        return sum(linear(h) for linear in self.maps.values())


@zoo("nn.Linear whose bias attribute is a plain number", FOLDS, REFUSED, why=BIAS)
class NumberAsBias(Normed):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = matrix(6, D), 0.5

        def forward(self, x):
            return F.linear(x, self.weight) + self.bias

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = self.Linear()

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("a bias registered as None that forward reads", FOLDS)
class NoneBias(Normed):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = matrix(6, D)
            self.register_parameter("bias", None)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = self.Linear()

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("nn.Linear(bias=False) with a hook of its own that changes the output", FOLDS)
class HookedWithoutBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6, bias=False)
        self.linear.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("code that asks whether the linear map has a bias", FOLDS, EITHER)
class AsksForBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6, bias=False)

    def forward(self, x):
        y = self.linear(self.norm(x))
        return y if self.linear.bias is None else y + 1


@zoo("one bias per token: (T, d_out)", FOLDS, inputs=(floats("B", 5, D),))
class BiasPerToken(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.weight, self.bias = matrix(6, D), matrix(5, 6)

    def forward(self, x):
        return F.linear(self.norm(x), self.weight) + self.bias
