"""Matrices that serve twice: tied heads, shared layers, one matrix for several inputs."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, SHARED, D, Normed, add, matrix, tokens, zoo

IDS = (tokens("B", "T"),)
SCALE = {"tied": "scale"}


class Tied(Normed):
    """Embedding, a block, a final norm ``norm`` and a head that shares the embedding's matrix."""

    def __init__(self, norm):
        super().__init__(norm)
        self.embedding, self.block = nn.Embedding(12, D), nn.Linear(D, D)
        self.head = nn.Linear(D, 12, bias=False)
        self.head.weight = self.embedding.weight

    def body(self, ids):
        x = self.embedding(ids)
        return x + self.block(x).relu()

    def forward(self, ids):
        return self.head(self.norm(self.body(ids)))


class TiedHeadTwice(Tied):
    def forward(self, ids):
        x = self.body(ids)
        return self.head(self.norm(x)), self.head(self.norm(x + self.block(x)))


class TiedHeadByTwoNorms(Tied):
    def __init__(self, norm):
        super().__init__(norm)
        self.other = norm(D)

    def forward(self, ids):
        x = self.body(ids)
        return self.head(self.norm(x)), self.head(self.other(x.tanh()))


class TiedHeadByRaw(Tied):
    def forward(self, ids):
        x = self.body(ids)
        return self.head(self.norm(x)), self.head(x)


class EmbeddingAsHead(Tied):
    def __init__(self, norm):
        super().__init__(norm)
        del self.head

    def forward(self, ids):
        return F.linear(self.norm(self.body(ids)), self.embedding.weight)


