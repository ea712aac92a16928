"""Whole blocks and small models as they are published."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, flags, floats, matrix, tokens, zoo

IDS = (tokens("B", "T"),)
LONG = (tokens("B", 8),)


class Mix(nn.Module):
    """One-headed attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True))


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm1, self.mix, self.norm2, self.mlp = norm(D), Mix(), norm(D), MLP()

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@zoo("pre-norm (GPT-2, ViT)", FOLDS)
class PreNorm(Block):
    pass


@zoo("post-norm (the first transformer, BERT)", REFUSED, blames="norm[12]")
class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.mix(x))
        return self.norm2(x + self.mlp(x))


@zoo("the norm inside the residual, after the sublayer (OLMo 2, Swin v2)", REFUSED)
class InnerPostNorm(Block):
    def forward(self, x):
        x = x + self.norm1(self.mix(x))
        return x + self.norm2(self.mlp(x))


class Sandwich(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.after1, self.after2 = norm(D), norm(D)

    def forward(self, x):
        x = x + self.after1(self.mix(self.norm1(x)))
        return x + self.after2(self.mlp(self.norm2(x)))


add("SandwichAll", "norms before and after (Gemma 2), all tapered", Sandwich, REFUSED, theme="blocks", blames="after")
add("SandwichInner", "norms before and after, the first tapered", Sandwich, FOLDS, theme="blocks", names=("norm?",))


@zoo("attention and MLP from one norm (GPT-J, Cohere)", FOLDS)
class Parallel(Block):
    def __init__(self, norm):
        super().__init__(norm)
        del self.norm2

    def forward(self, x):
        h = self.norm1(x)
        return x + self.mix(h) + self.mlp(h)


@zoo("attention and MLP from norms of their own (GPT-NeoX, Falcon)", FOLDS)
class ParallelTwoNorms(Block):
    def forward(self, x):
        return x + self.mix(self.norm1(x)) + self.mlp(self.norm2(x))


@zoo("attention and MLP from one matrix (PaLM, ViT-22B)", FOLDS)
class ParallelFused(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.fused, self.out, self.down = nn.Linear(D, 3 * D + 32, bias=False), nn.Linear(D, D), nn.Linear(16, D)

    def forward(self, x):
        q, k, v, up = self.fused(self.norm(x)).split([D, D, D, 32], -1)
        gate, up = up.chunk(2, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)) + self.down(F.silu(gate) * up)


@zoo("MAGNETO's sub-norms: each feeds a linear map", FOLDS)
class SubNorm(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.up, self.inner, self.down = nn.Linear(D, 16), norm(16), nn.Linear(16, D)

    def forward(self, x):
        return x + self.down(self.inner(self.up(self.norm(x)).relu()))


class SwiGLU(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.gate, self.up, self.down = (nn.Linear(D, 16, bias=False) for _ in range(3))
        self.down = nn.Linear(16, D, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@zoo("SwiGLU", FOLDS)
class SwiGLUApart(SwiGLU):
    pass


@zoo("SwiGLU with gate and up in one matrix", FOLDS)
class SwiGLUPacked(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.gate_up, self.down = nn.Linear(D, 32, bias=False), nn.Linear(16, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@zoo("SwiGLU with gate and up interleaved: [..., ::2], [..., 1::2] (gpt-oss)", FOLDS)
class SwiGLUInterleaved(SwiGLUPacked):
    def forward(self, x):
        y = self.gate_up(self.norm(x))
        return x + self.down(F.silu(y[..., ::2]) * y[..., 1::2])


@zoo("F.glu", FOLDS)
class GLU(SwiGLUPacked):
    def forward(self, x):
        return x + self.down(F.glu(self.gate_up(self.norm(x))))


@zoo("LayerScale on the branch, not on the norm", FOLDS)
class LayerScale(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.scale1, self.scale2 = matrix(D), matrix(D)

    def forward(self, x):
        x = x + self.scale1 * self.mix(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


@zoo("ReZero and stochastic depth in eval mode", FOLDS)
class StochasticDepth(Block):
    def forward(self, x):
        if not self.training or torch.rand(()) < 0.5:
            x = super().forward(x)
        return x


class ViT(nn.Module):
    """Patches by a convolution, CLS, positions, blocks, final norm, head on CLS."""

    def __init__(self, norm):
        super().__init__()
        self.patches, self.cls, self.positions = nn.Conv2d(3, D, 2, 2), matrix(1, 1, D), matrix(1, 5, D)
        self.blocks, self.norm, self.head = nn.Sequential(Block(norm), Block(norm)), norm(D), nn.Linear(D, 3)

    def embed(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions

    def forward(self, image):
        return self.head(self.norm(self.blocks(self.embed(image)))[:, 0])


IMAGE = (floats("B", 3, 4, 4),)
add("ViT", "ViT: the final norm before CLS is taken", ViT, FOLDS, theme="blocks", inputs=IMAGE)


@zoo("ViT: CLS is taken before the final norm", FOLDS, inputs=IMAGE)
class ViTClsFirst(ViT):
    def forward(self, image):
        return self.head(self.norm(self.blocks(self.embed(image))[:, 0]))


@zoo("ViT with mean pooling after the final norm", EITHER, inputs=IMAGE)
class ViTMean(ViT):
    def forward(self, image):
        return self.head(self.norm(self.blocks(self.embed(image)))[:, 1:].mean(1))


@zoo("ViT with mean pooling before the final norm (fc_norm)", FOLDS, inputs=IMAGE)
class ViTMeanFirst(ViT):
    def forward(self, image):
        return self.head(self.norm(self.blocks(self.embed(image))[:, 1:].mean(1)))


@zoo("DeiT: CLS and distillation token with heads of their own", FOLDS, inputs=IMAGE)
class DeiT(ViT):
    def __init__(self, norm):
        super().__init__(norm)
        self.head_dist = nn.Linear(D, 3)

    def forward(self, image):
        h = self.norm(self.blocks(self.embed(image)))
        return (self.head(h[:, 0]) + self.head_dist(h[:, 1])) / 2


@zoo("DINO: CLS and patch tokens returned normed", REFUSED, inputs=IMAGE, blames="norm")
class DINO(ViT):
    def forward(self, image):
        h = self.norm(self.blocks(self.embed(image)))
        return {"cls": h[:, 0], "patches": h[:, 1:]}


@zoo("CLIP's projection: pooled @ self.proj", FOLDS, REFUSED, why="bias", inputs=IMAGE)
class CLIPProjection(ViT):
    def __init__(self, norm):
        super().__init__(norm)
        self.head, self.proj = None, matrix(D, 3)

    def forward(self, image):
        return self.norm(self.blocks(self.embed(image))[:, 0, :]) @ self.proj


class Mixer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm1, self.tokens = norm(D), nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
        self.norm2, self.channels = norm(D), MLP()

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


SQUARE = (floats("B", D, D),)
add("Mixer", "MLP-Mixer, as many tokens as channels", Mixer, REFUSED, theme="blocks", blames="norm1", inputs=SQUARE)
add("MixerChannels", "MLP-Mixer, channel norms", Mixer, FOLDS, theme="blocks", names=("norm2",), inputs=SQUARE)


@zoo("gMLP: a norm in the spatial gate", REFUSED, inputs=SQUARE, blames="gate_norm")
class GMLP(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.up, self.gate_norm, self.spatial = nn.Linear(D, 16), norm(D), nn.Linear(D, D)
        self.down = nn.Linear(D, D)

    def forward(self, x):
        u, v = self.up(self.norm(x)).relu().chunk(2, -1)
        return x + self.down(u * self.spatial(self.gate_norm(v).mT).mT)


@zoo("adaLN (DiT): a norm without gain, shifted and scaled by a condition", REFUSED, inputs=(*SQUARE, floats("B", 4)))
class AdaLN(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.mlp = norm(D, elementwise_affine=False), MLP()
        self.modulation = nn.Linear(4, 3 * D)

    def forward(self, x, condition):
        shift, scale, gate = self.modulation(condition)[:, None].chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


@zoo("FiLM after the linear map, not before", FOLDS, inputs=(*SQUARE, floats("B", 4)))
class FiLM(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.linear, self.modulation = nn.Linear(D, D), nn.Linear(4, 2 * D)

    def forward(self, x, condition):
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        return x + self.linear(self.norm(x)) * (1 + scale) + shift


@zoo("Mamba's block: in_proj, depthwise convolution, gated norm, out_proj", FOLDS)
class Mamba(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.in_proj, self.conv = nn.Linear(D, 32, bias=False), nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.gated_norm, self.out_proj = norm(16), nn.Linear(16, D, bias=False)

    def forward(self, x):
        y, z = self.in_proj(self.norm(x)).chunk(2, -1)
        y = F.silu(self.conv(y.mT)[..., : x.shape[1]].mT).cumsum(1)
        return x + self.out_proj(self.gated_norm(y * F.silu(z)))


@zoo("a recurrent layer by hand: h = tanh(W norm(x) + U h)", FOLDS)
class Recurrent(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w, self.u = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        steps, h = self.w(self.norm(x)), x.new_zeros(x.shape[0], D)
        for step in steps.unbind(1):
            h = torch.tanh(step + self.u(h))
        return h


@zoo("a recurrent layer whose state is normed too", FOLDS)
class RecurrentNormedState(Recurrent):
    def __init__(self, norm):
        super().__init__(norm)
        self.state_norm = norm(D)

    def forward(self, x):
        steps, h = self.w(self.norm(x)), x.new_zeros(x.shape[0], D)
        for step in steps.unbind(1):
            h = torch.tanh(step + self.u(self.state_norm(h)))
        return h


for cell in (nn.RNN, nn.GRU, nn.LSTM):

    class Over(Normed):
        def __init__(self, norm, cell=cell):
            super().__init__(norm)
            self.cell = cell(D, 6, batch_first=True)

        def forward(self, x):
            return self.cell(self.norm(x))[0]

    add(f"{cell.__name__}OverNorm", f"nn.{cell.__name__} fed by the norm", Over, FOLDS, theme="blocks")

for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):

    class CellOver(Normed):
        def __init__(self, norm, cell=cell):
            super().__init__(norm)
            self.cell = cell(D, 6)

        def forward(self, x):
            out = self.cell(self.norm(x[:, 0]))
            return self.cell(self.norm(x[:, 1]), out)

    add(f"{cell.__name__}OverNorm", f"nn.{cell.__name__} fed by the norm, twice", CellOver, FOLDS, theme="blocks")


def torchs(layer):
    """torch's own layer, built so that its norms are of the class that the zoo asks for."""

    def build(norm):
        module = layer()
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.LayerNorm):
                module.set_submodule(name, norm(D))
        return module

    return build


# Its encoder reads the bias of its norms, so that it runs with LayerNorm only.
WORDS = {"batch_first": True, "norm_first": True, "dropout": 0.0}


class Encoder(nn.Module):
    """torch's encoder with a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 16, **WORDS)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)
        self.head = nn.Linear(D, 3)

    def forward(self, x, mask=None):
        return self.head(self.encoder(x, src_key_padding_mask=mask))


add("TorchEncoder", "nn.TransformerEncoder, pre-norm, with a head", torchs(Encoder), None, FOLDS, theme="blocks")
add(
    "TorchEncoderPadded",
    "nn.TransformerEncoder with a padding mask",
    torchs(Encoder),
    None,
    FOLDS,
    theme="blocks",
    inputs=(floats("B", "T", D), flags("B", "T")),
)
add(
    "TorchEncoderPostNorm",
    "nn.TransformerEncoderLayer, post-norm",
    torchs(lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)),
    None,
    REFUSED,
    theme="blocks",
    blames="norm[12]",
)
DECODER = torchs(lambda: nn.TransformerDecoderLayer(D, 2, 16, **WORDS))
MEMORY = (floats("B", "T", D), floats("B", 4, D))
add("TorchDecoder", "nn.TransformerDecoderLayer, pre-norm", DECODER, EITHER, theme="blocks", inputs=MEMORY)
add(
    "TorchDecoderInner",
    "nn.TransformerDecoderLayer, pre-norm, the norms of self-attention and MLP",
    DECODER,
    FOLDS,
    theme="blocks",
    inputs=MEMORY,
    names=("norm1", "norm3"),
)
add(
    "TorchTransformer",
    "nn.Transformer: its encoder's and decoder's final norms feed others",
    torchs(lambda: nn.Transformer(D, 2, 1, 1, 16, **WORDS)),
    None,
    REFUSED,
    theme="blocks",
    inputs=MEMORY,
)


class GPT(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(12, D), nn.Embedding(16, D)
        self.blocks, self.norm = nn.ModuleList([Block(norm), Block(norm)]), norm(D)
        self.head = nn.Linear(D, 12, bias=False)

    def hidden(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids):
        return self.head(self.norm(self.hidden(ids)))


add("GPT", "a decoder of two blocks", GPT, FOLDS, theme="blocks", inputs=IDS)


@zoo("a loss instead of logits", FOLDS, inputs=IDS)
class GPTLoss(GPT):
    def forward(self, ids):
        return F.cross_entropy(super().forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@zoo("a language head and a value head", FOLDS, inputs=IDS)
class ActorCritic(GPT):
    def __init__(self, norm):
        super().__init__(norm)
        self.value = nn.Linear(D, 1)

    def forward(self, ids):
        h = self.norm(self.hidden(ids))
        return self.head(h), self.value(h).squeeze(-1)


@zoo("several tokens predicted: the trunk's norm feeds the head and the next stage", EITHER, inputs=IDS)
class MultiToken(GPT):
    def __init__(self, norm):
        super().__init__(norm)
        self.next, self.next_norm = nn.Linear(2 * D, D), norm(D)

    def forward(self, ids):
        h = self.norm(self.hidden(ids))
        x = self.next(torch.cat([h, self.embedding(ids.roll(-1, 1))], -1))
        return self.head(h), self.head(self.next_norm(x))


@zoo("greedy decoding in a loop", FOLDS, inputs=LONG)
class Greedy(GPT):
    def forward(self, ids):
        for _ in range(2):
            ids = torch.cat([ids, super().forward(ids)[:, -1:].argmax(-1)], 1)
        return super().forward(ids)


@zoo("one input fed back: a norm on the model's own last output", FOLDS)
class Feedback(Block):
    def forward(self, x):
        y = x
        for _ in range(2):
            y = super().forward(x + y.detach())
        return y
