"""Attention in the ways people write it."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import EITHER, FOLDS, REFUSED, D, Normed, add, flags, floats, matrix, zoo

MEMORY = (floats("B", "T", D), floats("B", 4, D))
NARROW = (floats("B", "T", D), floats("B", 4, 6))


class SelfAttention(Normed):
    """``nn.MultiheadAttention`` of the norm with itself, made with ``words``."""

    def __init__(self, norm, transposed=False, **words):
        super().__init__(norm)
        self.transposed = transposed
        self.attention = nn.MultiheadAttention(D, 2, batch_first=not transposed, **words)

    def forward(self, x):
        h = self.norm(x.transpose(0, 1) if self.transposed else x)
        y = self.attention(h, h, h)[0]
        return x + (y.transpose(0, 1) if self.transposed else y)


for name, about, words, layer in [
    ("MHA", "nn.MultiheadAttention", {}, FOLDS),
    ("MHASequenceFirst", "nn.MultiheadAttention, sequence first", {"transposed": True}, FOLDS),
    ("MHAWithoutBias", "nn.MultiheadAttention(bias=False)", {"bias": False}, EITHER),
    ("MHABiasKV", "nn.MultiheadAttention(add_bias_kv=True)", {"add_bias_kv": True}, FOLDS),
    ("MHAZeroAttention", "nn.MultiheadAttention(add_zero_attn=True)", {"add_zero_attn": True}, FOLDS),
]:
    add(name, about, lambda norm, words=words: SelfAttention(norm, **words), FOLDS, layer, theme="attention")


@zoo("nn.MultiheadAttention without weights returned (fused)", FOLDS)
class MHAFused(SelfAttention):
    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


@zoo("nn.MultiheadAttention with a padding mask", FOLDS, inputs=(floats("B", "T", D), flags("B", "T")))
class MHAPadded(SelfAttention):
    def forward(self, x, mask):
        h = self.norm(x)
        return x + self.attention(h, h, h, key_padding_mask=mask, need_weights=False)[0]


@zoo("nn.MultiheadAttention, positions added to queries and keys (DETR)", REFUSED)
class MHAPositions(SelfAttention):
    def __init__(self, norm):
        super().__init__(norm)
        self.position = matrix(1, D)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h + self.position, h + self.position, h)[0]


@zoo("nn.MultiheadAttention: normed queries, keys and values from memory", EITHER, inputs=MEMORY)
class MHACross(SelfAttention):
    def forward(self, x, memory):
        return x + self.attention(self.norm(x), memory, memory)[0]


@zoo("nn.MultiheadAttention: raw queries, normed memory", EITHER, inputs=MEMORY)
class MHACrossMemory(SelfAttention):
    def forward(self, x, memory):
        h = self.norm(memory)
        return x + self.attention(x, h, h)[0]


@zoo("nn.MultiheadAttention: queries and memory by norms of their own", EITHER, inputs=MEMORY)
class MHACrossTwoNorms(SelfAttention):
    def __init__(self, norm):
        super().__init__(norm)
        self.other = norm(D)

    def forward(self, x, memory):
        h = self.other(memory)
        return x + self.attention(self.norm(x), h, h)[0]


@zoo("nn.MultiheadAttention with kdim and vdim of its own", FOLDS, EITHER, inputs=NARROW)
class MHAKdim(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.attention = nn.MultiheadAttention(D, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x, memory):
        return x + self.attention(self.norm(x), memory, memory)[0]


@zoo("nn.MultiheadAttention with kdim, without bias", FOLDS, EITHER, inputs=NARROW)
class MHAKdimWithoutBias(MHAKdim):
    def __init__(self, norm):
        super().__init__(norm)
        self.attention = nn.MultiheadAttention(D, 2, bias=False, kdim=6, vdim=6, batch_first=True)


@zoo("nn.MultiheadAttention with kdim, the narrow memory normed", FOLDS, EITHER, inputs=NARROW)
class MHAKdimMemory(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm(6)
        self.attention = nn.MultiheadAttention(D, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x, memory):
        h = self.norm(memory)
        return x + self.attention(x, h, h)[0]


@zoo("F.multi_head_attention_forward is given raw values without a projection", REFUSED)
class UnprojectedValues(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        return F.scaled_dot_product_attention(self.query(h), self.key(h), h)


class Attention(Normed):
    """A pre-norm attention whose projections and heads are the subclass's."""

    def __init__(self, norm, bias=True):
        super().__init__(norm)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D)

    def split(self, qkv):
        return [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv.chunk(3, -1)]

    def forward(self, x):
        q, k, v = self.split(self.qkv(self.norm(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


@zoo("fused qkv, chunk", FOLDS)
class FusedChunk(Attention):
    pass


@zoo("fused qkv, split", FOLDS)
class FusedSplit(Attention):
    def split(self, qkv):
        return [part.view(*part.shape[:2], 2, 4).transpose(1, 2) for part in qkv.split([D, D, D], -1)]


@zoo("fused qkv, view, permute, unbind (timm)", FOLDS)
class FusedUnbind(Attention):
    def split(self, qkv):
        return qkv.view(*qkv.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)


@zoo("fused qkv without a bias", FOLDS)
class FusedWithoutBias(Attention):
    def __init__(self, norm):
        super().__init__(norm, bias=False)


@zoo("BEiT's qkv: F.linear with a bias put together from two and zeros", FOLDS, EITHER, why="bias")
class FusedAssembledBias(Attention):
    def __init__(self, norm):
        super().__init__(norm, bias=False)
        self.q_bias, self.v_bias = matrix(D), matrix(D)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.split(F.linear(self.norm(x), self.qkv.weight, bias))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@zoo("fused qkv by a raw matrix: F.linear(x, self.qkv.weight).chunk", EITHER, REFUSED, why="bias")
class FusedRaw(Attention):
    def forward(self, x):
        q, k, v = self.split(F.linear(self.norm(x), self.qkv.weight))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@zoo("grouped queries: one key head for two query heads", FOLDS)
class GQA(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, 4)
        self.out = nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = (m(h).unflatten(-1, (1, 4)).transpose(1, 2) for m in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


@zoo("rotary positions on queries and keys", FOLDS)
class RoPE(Attention):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
        return q, k, v


@zoo("rotary positions by complex numbers", FOLDS)
class ComplexRoPE(Attention):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2)).contiguous()) * turn) for t in (q, k))
        return q.flatten(-2), k.flatten(-2), v