class RawTable(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.table = matrix(12, D)

    def forward(self, ids):
        return F.linear(self.norm(F.embedding(ids, self.table)), self.table)


class IndexedTable(RawTable):
    def forward(self, ids):
        return F.linear(self.norm(self.table[ids]), self.table)


class TiedWithBias(Tied):
    def __init__(self, norm):
        super().__init__(norm)
        self.head = nn.Linear(D, 12)
        self.head.weight = self.embedding.weight


class TiedScaled(Tied):
    def forward(self, ids):
        return super().forward(ids) * D**-0.5


class TiedThreeNames(Tied):
    def __init__(self, norm):
        super().__init__(norm)
        self.second = nn.Linear(D, 12, bias=False)
        self.second.weight = self.embedding.weight

    def forward(self, ids):
        h = self.norm(self.body(ids))
        return self.head(h), self.second(h).relu()


class TiedTwoEmbeddings(Tied):
    def __init__(self, norm):
        super().__init__(norm)
        self.target = nn.Embedding(12, D)
        self.target.weight = self.embedding.weight

    def body(self, ids):
        return super().body(ids) + self.target(ids.flip(1))


class TiedHeadModule(Tied):
    """The head under a second name, as ``get_output_embeddings`` and wrappers keep it."""

    def __init__(self, norm):
        super().__init__(norm)
        self.output = self.head


class TiedSquare(Tied):
    """As many tokens as features."""

    def __init__(self, norm):
        super().__init__(norm)
        self.embedding = nn.Embedding(D, D)
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return super().forward(ids % D)


class TiedNorms(Tied):
    """Two norms before the tied head and before the block."""

    def __init__(self, norm):
        super().__init__(norm)
        self.inner = norm(D)

    def body(self, ids):
        x = self.embedding(ids)
        return x + self.block(self.inner(x)).relu()


class EmbeddingNormedAndTied(Tied):
    """A norm right after the embedding, whose matrix the head shares."""

    def body(self, ids):
        return self.block(self.norm(self.embedding(ids)))

    def forward(self, ids):
        return self.head(self.body(ids))


for cls, about, untie, scale in [
    (Tied, "a head tied to the embedding", FOLDS, FOLDS),
    (TiedHeadTwice, "a tied head used twice with one norm", FOLDS, FOLDS),
    (TiedHeadByTwoNorms, "a tied head used with two norms", REFUSED, FOLDS),
    (TiedHeadByRaw, "a tied head used with the norm and with the raw stream", REFUSED, FOLDS),
    (EmbeddingAsHead, "F.linear(x, embedding.weight), no head module", REFUSED, EITHER),
    (RawTable, "one raw table, embedded and multiplied", REFUSED, EITHER),
    (IndexedTable, "one raw table, indexed and multiplied", REFUSED, EITHER),
    (TiedWithBias, "a tied head with a bias of its own", FOLDS, FOLDS),
    (TiedScaled, "a tied head whose logits are scaled", FOLDS, FOLDS),
    (TiedThreeNames, "two heads tied to the embedding, both fed by the norm", EITHER, EITHER),
    (TiedTwoEmbeddings, "two embeddings and a head, one matrix", FOLDS, FOLDS),
    (TiedHeadModule, "a tied head under two names", EITHER, EITHER),
    (TiedSquare, "a tied head with as many tokens as features", FOLDS, FOLDS),
    (TiedNorms, "a tied head and an inner norm", FOLDS, FOLDS),
    (EmbeddingNormedAndTied, "the norm follows the embedding and feeds a block; the head is tied", FOLDS, FOLDS),
]:
    why = SHARED if REFUSED in (untie, scale) else "."
    add(cls.__name__, about, cls, untie, theme="sharing", inputs=IDS, why=why)
    add(f"{cls.__name__}Scale", f"{about}; tied='scale'", cls, scale, theme="sharing", inputs=IDS, options=SCALE)


@zoo("one linear map fed by two norms", REFUSED, why=SHARED)
class TwoNormsOneMap(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.linear = norm(D), norm(D), nn.Linear(D, D)

    def forward(self, x):
        return self.linear(self.b(self.linear(self.a(x))))


@zoo("one linear map fed by the norm and by the raw stream", REFUSED, why=SHARED)
class NormAndRawOneMap(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.linear(self.norm(x)).relu() + self.linear(x)


@zoo("two linear modules with one weight, fed by two norms", EITHER)
class TwoNormsOneWeight(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = norm(D), norm(D)
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.b(self.first(self.a(x)).relu()))


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm1, self.mix, self.norm2 = norm(D), nn.Linear(D, D), norm(D)
        self.up, self.down = nn.Linear(D, 16), nn.Linear(16, D)

    def forward(self, x):
        x = x + self.mix(self.norm1(x)).cumsum(1) / x.shape[1]
        return x + self.down(self.up(self.norm2(x)).relu())


@zoo("one block run three times (ALBERT, Universal Transformer)", FOLDS)
class SharedBlock(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.block = Block(norm)

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


@zoo("one block three times in an nn.ModuleList", FOLDS)
class SharedBlockListed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.blocks = nn.ModuleList([Block(norm)] * 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@zoo("two blocks with one MLP, each with norms of its own", REFUSED, why=SHARED)
class SharedMLP(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = Block(norm), Block(norm)
        self.b.up, self.b.down = self.a.up, self.a.down

    def forward(self, x):
        return self.b(self.a(x))


@zoo("two blocks with one output projection, each with norms of its own", FOLDS)
class SharedDown(SharedMLP):
    def __init__(self, norm):
        nn.Module.__init__(self)
        self.a, self.b = Block(norm), Block(norm)
        self.b.down = self.a.down


@zoo("one encoder for two inputs (siamese)", FOLDS)
class Siamese(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.block = Block(norm)

    def forward(self, x):
        return (self.block(x) * self.block(x.flip(1))).sum(-1)


@zoo("as many rounds as the input asks for", FOLDS)
class DataDependentDepth(SharedBlock):
    def forward(self, x):
        for _ in range(1 + int(x.abs().sum()) % 3):
            x = self.block(x)
        return x


@zoo("two heads with one matrix, both fed by the norm", FOLDS, EITHER)
class TwinHeads(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.a, self.b = nn.Linear(D, 6, bias=False), nn.Linear(D, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        h = self.norm(x)
        return self.a(h), self.b(h.flip(1)) if x.shape[1] < 0 else self.b(h).relu()


@zoo("several heads on one norm", FOLDS)
class SeveralHeads(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.heads = nn.ModuleList([nn.Linear(D, 3), nn.Linear(D, 4, bias=False), nn.Linear(D, 1)])

    def forward(self, x):
        h = self.norm(x)
        return [head(h[:, 0]) for head in self.heads]


@zoo("a head frozen as a view of another parameter's memory", EITHER)
class ViewOfMemory(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.both = matrix(12, D)
        self.head = nn.Linear(D, 6, bias=False)
        self.head.weight = nn.Parameter(self.both.data[:6])

    def forward(self, x):
        return self.head(self.norm(x)) + F.linear(x, self.both)[..., 6:]


@zoo("one matrix as a weight here and as a token-mixing matrix there", REFUSED, why=SHARED)
class OneMatrixTwoAxes(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w = matrix(D, D)

    def forward(self, x):
        return torch.einsum("btd,de->bte", self.norm(x), self.w) + self.w[0]


class MaxNorm(Tied):
    """Its embedding scales the rows that it looks up, in place, in every forward pass."""

    def __init__(self, norm):
        super().__init__(norm)
        self.embedding = nn.Embedding(12, D, max_norm=0.5)
        self.head = nn.Linear(D, 12, bias=False)

    def forward(self, ids):
        with torch.no_grad():
            return super().forward(ids)


class MaxNormTied(MaxNorm):
    def __init__(self, norm):
        super().__init__(norm)
        self.head.weight = self.embedding.weight


add("MaxNorm", "nn.Embedding(max_norm=...), a head of its own", MaxNorm, EITHER, theme="sharing", inputs=IDS)
add("MaxNormTied", "nn.Embedding(max_norm=...), tied", MaxNormTied, EITHER, theme="sharing", inputs=IDS)
