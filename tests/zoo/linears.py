"""Ways to write a linear map with a matrix of one's own."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import BIAS, EITHER, FOLDS, REFUSED, SHARED, D, Normed, floats, matrix, zoo


@zoo("nn.Linear", FOLDS)
class Plain(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("nn.Linear without a bias gains one", FOLDS)
class PlainWithoutBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("nn.Sequential of norm, identity, dropout, linear", FOLDS)
class InSequential(nn.Sequential):
    def __init__(self, norm):
        super().__init__(norm(D), nn.Identity(), nn.Dropout(0.5), nn.Linear(D, D), nn.GELU(), nn.Linear(D, 3))


@zoo("norm without gain and bias: only c is left", FOLDS)
class WithoutAffine(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm(D, elementwise_affine=False), nn.Linear(D, 6, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("LayerNorm without bias: centring alone", None, FOLDS)
class CentredWithoutBias(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.w = norm(D, bias=False), matrix(6, D)

    def forward(self, x):
        return F.linear(self.norm(x), self.w)


@zoo("F.linear(x, self.w): nobody reads a bias", FOLDS, REFUSED, why=BIAS)
class RawMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(6, D)

    def forward(self, x):
        return F.linear(self.norm(x), self.w)


@zoo("F.linear(x, self.w), square", FOLDS, REFUSED, why=BIAS)
class RawSquareMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, D)

    def forward(self, x):
        return F.linear(self.norm(x), self.w)


@zoo("F.linear(x, self.weight) in a class of its own, like nn.Linear but without a bias", FOLDS, REFUSED, why=BIAS)
class OwnLinearWithoutBias(Normed):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = matrix(6, D)

        def forward(self, x):
            return F.linear(x, self.weight)

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = self.Linear()

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("F.linear(x, self.w, self.b): the bias has a name of its own", FOLDS, EITHER, why=BIAS)
class RawMatrixAndBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w, self.b = matrix(6, D), matrix(6)

    def forward(self, x):
        return F.linear(self.norm(x), self.w, self.b)


@zoo("x @ self.w", FOLDS, REFUSED, why=BIAS)
class MatmulRaw(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, 6)

    def forward(self, x):
        return self.norm(x) @ self.w


@zoo("x @ self.w, square", FOLDS, REFUSED, why=BIAS)
class MatmulSquare(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, D)

    def forward(self, x):
        return self.norm(x) @ self.w


@zoo("x @ self.w.T, square", FOLDS, REFUSED, why=BIAS)
class MatmulTransposed(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.T


@zoo("x @ self.w + self.b", FOLDS, EITHER, why=BIAS)
class MatmulPlusBias(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w, self.b = matrix(D, 6), matrix(6)

    def forward(self, x):
        return self.norm(x) @ self.w + self.b


@zoo("GPT-2's Conv1D: addmm with the matrix as (d_in, d_out)", FOLDS)
class Conv1D(Normed):
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = matrix(D, 6), matrix(6)

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, D), self.weight).view(*x.shape[:-1], 6)

    def __init__(self, norm):
        super().__init__(norm)
        self.map = self.Map()

    def forward(self, x):
        return self.map(self.norm(x))


@zoo("x @ self.w.t().contiguous(), square", EITHER)
class TransposedCopy(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.t().contiguous()


@zoo("x @ self.w.contiguous().t(), square", FOLDS, EITHER)
class TransposedAfterCopy(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.contiguous().t()


@zoo("x @ self.w.clone(), square", FOLDS, EITHER)
class ClonedMatrix(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.clone()


@zoo("x @ self.w.flip(1): the output's features turned round", EITHER)
class FlippedMatrix(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.flip(1)


@zoo("x @ self.w.view(d, -1) of a matrix stored as (4, 12)", EITHER)
class ViewedMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(4, 12)

    def forward(self, x):
        return self.norm(x) @ self.w.view(D, -1)


@zoo("x @ self.w.view(d, d) of a square matrix stored as (d, d / 2, 2)", EITHER)
class ViewedSquareMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, D // 2, 2)

    def forward(self, x):
        return self.norm(x) @ self.w.view(D, D)


@zoo("F.linear with a slice of one flat parameter", EITHER)
class FlatParameter(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.flat = matrix(6 * D + 6)

    def forward(self, x):
        return F.linear(self.norm(x), self.flat[: 6 * D].view(6, D), self.flat[6 * D :])


@zoo("x @ self.w.as_strided((d, d), (1, d))", EITHER)
class StridedMatrix(MatmulSquare):
    def forward(self, x):
        return self.norm(x) @ self.w.as_strided((D, D), (1, D))


@zoo("two halves of one matrix, both fed by the norm", EITHER)
class HalvesOfAMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(2 * D, D)

    def forward(self, x):
        a, b = self.w.chunk(2)
        return F.linear(self.norm(x), a) * F.linear(self.norm(x), b).sigmoid()


@zoo("two halves of one matrix, one fed by the norm and one by the raw input", EITHER)
class HalfOfAMatrix(HalvesOfAMatrix):
    def forward(self, x):
        return F.linear(self.norm(x), self.w[:D]) * F.linear(x, self.w[D:])


@zoo("a square matrix and its transpose, both fed by the norm", REFUSED, why="transposed|both|twice|too")
class BothWays(MatmulSquare):
    def forward(self, x):
        h = self.norm(x)
        return h @ self.w + F.linear(h, self.w)


@zoo("a tied autoencoder: W in, W transposed out", REFUSED, why=SHARED)
class TiedAutoencoder(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x)).relu() @ self.linear.weight


@zoo("einsum btd,dh->bth", FOLDS, EITHER)
class EinsumIn(MatmulRaw):
    def forward(self, x):
        return torch.einsum("btd,dh->bth", self.norm(x), self.w)


@zoo("einsum btd,dh->bth, square", FOLDS, EITHER)
class EinsumSquare(MatmulSquare):
    def forward(self, x):
        return torch.einsum("btd,dh->bth", self.norm(x), self.w)


@zoo("einsum btd,hd->bth, square", FOLDS, EITHER)
class EinsumSquareTransposed(MatmulSquare):
    def forward(self, x):
        return torch.einsum("btd,hd->bth", self.norm(x), self.w)


@zoo("einsum hd,btd->bht, the matrix first", EITHER)
class EinsumMatrixFirst(MatmulSquare):
    def forward(self, x):
        return torch.einsum("hd,btd->bht", self.w, self.norm(x))


@zoo("einsum btd,td->bt: a vector of its own per token", FOLDS, EITHER, inputs=(floats("B", D, D),))
class EinsumPerToken(MatmulSquare):
    def forward(self, x):
        return torch.einsum("btd,td->bt", self.norm(x), self.w)


@zoo("torch.tensordot", FOLDS, EITHER)
class Tensordot(MatmulSquare):
    def forward(self, x):
        return torch.tensordot(self.norm(x), self.w, dims=1)


@zoo("torch.tensordot over the matrix's second axis", FOLDS, EITHER)
class TensordotSecond(MatmulSquare):
    def forward(self, x):
        return torch.tensordot(self.norm(x), self.w, dims=([2], [1]))


@zoo("torch.inner", FOLDS, EITHER)
class Inner(MatmulSquare):
    def forward(self, x):
        return torch.inner(self.norm(x), self.w)


@zoo("x @ v with a vector: a head with one output", EITHER)
class VectorHead(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.v = matrix(D)

    def forward(self, x):
        return self.norm(x) @ self.v


@zoo("(x * v).sum(-1): a dot product by hand", EITHER)
class DotByHand(VectorHead):
    def forward(self, x):
        return (self.norm(x) * self.v).sum(-1)


@zoo("mm(w, x.T).T: the matrix on the left", EITHER, inputs=(floats("B", D),))
class MatrixOnTheLeft(MatmulSquare):
    def forward(self, x):
        return torch.mm(self.w, self.norm(x).T).T


@zoo("a matrix broadcast as (1, d, d) in matmul", EITHER)
class BroadcastMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(1, D, D)

    def forward(self, x):
        return self.norm(x) @ self.w


@zoo("linalg.multi_dot of x and two matrices", FOLDS, EITHER, inputs=(floats("B", D),))
class MultiDot(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = matrix(D, 3), matrix(3, D)

    def forward(self, x):
        return torch.linalg.multi_dot([self.norm(x), self.a, self.b])


@zoo("torch.mm with out=", FOLDS, EITHER, inputs=(floats("B", D),))
class OutArgument(MatmulRaw):
    def forward(self, x):
        with torch.no_grad():
            return torch.mm(self.norm(x), self.w, out=x.new_empty(x.shape[0], 6))


@zoo("a linear map written as an autograd.Function", FOLDS)
class OwnFunction(Normed):
    class Map(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            ctx.save_for_backward(x, w)
            return x @ w.t() + b

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad @ w, grad.flatten(0, -2).T @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.Map.apply(self.norm(x), self.linear.weight, self.linear.bias)


@zoo("nn.Bilinear of the norm and the raw input", EITHER)
class BilinearWithRaw(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.bilinear = nn.Bilinear(D, D, 6)

    def forward(self, x):
        return self.bilinear(self.norm(x), x)


@zoo("nn.Bilinear of the norm with itself", REFUSED)
class BilinearWithItself(BilinearWithRaw):
    def forward(self, x):
        h = self.norm(x)
        return self.bilinear(h, h)


@zoo("low rank: x @ (A @ B)", EITHER)
class LowRank(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = matrix(D, 3), matrix(3, 6)

    def forward(self, x):
        return self.norm(x) @ (self.a @ self.b)


@zoo("low rank: (x @ A) @ B", FOLDS, REFUSED, why=BIAS)
class LowRankInTurn(LowRank):
    def forward(self, x):
        return self.norm(x) @ self.a @ self.b
