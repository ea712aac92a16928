"""Choosing, moving and pooling tokens between the norm and the linear map."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, flags, floats, zoo


class Headed(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.head = nn.Linear(D, 3)


MASKED = (floats("B", "T", D), flags("B", "T"))


@zoo("the CLS token: x[:, 0]", FOLDS)
class FirstToken(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[:, 0])


@zoo("the last token: x[:, -1]", FOLDS)
class LastToken(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[:, -1])


@zoo("the last token, axis kept: x[:, [-1]]", EITHER)
class LastTokenKept(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[:, [-1], :])


@zoo("the last tokens by a slice", FOLDS)
class LastTokens(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[:, -2:])


@zoo("the last token before the padding, by an index per row", EITHER, inputs=MASKED)
class LastUnpadded(Headed):
    def forward(self, x, mask):
        last = (~mask).int().cumsum(1).argmax(1)
        return self.head(self.norm(x)[torch.arange(x.shape[0]), last])


@zoo("chosen tokens by a boolean mask", EITHER, inputs=MASKED)
class ChosenByMask(Headed):
    def forward(self, x, mask):
        return self.head(self.norm(x)[mask])


@zoo("tokens by gather", EITHER)
class Gathered(Headed):
    def forward(self, x):
        index = x.sum(-1, keepdim=True).argsort(1)[:, :2].expand(-1, -1, D)
        return self.head(self.norm(x).gather(1, index))


@zoo("tokens by take_along_dim", EITHER)
class TakenAlong(Headed):
    def forward(self, x):
        return self.head(self.norm(x).take_along_dim(x.sum(-1, keepdim=True).argsort(1), 1))


@zoo("numbers out of the flat tensor by torch.take", EITHER)
class Taken(Headed):
    def forward(self, x):
        return self.head(torch.take(self.norm(x), torch.arange(2 * D).view(2, D).flip(1)))


@zoo("tokens by index_select", EITHER)
class IndexSelected(Headed):
    def forward(self, x):
        return self.head(self.norm(x).index_select(1, torch.tensor([2, 0])))


@zoo("tokens by narrow", FOLDS)
class Narrowed(Headed):
    def forward(self, x):
        return self.head(self.norm(x).narrow(1, 1, 3))


@zoo("a loop over tokens: x[:, t]", FOLDS)
class LoopOverTokens(Headed):
    def forward(self, x):
        h = self.norm(x)
        return torch.stack([self.head(h[:, t]) for t in range(x.shape[1])], 1)


@zoo("a loop over x.unbind(1)", FOLDS)
class LoopOverUnbound(Headed):
    def forward(self, x):
        return torch.stack([self.head(h) for h in self.norm(x).unbind(1)], 1)


@zoo("chunked logits: x.split(2, 1)", FOLDS)
class Chunked(Headed):
    def forward(self, x):
        return torch.cat([self.head(h) for h in self.norm(x).split(2, 1)], 1)


@zoo("mean over tokens", EITHER)
class MeanPooled(Headed):
    def forward(self, x):
        return self.head(self.norm(x).mean(1))


@zoo("mean over tokens and the CLS token, added", EITHER)
class MeanPlusFirst(Headed):
    def forward(self, x):
        h = self.norm(x)
        return self.head(h.mean(1) + h[:, 0])


@zoo("sum over tokens", EITHER, REFUSED)
class SumPooled(Headed):
    def forward(self, x):
        return self.head(self.norm(x).sum(1))


@zoo("maximum over tokens", REFUSED)
class MaxPooled(Headed):
    def forward(self, x):
        return self.head(self.norm(x).amax(1))


@zoo("mean over unmasked tokens", EITHER, inputs=MASKED)
class MaskedMean(Headed):
    def forward(self, x, mask):
        keep = (~mask)[..., None].to(x.dtype)
        return self.head((self.norm(x) * keep).sum(1) / keep.sum(1))


@zoo("attention pooling: weights from one linear map, values from another", FOLDS)
class AttentionPooled(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.score = nn.Linear(D, 1)

    def forward(self, x):
        h = self.norm(x)
        return (self.score(h).softmax(1) * self.head(h)).sum(1)


@zoo("attention pooling over the norm itself", EITHER, REFUSED)
class AttentionPooledNorm(AttentionPooled):
    def forward(self, x):
        h = self.norm(x)
        return self.head((self.score(h).sigmoid() * h).sum(1))


@zoo("masked tokens set to zero", EITHER, REFUSED, inputs=MASKED)
class MaskedToZero(Headed):
    def forward(self, x, mask):
        return self.head(self.norm(x).masked_fill(mask[..., None], 0.0))


@zoo("masked tokens multiplied by zero", EITHER, REFUSED, inputs=MASKED)
class MultipliedByMask(Headed):
    def forward(self, x, mask):
        return self.head(self.norm(x) * (~mask)[..., None])


@zoo("a mask that hides nothing in the run", EITHER, REFUSED, inputs=(floats("B", "T", D),))
class MaskNeverUsed(Headed):
    def forward(self, x):
        return self.head(self.norm(x).masked_fill((x.sum(-1, keepdim=True) > 1e9), 0.0))


@zoo("torch.where between the norm and the raw input", REFUSED, inputs=MASKED)
class Where(Headed):
    def forward(self, x, mask):
        return self.head(torch.where(mask[..., None], x, self.norm(x)))


@zoo("a learned mask token put over masked tokens", REFUSED, inputs=MASKED)
class MaskToken(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.mask_token = nn.Parameter(torch.randn(D))

    def forward(self, x, mask):
        h = self.norm(x)
        return self.head(torch.where(mask[..., None], self.mask_token, h))


@zoo("CLS put before the normed tokens", REFUSED)
class ClsAfterNorm(MaskToken):
    def forward(self, x):
        cls = self.mask_token.expand(x.shape[0], 1, D)
        return self.head(torch.cat([cls, self.norm(x)], 1))


@zoo("CLS written over the first normed token: h[:, 0] = cls", REFUSED)
class ClsInPlace(MaskToken):
    def forward(self, x):
        h = self.norm(x).clone()
        h[:, 0] = self.mask_token
        return self.head(h)


@zoo("one norm's tokens twice, one after the other", EITHER)
class TokensTwice(Headed):
    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.cat([h, h.flip(1)], 1))


@zoo("one norm's tokens stacked", EITHER)
class TokensStacked(Headed):
    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.stack([h[:, 0], h[:, 1]], 1))


@zoo("two norms' tokens one after the other into one linear map", REFUSED)
class TwoNormsTokens(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.other = norm(D)

    def forward(self, x):
        return self.head(torch.cat([self.norm(x), self.other(x)], 1))


@zoo("normed tokens before raw ones into one linear map (Flamingo's keys and values)", REFUSED)
class NormedAndRawTokens(Headed):
    def forward(self, x):
        return self.head(torch.cat([self.norm(x), x], 1))


@zoo("tokens turned round", EITHER)
class FlippedTokens(Headed):
    def forward(self, x):
        return self.head(self.norm(x).flip(1))


@zoo("tokens rolled by one", EITHER)
class RolledTokens(Headed):
    def forward(self, x):
        return self.head(self.norm(x).roll(1, 1))


@zoo("token shift with zeros before the first", EITHER, REFUSED)
class TokenShift(Headed):
    def forward(self, x):
        return self.head(F.pad(self.norm(x)[:, :-1], (0, 0, 1, 0)))


@zoo("RWKV's mix of a token and the one before it", EITHER, REFUSED)
class TokenMix(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.mu = nn.Parameter(torch.rand(D))

    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.lerp(F.pad(h[:, :-1], (0, 0, 1, 0)), h, self.mu))


@zoo("tokens padded at the end with zeros", EITHER, REFUSED)
class PaddedTokens(Headed):
    def forward(self, x):
        return self.head(F.pad(self.norm(x), (0, 0, 0, 2)))


@zoo("tokens expanded: h[:, None].expand(...)", FOLDS)
class Expanded(Headed):
    def forward(self, x):
        return self.head(self.norm(x)[:, None].expand(-1, 3, -1, -1))


@zoo("tokens repeated", EITHER)
class Repeated(Headed):
    def forward(self, x):
        return self.head(self.norm(x).repeat(1, 2, 1))


@zoo("tokens repeated by repeat_interleave", FOLDS)
class Interleaved(Headed):
    def forward(self, x):
        return self.head(self.norm(x).repeat_interleave(2, 1))


@zoo("a single query broadcast: (1, 1, d) expanded over the batch", FOLDS)
class BroadcastQuery(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.query = nn.Parameter(torch.randn(1, 2, D))

    def forward(self, x):
        return self.head(self.norm(self.query).expand(x.shape[0], -1, -1)) + x[:, :2, :3]


@zoo("the norm of an embedding table, then looked up", EITHER, inputs=(floats("B", "T", D),))
class NormedTable(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.table = nn.Embedding(12, D)

    def forward(self, x):
        ids = x.sum(-1).mul(3).long() % 12
        return self.head(F.embedding(ids, self.norm(self.table.weight)))


@zoo("sorted by a score, mapped, put back", EITHER)
class SortedTokens(Headed):
    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        order = x.flatten(0, 1).sum(-1).argsort()
        return self.head(h[order])[order.argsort()]


@zoo("sorted by the norm's own features", REFUSED)
class SortedByTheNorm(Headed):
    def forward(self, x):
        h = self.norm(x)
        return self.head(h.sort(1).values)


@zoo("pooled over neighbouring tokens (avg_pool1d)", EITHER)
class AveragePooled(Headed):
    def forward(self, x):
        return self.head(F.avg_pool1d(self.norm(x).transpose(1, 2), 2).transpose(1, 2))


@zoo("packed as a jagged sequence", EITHER)
class Packed(Headed):
    def forward(self, x):
        lengths = [x.shape[1] - i % 3 for i in range(x.shape[0])]
        packed = nn.utils.rnn.pack_padded_sequence(self.norm(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(packed.data)


@zoo("an index that reaches across features", REFUSED)
class ScatteredFeatures(Headed):
    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.zeros_like(h).scatter(2, (x * 3).long().abs() % D, h))


@zoo("tokens of one segment added up (a graph's messages)", EITHER, REFUSED)
class Segments(Headed):
    def forward(self, x):
        h = self.norm(x)
        target = torch.arange(x.shape[1]) % 3
        return self.head(x.new_zeros(x.shape[0], 3, D).index_add(1, target, h))


@zoo("a running sum over tokens", EITHER, REFUSED)
class RunningSum(Headed):
    def forward(self, x):
        return self.head(self.norm(x).cumsum(1))


@zoo("two neighbouring tokens side by side", EITHER)
class Bigram(Headed):
    def __init__(self, norm):
        super().__init__(norm)
        self.head = nn.Linear(2 * D, 3)

    def forward(self, x):
        h = self.norm(x)
        return self.head(torch.cat([h[:, :-1], h[:, 1:]], -1))


@zoo("overlapping windows of tokens by Tensor.unfold", EITHER)
class OverlappingWindows(Bigram):
    def forward(self, x):
        return self.head(self.norm(x).unfold(1, 2, 1).transpose(-1, -2).flatten(2))


@zoo("overlapping windows of tokens by as_strided", EITHER)
class StridedWindows(Bigram):
    def forward(self, x):
        h = self.norm(x).contiguous()
        b, t, _ = h.shape
        return self.head(h.as_strided((b, t - 1, 2 * D), (t * D, D, 1)))


@zoo("tokens interpolated to another length", EITHER)
class Interpolated(Headed):
    def forward(self, x):
        return self.head(F.interpolate(self.norm(x).mT, size=4, mode="linear").mT)