@zoo("ALiBi, softmax by hand", FOLDS)
class ALiBi(Attention):
    def forward(self, x):
        q, k, v = self.split(self.qkv(self.norm(x)))
        steps = torch.arange(x.shape[1])
        bias = -(steps[:, None] - steps).abs() * torch.tensor([0.5, 0.25])[:, None, None]
        scores = q @ k.transpose(-1, -2) / 2 + bias.to(x.dtype)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@zoo("linear attention", FOLDS)
class LinearAttention(Attention):
    def forward(self, x):
        q, k, v = self.split(self.qkv(self.norm(x)))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2))
        return x + self.out(y.transpose(1, 2).flatten(2))


class QKNorm(Attention):
    def __init__(self, norm):
        super().__init__(norm)
        self.q_norm, self.k_norm = norm(4), norm(4)

    def split(self, qkv):
        q, k, v = super().split(qkv)
        return self.q_norm(q), self.k_norm(k), v


add("QKNormTapered", "norms on queries and keys, tapered", QKNorm, REFUSED, theme="attention", blames="[qk]_norm")
add("QKNormKept", "norms on queries and keys, not tapered", QKNorm, FOLDS, theme="attention", names=("norm",))


@zoo("DeepSeek's latent attention: a norm on part of a projection", FOLDS)
class LatentAttention(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.q, self.down = nn.Linear(D, D, bias=False), nn.Linear(D, 6 + 2, bias=False)
        self.latent_norm, self.up = norm(6), nn.Linear(6, 2 * D - 4, bias=False)
        self.out = nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        latent, shared = self.down(h).split([6, 2], -1)
        q = self.q(h).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.up(self.latent_norm(latent)).unflatten(-1, (2, 6)).transpose(1, 2).split([2, 4], -1)
        k = torch.cat([k, shared[:, None].expand(-1, 2, -1, -1)], -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@zoo("keys and queries as one matrix: h W h^T", REFUSED)
class OneMatrixScores(Normed):
    def __init__(self, norm):
        super().__init__(norm)
        self.w, self.v = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        return (self.w(h) @ h.mT).softmax(-1) @ self.v(h)


@zoo("cross attention with a norm for each side (Perceiver)", FOLDS, inputs=NARROW)
class PerceiverCross(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.norm_context = norm(D), norm(6)
        self.to_q, self.to_kv = nn.Linear(D, D, bias=False), nn.Linear(6, 2 * D, bias=False)
        self.to_out = nn.Linear(D, D)

    def forward(self, x, memory):
        q = self.to_q(self.norm(x))
        k, v = self.to_kv(self.norm_context(memory)).chunk(2, -1)
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v))


@zoo("latent queries that are learned", FOLDS, inputs=(floats("B", "T", 6),))
class LearnedLatents(PerceiverCross):
    def __init__(self, norm):
        super().__init__(norm)
        self.latents = matrix(3, D)

    def forward(self, memory):
        return super().forward(self.latents.expand(memory.shape[0], -1, -1), memory)


@zoo("keys and values of latents and memory in one row (Flamingo)", REFUSED, inputs=MEMORY)
class Resampler(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm_media, self.norm_latents = norm(D), norm(D)
        self.to_q, self.to_kv = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False)

    def forward(self, x, memory):
        media, latents = self.norm_media(memory), self.norm_latents(x)
        k, v = self.to_kv(torch.cat([media, latents], 1)).chunk(2, -1)
        return x + F.scaled_dot_product_attention(self.to_q(latents), k, v)


@zoo("a cache of keys and values that grows with each call", FOLDS)
class KeyCache(Attention):
    def __init__(self, norm):
        super().__init__(norm)
        self.cache = []

    def forward(self, x):
        q, k, v = self.split(self.qkv(self.norm(x)))
        self.cache.append((k.detach(), v.detach()))
        k, v = (torch.cat([entry[i][: x.shape[0]] for entry in self.cache[-1:]], 2) for i in (0, 1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@zoo("prefill and one decoding step with a cache in the same run", FOLDS)
class PrefillAndDecode(Attention):
    def forward(self, x):
        q, k, v = self.split(self.qkv(self.norm(x[:, :-1])))
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q, new_k, new_v = self.split(self.qkv(self.norm(x[:, -1:])))
        second = F.scaled_dot_product_attention(q, torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
        return x + self.out(torch.cat([first, second], 2).transpose(1, 2).flatten(2))
