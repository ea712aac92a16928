"""A decoder-only pre-norm transformer in one file: GPT-2, the Llama family, and the paper's small models.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head width.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taperlit.errors import TaperlitError
from taperlit.fields import mismatch, shown
from taperlit.loss import chunked_cross_entropy, token_losses
from taperlit.norm import Float32State


class MlpKind(NamedTuple):
    """What a feed-forward layer computes between its linear maps.

    Args:
        activation: of the gate where there is one, else of the inner features; same shape out as in.
        gated: the inner features are ``activation(gate_proj(x)) * up_proj(x)``, else ``activation(up_proj(x))``.
    """

    activation: Callable[[Tensor], Tensor]
    gated: bool


MLP_KINDS = {
    "swiglu": MlpKind(F.silu, gated=True),
    "glu": MlpKind(torch.sigmoid, gated=True),
    "gelu": MlpKind(partial(F.gelu, approximate="tanh"), gated=False),
    "relu": MlpKind(F.relu, gated=False),
}
"""By the name in :class:`TransformerConfig`: SwiGLU (arXiv:2002.05202), GLU (arXiv:1612.08083), GELU in GPT-2's tanh
approximation, and ReLU. SwiGLU squares a token that is larger than the others; the rest pass its size on as it is, for
GLU's gate lies between 0 and 1, GELU approaches its input and ReLU is it. That matters once no norm takes the size out.
"""


class RopeScaling(TypedDict):
    """How Llama 3 stretches its rotary positions beyond the context that it was first trained with.

    With ``turns`` the times that a frequency turns within that context::

        share = clamp((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        frequency' = share * frequency + (1 - share) * frequency / factor

    Keys:
        factor: slow frequencies are divided by it.
        low_freq_factor: those that turn fewer times are divided in full.
        high_freq_factor: those that turn more often stay as they are.
        original_max_position_embeddings: that context, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


LARGEST = {
    "n_layer": 1 << 12,
    **dict.fromkeys(("vocab_size", "block_size", "n_head", "n_kv_head", "d_model", "d_ff", "d_head"), 1 << 24),
}
"""The largest sizes that a config may have: what is beyond is a slip, and would take for ever to build."""


@dataclass
class TransformerConfig:
    """The shape of a transformer.

    Args:
        vocab_size: tokens in the vocabulary.
        block_size: longest context, in tokens.
        n_layer: blocks.
        n_head: query heads.
        n_kv_head: key/value heads (grouped-query attention); None is ``n_head``.
        d_model: width of the residual stream.
        d_ff: inner width of the MLP; None is 4 ``d_model``, or 8/3 of it, rounded up to 64, where the MLP is gated, so
            that it has about as many parameters.
        norm: kind of every norm.
        norm_eps: its epsilon.
        position: rotary or learned absolute positions.
        rope_theta: base of the rotary frequencies.
        mlp: kind of every MLP, see ``MLP_KINDS``.
        bias: biases in the linear maps of the blocks, but for what ``qkv_bias`` says.
        tied: the head shares the embedding's matrix.
        d_head: width of a head; None is ``d_model / n_head``.
        qkv_bias: biases in the maps to queries, keys and values; None is ``bias``.
        rope_scaling: of the rotary frequencies, as in Llama 3.1; None is none.
        init: spread of the initial weights, all normal: ``gpt2`` is 0.02, and ``fan_in`` is ``1 / sqrt(d_in)`` in the
            blocks' linear maps, whatever their width, and 0.02 in the embeddings and the head. In both, the maps that
            write to the residual stream have ``1 / sqrt(2 n_layer)`` of it. No part of the trained model's shape.
        embed_norm: each token's embedding is divided by its root mean square before the blocks; a tied head has the
            matrix as it is. It is a function of the token alone, so folding puts it into the table, for nothing at
            inference, see :meth:`Transformer.token_table`. Without it a tied head's gradients make the rows of rare
            tokens many times the others', which SwiGLU squares block after block once no norm takes the size out.

    Raises:
        TaperlitError: a value that is none of these, or sizes that do not go together.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    d_model: int = 768
    d_ff: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    mlp: Literal["swiglu", "glu", "gelu", "relu"] = "swiglu"
    bias: bool = False
    tied: bool = False
    d_head: int | None = None
    qkv_bias: bool | None = None
    rope_scaling: RopeScaling | None = None
    init: Literal["gpt2", "fan_in"] = field(default="gpt2", compare=False)
    embed_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("norm", "position", "mlp", "init"):
            choices = get_args(type(self).__dataclass_fields__[name].type)
            if getattr(self, name) not in choices:
                raise TaperlitError(f"{name} is {shown(getattr(self, name))}; choose from {', '.join(choices)}.")
        for name, hint in _HINTS.items():
            if name != "rope_scaling" and (wrong := mismatch(getattr(self, name), hint, name)) is not None:
                raise TaperlitError(f"{wrong}; correct it.")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.d_ff is None:
            self.d_ff = 64 * math.ceil(8 * self.d_model / 3 / 64) if self.gated_mlp else 4 * self.d_model
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        for name, most in LARGEST.items():
            if (size := getattr(self, name)) is not None and not 1 <= size <= most:
                bound = "at least 1" if size < 1 else f"at most {most}"
                raise TaperlitError(f"{name} must be {bound}, not {shown(size)}.")
        if self.norm_eps < 0:
            raise TaperlitError(f"norm_eps must be at least 0, not {self.norm_eps}.")
        if not 1 <= self.rope_theta <= 1e30:
            raise TaperlitError(f"rope_theta must be between 1 and 1e30, not {shown(self.rope_theta)}.")
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise TaperlitError(
                    f"d_model {self.d_model} is not a multiple of n_head {self.n_head}; change one, or give d_head."
                )
            self.d_head = self.d_model // self.n_head
        if self.n_head % self.n_kv_head:
            raise TaperlitError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}.")
        if self.position == "rope" and self.d_head % 2:
            raise TaperlitError(f"Rotary positions need an even head width, not {self.d_head}.")
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)

    def _check_scaling(self, scaling: RopeScaling) -> None:
        if not isinstance(scaling, dict):
            raise TaperlitError(f"rope_scaling is {shown(scaling)}, not a dictionary; give its keys.")
        keys = RopeScaling.__annotations__.keys()
        if self.position != "rope":
            raise TaperlitError(f"rope_scaling is for position 'rope', not {self.position!r}; leave it out.")
        if scaling.keys() != keys:
            raise TaperlitError(
                f"rope_scaling has {', '.join(map(str, scaling))}; give {', '.join(keys)}, and nothing else."
            )
        if (wrong := mismatch(scaling, RopeScaling, "rope_scaling")) is not None:
            raise TaperlitError(f"{wrong}; correct it.")
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if not (0 < low < high and scaling["factor"] > 0 and scaling["original_max_position_embeddings"] > 0):
            raise TaperlitError(
                f"rope_scaling needs 0 < low_freq_factor < high_freq_factor and the others above 0, not {scaling}."
            )

    @property
    def head_width(self) -> int:
        """``d_head``, which is never None once the config is made."""
        assert self.d_head is not None
        return self.d_head

    @property
    def kv_heads(self) -> int:
        """``n_kv_head``, which is never None once the config is made."""
        return self.n_kv_head or self.n_head

    @property
    def d_inner(self) -> int:
        """``d_ff``, which is never None once the config is made."""
        assert self.d_ff is not None
        return self.d_ff

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate."""
        return MLP_KINDS[self.mlp].gated

    def init_std(self, d_in: int, writes: bool = False) -> float:
        """Spread of the initial weights of a linear map in a block.

        Args:
            d_in: its features in.
            writes: what it returns is added to the residual stream.
        """
        std = 1 / math.sqrt(d_in) if self.init == "fan_in" else 0.02
        return std / math.sqrt(2 * self.n_layer) if writes else std

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "TransformerConfig":
        """The named entry of ``PRESETS`` with some fields changed.

        Raises:
            TaperlitError: no preset or field of that name.
        """
        if name not in PRESETS:
            raise TaperlitError(f"No preset {name!r}; choose from {', '.join(PRESETS)}.")
        unknown = overrides.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise TaperlitError(f"No model option {min(unknown)!r}; choose from {', '.join(cls.__dataclass_fields__)}.")
        return cls(**{**PRESETS[name], **overrides})


_HINTS = get_type_hints(TransformerConfig)
TransformerOverrides = TypedDict("TransformerOverrides", _HINTS, total=False)  # type: ignore[misc]
"""The fields of ``TransformerConfig`` that a run may change in its preset."""

_GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True)
_LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, vocab_size=32000, block_size=4096)
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "block_size": 8192, "rope_theta": 500000.0}
# The paper's small models: 8 layers, context 512, 10k vocabulary. It gives no widths; ours meet the sizes in the names
# with tied embeddings counted once and heads of 16 to 64.
_SMALL = {**_LLAMA, "vocab_size": 10000, "block_size": 512, "n_layer": 8, "tied": True}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2_124m": _GPT2,
    "gpt2_350m": dict(_GPT2, n_layer=24, n_head=16, d_model=1024),
    "gpt2_774m": dict(_GPT2, n_layer=36, n_head=20, d_model=1280),
    "gpt2_1558m": dict(_GPT2, n_layer=48, n_head=25, d_model=1600),
    "llama_350m": dict(_LLAMA, n_layer=24, n_head=16, d_model=1024, vocab_size=50304, block_size=2048, tied=True),
    "llama2_7b": dict(_LLAMA, n_layer=32, n_head=32, d_model=4096, d_ff=11008),
    "llama3_1b": dict(_LLAMA3, n_layer=16, n_head=32, n_kv_head=8, d_model=2048, d_ff=8192, tied=True),
    "llama3_8b": dict(_LLAMA3, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336),
    "small_1m": dict(_SMALL, n_head=4, d_model=64, d_ff=192),
    "small_3m": dict(_SMALL, n_head=4, d_model=128, d_ff=384),
    "small_9m": dict(_SMALL, n_head=4, d_model=256, d_ff=640),
    "small_30m": dict(_SMALL, n_head=8, d_model=512, d_ff=1344),
}


