"""What happens to the feature axis between the norm and the linear map."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, floats, matrix, zoo


class Into(Normed):
    """A norm and a linear map of ``width`` features."""

    width = D

    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(self.width, 6)


@zoo("token mixing with as many tokens as features", REFUSED, inputs=(floats("B", D, D),))
class TokenMixingSquare(Into):
    def forward(self, x):
        return self.linear(self.norm(x).transpose(1, 2)).transpose(1, 2)


@zoo("token mixing with fewer tokens than features", REFUSED, inputs=(floats("B", 5, D),))
class TokenMixing(Into):
    width = 5

    def forward(self, x):
        return self.linear(self.norm(x).transpose(1, 2)).transpose(1, 2)


@zoo("a token-mixing matrix on the left: w @ x, square", REFUSED, inputs=(floats("B", D, D),))
class TokenMixingLeft(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, D)

    def forward(self, x):
        return self.w @ self.norm(x)


@zoo("x.mT @ w, square", REFUSED, inputs=(floats("B", D, D),))
class TransposedInput(TokenMixingLeft):
    def forward(self, x):
        return self.norm(x).mT @ self.w


@zoo("einsum btd,th->bhd over tokens, square", REFUSED, inputs=(floats("B", D, D),))
class EinsumOverTokens(TokenMixingLeft):
    def forward(self, x):
        return torch.einsum("btd,th->bhd", self.norm(x), self.w)


@zoo("reshape(B, d, T) where a transpose was meant", REFUSED, inputs=(floats("B", D, D),))
class ReshapeForTranspose(Into):
    def forward(self, x):
        return self.linear(self.norm(x).reshape(x.shape[0], D, -1).transpose(1, 2))


@zoo("transposed there and back", FOLDS)
class ThereAndBack(Into):
    def forward(self, x):
        return self.linear(self.norm(x).transpose(1, 2).contiguous().transpose(1, 2))


@zoo("sequence first: (T, B, d)", FOLDS)
class SequenceFirst(Into):
    def forward(self, x):
        return self.linear(self.norm(x.transpose(0, 1))).transpose(0, 1)


@zoo("flattened to (B * T, d)", FOLDS)
class FlatTokens(Into):
    def forward(self, x):
        return self.linear(self.norm(x).reshape(-1, D)).view(*x.shape[:-1], 6)


@zoo("channel shuffle between groups", EITHER)
class ChannelShuffle(Into):
    def forward(self, x):
        h = self.norm(x).view(*x.shape[:-1], 2, 4).transpose(-1, -2).flatten(-2)
        return self.linear(h)


@zoo("features turned round", EITHER)
class FlippedFeatures(Into):
    def forward(self, x):
        return self.linear(self.norm(x).flip(-1))


@zoo("features rolled by one", EITHER)
class RolledFeatures(Into):
    def forward(self, x):
        return self.linear(self.norm(x).roll(1, -1))


@zoo("features permuted by an index", EITHER)
class PermutedFeatures(Into):
    def forward(self, x):
        return self.linear(self.norm(x)[..., [3, 1, 0, 2, 7, 6, 5, 4]])


@zoo("rotated features (RoPE before the linear map)", REFUSED)
class RotatedFeatures(Into):
    def forward(self, x):
        a, b = self.norm(x).chunk(2, -1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return self.linear(torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1))


@zoo("flattened over tokens into one linear map", EITHER, inputs=(floats("B", 5, D),))
class FlattenedTokens(Into):
    width = 5 * D

    def forward(self, x):
        return self.linear(self.norm(x).flatten(1))


@zoo("one token flattened: (B, 1, d) to (B, d)", FOLDS, inputs=(floats("B", 1, D),))
class OneTokenFlattened(Into):
    def forward(self, x):
        return self.linear(self.norm(x).flatten(1))


@zoo("reshaped so that features of one token become tokens", REFUSED)
class FeaturesToTokens(Into):
    width = 4

    def forward(self, x):
        return self.linear(self.norm(x).reshape(x.shape[0], -1, 4))


@zoo("two tokens side by side (patch merging after the norm)", EITHER, inputs=(floats("B", 6, D),))
class PairsOfTokens(Into):
    width = 2 * D

    def forward(self, x):
        return self.linear(self.norm(x).reshape(x.shape[0], 3, 2 * D))


@zoo("an odd reshape that mixes tokens and features at the same width", REFUSED, inputs=(floats("B", 4, D),))
class MixedReshape(Into):
    def forward(self, x):
        return self.linear(self.norm(x).view(-1, 4, 2, 4).transpose(1, 2).reshape(-1, 4, D))


@zoo("one linear map per head on the head's features", REFUSED)
class SharedHeadMap(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(x).unflatten(-1, (2, 4))).flatten(-2)


@zoo("a matrix of its own per head on the head's features", EITHER, REFUSED)
class OwnHeadMap(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(2, 4, 4)

    def forward(self, x):
        return torch.einsum("bthd,hde->bthe", self.norm(x).unflatten(-1, (2, 4)), self.w).flatten(-2)


@zoo("a matrix of its own per head on all features", EITHER)
class HeadsFromAll(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(2, D, 4)

    def forward(self, x):
        return torch.einsum("btd,hde->bhte", self.norm(x), self.w)


@zoo("heads as wide and as many as the features: bth,hde", EITHER, REFUSED)
class HeadsSquare(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, 3, 2)

    def forward(self, x):
        return torch.einsum("bth,hde->btde", self.norm(x), self.w)


@zoo("the first half of the features", EITHER, REFUSED)
class HalfTheFeatures(Into):
    width = 4

    def forward(self, x):
        return self.linear(self.norm(x)[..., :4])


@zoo("halves of the features into two linear maps", EITHER, REFUSED)
class TwoHalves(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        a, b = self.norm(x).chunk(2, -1)
        return self.a(a).sigmoid() * self.b(b)


@zoo("halves of the features into one linear map, both through it", REFUSED)
class TwoHalvesOneMap(Into):
    width = 4

    def forward(self, x):
        a, b = self.norm(x).chunk(2, -1)
        return self.linear(a).sigmoid() * self.linear(b)


@zoo("every second feature", EITHER, REFUSED)
class EverySecond(Into):
    width = 4

    def forward(self, x):
        return self.linear(self.norm(x)[..., ::2])


@zoo("features padded with zeros", EITHER)
class PaddedFeatures(Into):
    width = 10

    def forward(self, x):
        return self.linear(F.pad(self.norm(x), (0, 2)))


@zoo("features beside another input's", EITHER, inputs=(floats("B", "T", D), floats("B", "T", 3)))
class BesideAnother(Into):
    width = D + 3

    def forward(self, x, z):
        return self.linear(torch.cat([self.norm(x), z], -1))


@zoo("features beside those of the raw input, square halves", EITHER)
class BesideRaw(Into):
    width = 2 * D

    def forward(self, x):
        return self.linear(torch.cat([x, self.norm(x)], -1))


@zoo("two norms' features side by side", EITHER)
class TwoNormsSideBySide(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.linear = norm(D), norm(D), nn.Linear(2 * D, 6)

    def forward(self, x):
        return self.linear(torch.cat([self.a(x), self.b(x.tanh())], -1))


@zoo("one norm's features twice side by side", EITHER)
class TwiceSideBySide(Into):
    width = 2 * D

    def forward(self, x):
        h = self.norm(x)
        return self.linear(torch.cat([h, h], -1))


@zoo("pre-norm of what was put side by side (DenseNet)", FOLDS)
class Dense(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norms = nn.ModuleList(norm(D + 4 * i) for i in range(3))
        self.linears = nn.ModuleList(nn.Linear(D + 4 * i, 4) for i in range(3))

    def forward(self, x):
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = torch.cat([x, linear(norm(x)).relu()], -1)
        return x


@zoo("normalized_shape=(5, d), flattened into one linear map", EITHER, inputs=(floats("B", 5, D),))
class TwoAxesFlattened(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm((5, D)), nn.Linear(5 * D, 6)

    def forward(self, x):
        return self.linear(self.norm(x).flatten(1))


@zoo("normalized_shape=(5, d) into a linear map over d", REFUSED, inputs=(floats("B", 5, D),))
class TwoAxes(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm((5, D)), nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("normalized_shape=(1, d) into a linear map over d", FOLDS, inputs=(floats("B", 1, D),))
class OneAndWidth(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm((1, D)), nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("the norm of heads: (B, T, heads, d_head), flattened into one linear map", EITHER, REFUSED)
class NormPerHead(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm(4), nn.Linear(D, 6)

    def forward(self, x):
        return self.linear(self.norm(x.unflatten(-1, (2, 4))).flatten(-2))


@zoo("the norm of heads, one head", FOLDS)
class NormOfOneHead(Into):
    def forward(self, x):
        return self.linear(self.norm(x.unflatten(-1, (1, D))).flatten(-2))


@zoo("a single vector", FOLDS, inputs=(floats(D),))
class SingleVector(Into):
    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("a single vector times a raw matrix", FOLDS, EITHER, inputs=(floats(D),))
class SingleVectorRaw(TokenMixingLeft):
    def forward(self, x):
        return self.norm(x) @ self.w


@zoo("a raw matrix times a single vector", EITHER, inputs=(floats(D),))
class RawTimesVector(TokenMixingLeft):
    def forward(self, x):
        return self.w @ self.norm(x)


@zoo("five axes", FOLDS, inputs=(floats("B", 2, 2, "T", D),))
class FiveAxes(Into):
    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("windows as Swin cuts them", FOLDS, inputs=(floats("B", 4, 4, D),))
class Windows(Into):
    def forward(self, x):
        h = self.norm(x).view(-1, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, D)
        q = self.linear(h)
        return q.softmax(1)


@zoo("shifted windows: rolled over the picture's axes", EITHER, inputs=(floats("B", 4, 4, D),))
class ShiftedWindows(Into):
    def forward(self, x):
        h = self.norm(x).roll((-1, -1), (1, 2))
        return self.linear(h.view(-1, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, D))


@zoo("Swin's patch merging: four neighbours, norm, linear map", FOLDS, inputs=(floats("B", 4, 4, 2),))
class PatchMerging(Into):
    def forward(self, x):
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.linear(self.norm(torch.cat(parts, -1)))


@zoo("summed over the features", REFUSED)
class SummedFeatures(Normed):
    def forward(self, x):
        return self.norm(x).sum(-1)


@zoo("a matrix for each half of the batch in one bmm", EITHER, REFUSED, inputs=(floats(2, "T", D),))
class MatrixPerSample(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(2, D, 6)

    def forward(self, x):
        return torch.bmm(self.norm(x), self.w)


@zoo("a matrix picked by an id for each sample", EITHER, REFUSED, inputs=(floats("B", "T", D),))
class PickedMatrix(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(4, D, 6)

    def forward(self, x):
        return torch.bmm(self.norm(x), self.w[torch.arange(x.shape[0]) % 4])


@zoo("the same matrix expanded over the batch in one bmm", EITHER)
class ExpandedMatrix(TokenMixingLeft):
    def forward(self, x):
        return torch.bmm(self.norm(x), self.w.expand(x.shape[0], D, D))


@zoo("the transposed matrix expanded over the batch in one bmm", EITHER)
class ExpandedTransposed(TokenMixingLeft):
    def forward(self, x):
        return torch.bmm(self.norm(x), self.w.T.unsqueeze(0).repeat(x.shape[0], 1, 1))


@zoo("baddbmm with a bias per sample", EITHER, inputs=(floats(2, "T", D),))
class Baddbmm(MatrixPerSample):
    def __init__(self, norm):
        super().__init__(norm)
        self.b = matrix(2, 1, 6)

    def forward(self, x):
        return torch.baddbmm(self.b, self.norm(x), self.w)


@zoo("partial products over halves of the features, added", EITHER)
class PartialProducts(Into):
    def forward(self, x):
        h, w = self.norm(x), self.linear.weight
        return F.linear(h[..., :4], w[:, :4]) + F.linear(h[..., 4:], w[:, 4:]) + self.linear.bias


@zoo("rows of the matrix in two products, put together", EITHER)
class SplitRows(Into):
    def forward(self, x):
        h, w, b = self.norm(x), self.linear.weight, self.linear.bias
        return torch.cat([F.linear(h, w[:2], b[:2]), F.linear(h, w[2:], b[2:])], -1)


@zoo("viewed as complex numbers and back", EITHER)
class ComplexAndBack(Into):
    def forward(self, x):
        h = torch.view_as_complex(self.norm(x).unflatten(-1, (-1, 2)).contiguous())
        return self.linear(torch.view_as_real(h).flatten(-2))


@zoo("viewed as complex numbers, conjugated, and back", REFUSED)
class Conjugated(Into):
    def forward(self, x):
        h = torch.view_as_complex(self.norm(x).unflatten(-1, (-1, 2)).contiguous())
        return self.linear(torch.view_as_real(h.conj().resolve_conj()).flatten(-2)) + self.linear(self.norm(x))


@zoo("its bits read as integers", REFUSED)
class Bits(Into):
    def forward(self, x):
        h = self.norm(x)
        return self.linear(h) + (h.view(torch.uint8)[..., :6] % 2).to(x.dtype)


@zoo("features repeated: [h, h] by Tensor.repeat", EITHER)
class RepeatedFeatures(Into):
    width = 2 * D

    def forward(self, x):
        return self.linear(self.norm(x).repeat(1, 1, 2))
