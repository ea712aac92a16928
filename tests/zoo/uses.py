"""Norms that are read by something else as well, or by nothing that is linear."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, floats, matrix, tokens, zoo


class OneLinear(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, D)


class AndAlso(OneLinear):
    """Maps the norm's output, and reads it by ``other`` too."""

    def __init__(self, norm, other):
        super().__init__(norm)
        self.other = other

    def forward(self, x):
        h = self.norm(x)
        return self.linear(h), self.other(x, h)


OTHERS = {
    "Returned": ("returned beside the mapped one", lambda x, h: h),
    "ReturnedView": ("a view of it returned", lambda x, h: h[:, 0]),
    "ReturnedDetached": ("returned detached", lambda x, h: h.detach()),
    "ReturnedInDict": ("returned in a dict", lambda x, h: {"features": [h]}),
    "Summed": ("summed", lambda x, h: h.sum()),
    "Multiplied": ("multiplied by the input", lambda x, h: x * h),
    "Squared": ("squared", lambda x, h: h.square()),
    "SoftmaxGate": ("a softmax gate over the input", lambda x, h: h.softmax(-1) * x),
    "Sine": ("sine", lambda x, h: h.sin()),
    "Residual": ("added to the input", lambda x, h: x + h),
    "Compared": ("compared with zero", lambda x, h: h > 0),
    "Similarity": ("its tokens compared with each other", lambda x, h: h @ h.mT),
    "Attended": ("attended to without a projection", lambda x, h: F.scaled_dot_product_attention(h, h, h)),
    "Argmax": ("its largest feature", lambda x, h: h.argmax(-1)),
    "AsNumber": ("read as a number: .item()", lambda x, h: h[0, 0, 0].item()),
    "AsList": ("read as numbers: .tolist()", lambda x, h: torch.tensor(h[0, 0].tolist())),
    "AsArray": ("read by numpy", lambda x, h: torch.from_numpy(h.detach().numpy().sum(-1))),
    "AsNewTensor": ("copied into a new tensor", lambda x, h: torch.empty_like(x).copy_(h)),
    "Written": ("written into a slice of another tensor", lambda x, h: torch.zeros_like(x).slice_scatter(h)),
    "Normalized": ("normalized to unit length", lambda x, h: F.normalize(h, dim=-1)),
    "NormedByFunction": ("normed once more by a function", lambda x, h: F.layer_norm(h, (D,))),
    "Branched": ("an if on its values", lambda x, h: x if h.sum() > 0 else -x),
}
for name, (about, other) in OTHERS.items():
    add(
        f"Also{name}",
        f"also {about}",
        lambda norm, other=other: AndAlso(norm, other),
        REFUSED,
        theme="uses",
        whole=name in ("AsList", "AsArray"),  # Python numbers and numpy: out of torch's sight
    )

add("OnlyShapeRead", "its shape is read too", lambda norm: AndAlso(norm, lambda x, h: x.new_zeros(h.shape)), FOLDS)


@zoo("only returned", REFUSED)
class OnlyReturned(Normed):
    def forward(self, x):
        return self.norm(x)


@zoo("an activation before the linear map", REFUSED)
class ActivationFirst(OneLinear):
    def forward(self, x):
        return self.linear(F.relu(self.norm(x)))


@zoo("a positional embedding added before the linear map", REFUSED)
class PositionAdded(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.position = matrix(1, D)

    def forward(self, x):
        return self.linear(self.norm(x) + self.position)


@zoo("a learned gain after the norm (LayerScale)", EITHER)
class GainAfter(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.gain = matrix(D)

    def forward(self, x):
        return self.linear(self.norm(x) * self.gain)


@zoo("a constant factor after the norm", EITHER)
class FactorAfter(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x) * D**-0.5)


@zoo("a constant factor in place after the norm", EITHER)
class FactorInPlace(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x).mul_(0.5))


@zoo("a constant added in place after the norm", REFUSED)
class AddedInPlace(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x).add_(1.0))