class Linear(nn.Linear):
    """``nn.Linear`` that initializes to a normal of a given spread, also when built on the meta device.

    Args:
        d_in: features in.
        d_out: features out.
        bias: it has one.
        std: of the initial weights.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = False, std: float = 0.02) -> None:
        self.std = std  # before torch's constructor, which calls reset_parameters
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self) -> None:
        """Normal weights, zero biases."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` with GPT-2's initial spread."""

    def reset_parameters(self) -> None:
        """Normal weights."""
        nn.init.normal_(self.weight, std=0.02)


def unit_rows(x: Tensor) -> Tensor:
    """``x`` (..., d) over its rows' root mean square; of such rows, the same again. Rows of zeros stay so."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-20)


def machine_memory() -> float:
    """The machine's memory, in bytes; without end where it is not told."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


class Rope(Float32State):
    """Rotary position embedding (arXiv:2104.09864), in Llama's half-split layout; tables stay float32."""

    float32_state = ("cos", "sin")
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        size = 16 * config.block_size * config.head_width  # bytes, while they are filled
        if torch.get_default_device().type != "meta" and size > (memory := machine_memory()) / 2:
            raise TaperlitError(
                f"The rotary tables of block_size {config.block_size} take {size / 1e9:.1f} GB to make, and this "
                f"machine has {memory / 1e9:.1f}; lower block_size."
            )
        self.register_buffer("cos", torch.empty(config.block_size, config.head_width), persistent=False)
        self.register_buffer("sin", torch.empty(config.block_size, config.head_width), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the tables."""
        position = torch.arange(self.config.block_size, dtype=torch.float32, device=self.cos.device)
        angle = torch.outer(position, self.frequencies()).repeat(1, 2)  # (block_size, D)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def frequencies(self) -> Tensor:
        """Radians per token of each pair of features, the fastest first: (D / 2,) float32."""
        config, D = self.config, self.config.head_width
        half = torch.arange(0, D, 2, dtype=torch.float32, device=self.cos.device)
        # Not theta ** (-half / D), whose rounding is another: at position 10000 Llama's own would be a milliradian off.
        frequency = 1.0 / config.rope_theta ** (half / D)
        if (scaling := config.rope_scaling) is None:
            return frequency
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequency / scaling["factor"], frequency, share)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` (B, H, T, D) by its positions, 0 to T - 1."""
        cos, sin = (table[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        left, right = sin.chunk(2, dim=-1)
        # The minus of the rotation is put into the small table, so that one roll swaps the halves of x.
        return torch.addcmul(x * cos, x.roll(self.config.head_width // 2, -1), torch.cat((-left, right), dim=-1))


class Attention(nn.Module):
    """Causal grouped-query attention through torch's SDPA."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = config.n_head, config.kv_heads, config.head_width
        d_q, d_kv, qkv_bias = self.n_head * self.d_head, self.n_kv_head * self.d_head, bool(config.qkv_bias)
        std = config.init_std(config.d_model)
        self.q_proj = Linear(config.d_model, d_q, qkv_bias, std)
        self.k_proj = Linear(config.d_model, d_kv, qkv_bias, std)
        self.v_proj = Linear(config.d_model, d_kv, qkv_bias, std)
        self.o_proj = Linear(d_q, config.d_model, config.bias, config.init_std(d_q, writes=True))

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Map (B, T, d_model) to the same shape."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.d_head).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.d_head).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.d_head).transpose(1, 2)
        if rope is not None:
            q, k = rope(q), rope(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Feed-forward layer of one of the kinds in ``MLP_KINDS``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        d, d_ff, std = config.d_model, config.d_inner, config.init_std(config.d_model)
        self.gate_proj = Linear(d, d_ff, config.bias, std) if config.gated_mlp else None
        self.up_proj = Linear(d, d_ff, config.bias, std)
        self.down_proj = Linear(d_ff, d, config.bias, config.init_std(d_ff, writes=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d_model) to the same shape."""
        activation = MLP_KINDS[self.kind].activation
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x)))
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn_norm = build_norm(config)
        self.attn = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Map (B, T, d_model) to the same shape."""
        x = x + self.attn(self.attn_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


def build_norm(config: TransformerConfig) -> nn.Module:
    """One norm of the config's kind."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


class Transformer(nn.Module):
    """Decoder-only transformer.

    With ``targets``, forward returns the mean cross-entropy without ever holding all the logits. With
    ``activation_checkpointing`` set, training keeps only the blocks' inputs and computes the rest again in the backward
    pass.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.tok_embed = Embedding(config.vocab_size, config.d_model)
        self.pos_embed = Embedding(config.block_size, config.d_model) if config.position == "learned" else None
        self.rope = Rope(config) if config.position == "rope" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = build_norm(config)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tied:
            self.head.weight = self.tok_embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        tied = self.head.weight is self.tok_embed.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if tied:  # leaving the meta device makes two matrices of one
            self.head.weight = self.tok_embed.weight
        return self

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        chunk_tokens: int = 4096,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Predict the next token.

        Args:
            tokens: (B, T) token ids.
            targets: (B, T) next-token ids, -100 where none counts. With them the result is a 0-d float32 loss.
            chunk_tokens: tokens whose logits are held at once while computing the loss.
            reduction: ``none`` gives each target's own loss instead, (B, T), and keeps no graph.

        Returns:
            (B, T, vocab_size) logits, or the mean loss over the targets that count, or each target's.

        Raises:
            TaperlitError: more tokens than ``block_size``.
        """
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise TaperlitError(f"{T} tokens are more than the model's context of {self.config.block_size}.")
        x = self.tok_embed(tokens)  # (B, T, d_model)
        if self.config.embed_norm:
            x = unit_rows(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed(torch.arange(T, device=tokens.device))
        for block in self.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, self.rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, self.rope)
        x = self.final_norm(x)
        if targets is None:
            return self.head(x)
        compute = chunked_cross_entropy if reduction == "mean" else token_losses
        return compute(self.head, x, targets, chunk_tokens)

    def token_losses(self, tokens: Tensor, targets: Tensor, chunk_tokens: int = 4096) -> Tensor:
        """(B, T) float32 losses, one per target and 0 where it is -100; no graph is kept."""
        with torch.no_grad():
            return self(tokens, targets, chunk_tokens=chunk_tokens, reduction="none")

    def token_table(self) -> Tensor:
        """The embeddings of all tokens as the blocks are given them, ``embed_norm`` included: (vocab_size, d_model)."""
        return unit_rows(self.tok_embed.weight) if self.config.embed_norm else self.tok_embed.weight

    @torch.no_grad()
    def fold_embed_norm(self) -> None:
        """Put ``embed_norm`` into the table, in place, where there is one; a tied head then has a matrix of its own."""
        if self.config.embed_norm:
            weight = self.tok_embed.weight
            self.tok_embed.weight = nn.Parameter(self.token_table(), weight.requires_grad)
            self.config = replace(self.config, embed_norm=False)

    def num_parameters(self) -> int:
        """Parameters, shared ones once, the taper's second branch not at all."""
        return sum(p.numel() for name, p in self.named_parameters() if ".taper_" not in name)
