"""Models of a user's own, which know nothing of this package, by name: a builder and inputs for each."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and MLP with one packed projection."""

    def __init__(self, d, norm):
        super().__init__()
        self.n1, self.n2 = norm(d), norm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Decoder(nn.Module):
    """A language model with learned positions; its head may share the embedding's matrix."""

    def __init__(self, norm, tied):
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 16), nn.Parameter(torch.randn(12, 16))
        self.blocks = nn.Sequential(*(Block(16, norm) for _ in range(2)))
        self.norm, self.head = norm(16), nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]])))


class Encoder(nn.Module):
    """torch's own encoder, with padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
        self.classify = nn.Linear(16, 3)

    def forward(self, x, lengths):
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        return self.classify(self.encoder(x, src_key_padding_mask=padding)).masked_fill(padding[..., None], 0)


class Tables(nn.Module):
    """Buffers that its state dict leaves out: computed, shared, random with a seed of its own, and cast to bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.inner = nn.Linear(16, 16)
        self.norm = nn.RMSNorm(16)
        self.register_buffer("angles", torch.outer(torch.arange(12.0), 100 ** -torch.linspace(0, 1, 16)).cos(), False)
        self.register_buffer("projection", torch.randn(16, 16), persistent=False)
        self.register_buffer("again", self.projection, persistent=False)
        self.register_buffer("low", torch.linspace(0, 1, 16).bfloat16(), persistent=False)
        self.register_buffer("kept", torch.randn(16))
        self.register_buffer("none", None, persistent=False)

    def forward(self, x):
        y = self.inner(self.norm(x * self.angles[: x.shape[1]]))
        return y @ self.projection + self.again.sum() + self.low * self.kept


def llama(tied):
    """transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **shape))


def inputs(name):
    """What each is called with."""
    generator = torch.Generator().manual_seed(3)
    if name == "encoder":
        return torch.randn(3, 8, 16, generator=generator), torch.tensor([8, 5, 2])
    if name == "tables":
        return (torch.randn(3, 8, 16, generator=generator),)
    return (torch.randint(50, (3, 8), generator=generator),)


MODELS = {
    "rmsnorm": lambda: Decoder(nn.RMSNorm, False),
    "rmsnorm tied": lambda: Decoder(nn.RMSNorm, True),
    "layernorm": lambda: Decoder(nn.LayerNorm, False),
    "layernorm tied": lambda: Decoder(nn.LayerNorm, True),
    "encoder": Encoder,
    "tables": Tables,
    "llama": lambda: llama(False),
    "llama tied": lambda: llama(True),
}


def outputs(model, name):
    """The output tensor, of one thread's arithmetic."""
    torch.set_num_threads(1)
    with torch.no_grad():
        out = model(*inputs(name))
    return getattr(out, "logits", out)