@zoo("written to after the linear map has read it, and not read again", EITHER)
class SpoiltAfterwards(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        y = self.linear(h)
        with torch.no_grad():
            h.zero_()
        return y


@zoo("written to after the linear map has read it, while the input is needed again", EITHER)
class SpoiltAfterwardsInputNeeded(OneLinear):
    def forward(self, x):
        with torch.no_grad():
            h = self.norm(x)
            y = self.linear(h)
            h.zero_()
            return x + y


@zoo("the residual stream changed in place before the linear map reads the norm", EITHER)
class StreamChanged(OneLinear):
    def forward(self, x):
        x = x.clone()
        h = self.norm(x)
        x.mul_(2.0)
        return x + self.linear(h)


@zoo("the same, and half of the output is masked by -1e9", REFUSED)
class StreamChangedMasked(StreamChanged):
    def forward(self, x):
        y = super().forward(x)
        return y.masked_fill(torch.arange(y.shape[-1]) % 2 == 0, -1e9)


@zoo("the same, and half of the output has -1e9 added", REFUSED)
class StreamChangedMaskAdded(StreamChanged):
    def forward(self, x):
        y = super().forward(x)
        return y - 1e9 * (torch.arange(y.shape[-1]) % 2)


@zoo("the residual stream added to in place: x += f(norm(x))", FOLDS)
class StreamAddedTo(OneLinear):
    def forward(self, x):
        x = x.clone()
        x += self.linear(self.norm(x))
        return x


@zoo("a second norm of the norm, both tapered", EITHER)
class NormOfNorm(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.second = norm(D)

    def forward(self, x):
        return self.linear(self.second(self.norm(x)))


@zoo("a second norm of the norm, the second not tapered", REFUSED, names=("norm",))
class NormOfNormKept(NormOfNorm):
    pass


@zoo("a gate on the norm: sigmoid(W h) * h", REFUSED)
class GatedNorm(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        return self.linear(h).sigmoid() * h


@zoo("a gate on the stream: sigmoid(W h) * x (highway)", FOLDS)
class GatedStream(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)).sigmoid() * x


@zoo("a norm inside the stream's gate: x + g * norm(x)", REFUSED)
class NormInGate(OneLinear):
    def forward(self, x):
        return x + self.linear(x).sigmoid() * self.norm(x)


@zoo("an adapter beside the norm's own output: h + A h", REFUSED)
class ResidualFromNorm(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        return h + self.linear(h)


@zoo("the norm under two names, called by one", FOLDS)
class TwoNames(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.alias = self.norm

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("the norm under two names, called by both", FOLDS)
class TwoNamesCalled(TwoNames):
    def __init__(self, norm):
        super().__init__(norm)
        self.second = nn.Linear(D, D)

    def forward(self, x):
        return self.second(self.alias(self.linear(self.norm(x))))


@zoo("one norm at two sites, each with a linear map of its own", FOLDS)
class TwoSites(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.second = nn.Linear(D, D)

    def forward(self, x):
        x = x + self.linear(self.norm(x)).relu()
        return x + self.second(self.norm(x)).relu()


@zoo("one norm at two sites into one linear map", FOLDS)
class TwoSitesOneMap(OneLinear):
    def forward(self, x):
        x = x + self.linear(self.norm(x)).relu()
        return x + self.linear(self.norm(x)).relu()


@zoo("one norm at two sites, one of them not linear", REFUSED)
class TwoSitesOneBad(OneLinear):
    def forward(self, x):
        return x + self.linear(self.norm(x)) + self.norm(x).tanh()


@zoo("two norms that share their gain", FOLDS)
class SharedGain(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = norm(D), norm(D)
        self.b.weight = self.a.weight
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.second(self.b(self.first(self.a(x))))


@zoo("code that reads the norm's gain", EITHER)
class GainRead(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)) + self.norm.weight


@zoo("code that reads the norm's eps", EITHER)
class EpsRead(OneLinear):
    def forward(self, x):
        return self.linear(self.norm(x)) * (1 + (self.norm.eps or 0.0))


@zoo("a hook on the norm that looks and does nothing", FOLDS)
class WatchedNorm(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.norm.register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("a hook on the norm that doubles its output", EITHER)
class HookedNorm(WatchedNorm):
    def __init__(self, norm):
        super().__init__(norm)
        self.norm.register_forward_hook(lambda module, inputs, output: output * 2)


@zoo("a hook on the norm that adds one", EITHER)
class ShiftedNorm(WatchedNorm):
    def __init__(self, norm):
        super().__init__(norm)
        self.norm.register_forward_hook(lambda module, inputs, output: output + 1)


@zoo("a pre-hook on the norm that doubles its input", EITHER)
class PreHookedNorm(WatchedNorm):
    def __init__(self, norm):
        super().__init__(norm)
        self.norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


@zoo("a hook that keeps the norm's output, which the model then returns", REFUSED)
class KeptByHook(WatchedNorm):
    def __init__(self, norm):
        super().__init__(norm)
        self.norm.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.kept = output

    def forward(self, x):
        return super().forward(x), self.kept


@zoo("a norm that never runs", REFUSED, why="did not run", blames="unused")
class NeverRuns(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.unused = norm(D)

    def forward(self, x):
        return self.linear(self.norm(x))


@zoo("a norm whose output nobody reads", EITHER)
class NobodyReads(OneLinear):
    def forward(self, x):
        self.norm(x)
        return self.linear(x)


@zoo("a norm on embeddings that begins the residual stream (BLOOM)", REFUSED, blames="norm", inputs=(tokens("B", "T"),))
class EmbeddingNorm(OneLinear):
    def __init__(self, norm):
        super().__init__(norm)
        self.embedding, self.inner = nn.Embedding(12, D), norm(D)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        return x + self.linear(self.inner(x)).relu()


@zoo("distances to prototypes", REFUSED)
class Prototypes(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.prototypes = matrix(4, D)

    def forward(self, x):
        return torch.cdist(self.norm(x), self.prototypes.expand(x.shape[0], -1, -1))


@zoo("cosine similarity with a learned vector", REFUSED)
class Cosine(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.vector = matrix(D)

    def forward(self, x):
        return F.cosine_similarity(self.norm(x), self.vector, dim=-1)


@zoo("the norm at two places, one in training only", FOLDS)
class AuxiliaryInTraining(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        return (self.linear(h), h) if self.training else self.linear(h)


@zoo("functional dropout left on", EITHER)
class DropoutLeftOn(OneLinear):
    def forward(self, x):
        return self.linear(F.dropout(self.norm(x), 0.5, training=True))


@zoo("noise added to the norm", REFUSED)
class NoiseAdded(OneLinear):
    def forward(self, x):
        h = self.norm(x)
        return self.linear(h + 0.1 * torch.randn_like(h))


@zoo("dropout after the linear map, model in eval mode", FOLDS, inputs=(floats("B", "T", D),))
class DropoutAfter(OneLinear):
    def forward(self, x):
        return F.dropout(self.linear(self.norm(x)), 0.5, self.training)
