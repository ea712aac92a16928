"""The transformer as decoding computes it: fused products, read from a model once.

Shapes: N rows (batch times new tokens), H query heads, K key/value heads, n = H + 2K, D head width, f ``d_ff``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taperlit.decode.layout import Layouts
from taperlit.decode.norms import Norm, RmsForm, read_norm
from taperlit.decode.product import Product, make_product
from taperlit.errors import TaperlitError
from taperlit.norm import call_me
from taperlit.transformer import MLP, MLP_KINDS, Attention, Linear, Transformer, TransformerConfig
from taperlit.transformer import Block as TransformerBlock

Attend = Callable[[int, Tensor], Tensor]
"""Attention of a layer, given (N, n, D) queries, keys and values, rotated; returns (N, H D)."""


@dataclass(frozen=True)
class Block:
    """One block of the transformer.

    Args:
        attn_norm: before attention, or None where it was folded.
        qkv: d_model to n D: queries, keys and values in one product. Where positions are rotary the two halves of each
            query and key are interleaved, so that a rotation is one complex product.
        o: H D to d_model.
        mlp_norm: before the MLP, or None.
        up: d_model to 2 f (gate, then up) or to f.
        down: f to d_model.
        mlp: its kind in ``MLP_KINDS``.
        d_head: D.
        n_turned: H + K, the heads that rotary positions turn.
    """

    attn_norm: Norm | None
    qkv: Product
    o: Product
    mlp_norm: Norm | None
    up: Product
    down: Product
    mlp: str
    d_head: int
    n_turned: int

    def __call__(self, layer: int, x: Tensor, turn: Tensor | None, attend: Attend) -> Tensor:
        """Map the residual stream (N, d_model) to itself; ``turn`` as in :func:`rotate`, or None."""
        y = x if self.attn_norm is None else self.attn_norm(x)
        qkv = self.qkv(y).view(x.shape[0], -1, self.d_head)
        attended = attend(layer, qkv if turn is None else rotate(qkv, self.n_turned, turn))
        x = self.o.added_to(x, attended if attended.dtype == x.dtype else attended.to(x.dtype))
        y = self.up(x if self.mlp_norm is None else self.mlp_norm(x))
        activation, gated = MLP_KINDS[self.mlp]
        if gated:
            gate, up = y.chunk(2, -1)
            y = activation(gate) * up
        else:
            y = activation(y)
        return self.down.added_to(x, y)


def rotate(qkv: Tensor, n_turned: int, turn: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864), where the features that are rotated together lie side by side.

    Args:
        qkv: (N, n, D), which may be overwritten.
        n_turned: heads that are rotated, the first ones: queries and keys.
        turn: (N or 1, 1, D / 2) complex64; or (..., 2) float32 where complex numbers are not compiled.

    Returns:
        (N, n, D) float32.
    """
    N, n, D = qkv.shape
    pairs = qkv.float().view(N, n, D // 2, 2)
    if turn.is_complex():
        torch.view_as_complex(pairs).narrow(1, 0, n_turned).mul_(turn)
        return pairs.view(N, n, D)
    (a, b), (cos, sin) = pairs[:, :n_turned].unbind(-1), turn.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned, pairs[:, n_turned:]), 1).view(N, n, D)


@dataclass(frozen=True)
class Decoder:
    """A model's tensors as decoding uses them.

    Args:
        config: the model's.
        embed: (vocab_size, d_model).
        pos_embed: (block_size, d_model), or None.
        angles: (block_size, D / 2, 2) float32 cosines and sines of rotary positions, or None.
        blocks: in order.
        final_norm: before the head, or None.
        head: d_model to vocab_size.
    """

    config: TransformerConfig
    embed: Tensor
    pos_embed: Tensor | None
    angles: Tensor | None
    blocks: list[Block]
    final_norm: Norm | None
    head: Product

    def hidden(self, tokens: Tensor, position: Tensor | int, attend: Attend) -> Tensor:
        """The residual stream after the last block.

        Args:
            tokens: (N,) token ids.
            position: (N,) of each, or one for all.
            attend: over the cache.

        Returns:
            (N, d_model).
        """
        x = self.embed.index_select(0, tokens)
        if self.pos_embed is not None:
            x = x + rows_at(self.pos_embed, position)
        turn = None
        if self.angles is not None:
            turn = rows_at(self.angles, position).unsqueeze(1)
            if not torch.compiler.is_compiling():
                turn = torch.view_as_complex(turn)
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, turn, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The head on the residual stream: (N, d_model) to (N, vocab_size)."""
        return self.head(x if self.final_norm is None else self.final_norm(x))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that a step reads whole."""
        parts: list[object] = [self.final_norm, self.head]
        for block in self.blocks:
            parts += (block.attn_norm, block.qkv, block.o, block.mlp_norm, block.up, block.down)
        for part in parts:
            yield from (value for value in vars(part).values() if isinstance(value, Tensor)) if part else ()


def rows_at(table: Tensor, position: Tensor | int) -> Tensor:
    """Rows of a table (block_size, ...): one per position, or a single one without copying it."""
    return table.narrow(0, position, 1) if isinstance(position, int) else table.index_select(0, position)


def read_decoder(
    model: nn.Module, device: torch.device, dtype: torch.dtype, layouts: Layouts, form: RmsForm
) -> Decoder:
    """Read a model once.

    Args:
        model: our ``Transformer``: plain, tapered, or folded.
        device: of the tensors.
        dtype: of the tensors.
        layouts: of the matrices.
        form: how RMSNorms are computed.

    Returns:
        The decoder; embedding and, where the layout allows, head share the model's memory where device and dtype do.

    Raises:
        TaperlitError: it is another class, a part of it is of a kind that decoding does not know, or has a ``forward``
            of its own or hooks, which decoding would not call.
    """
    if type(model) is not Transformer:
        raise TaperlitError(f"The decoding engine takes taperlit's Transformer, not a {type(model).__name__}.")
    _require_own_forward(model)
    config, D = model.config, model.config.head_width
    like = torch.empty(1, config.d_model, device=device, dtype=dtype)
    # Interleaves the halves that Llama's layout rotates against each other; values and learned positions stay.
    pairs = torch.arange(D).view(2, -1).t().flatten() if model.rope is not None else torch.arange(D)

    def product(role: str, names: dict[str, nn.Module], interleave: int = 0) -> Product:
        """The maps stacked, the first ``interleave`` of them with their heads' features interleaved."""
        weights, biases = [], []
        for i, (name, module) in enumerate(names.items()):
            if not isinstance(module, nn.Linear) or type(module) not in (Linear, nn.Linear):
                raise TaperlitError(f"{name} is a {type(module).__name__}, which the decoding engine does not know.")
            weight = module.weight.detach().to(device, dtype)
            bias = None if module.bias is None else module.bias.detach().to(device, dtype)
            if i < interleave:
                weight = weight.unflatten(0, (-1, D))[:, pairs].flatten(0, 1)
                bias = None if bias is None else bias.unflatten(0, (-1, D))[:, pairs].flatten()
            weights.append(weight)
            biases.append(bias)
        if any(bias is not None for bias in biases):
            biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return make_product(weight, None if biases[0] is None else torch.cat(biases), layouts[role])

    def norm(name: str, module: nn.Module) -> Norm | None:
        return read_norm(name, module, like, form)

    blocks = []
    for i, block in enumerate(cast("Iterable[TransformerBlock]", model.blocks)):
        at, attn, mlp = f"blocks.{i}", block.attn, block.mlp
        qkv = {f"{at}.attn.{name}": getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj")}
        up = {f"{at}.mlp.{name}": getattr(mlp, name) for name in ("gate_proj", "up_proj")}
        blocks.append(
            Block(
                attn_norm=norm(f"{at}.attn_norm", block.attn_norm),
                qkv=product("qkv", qkv, interleave=2),
                o=product("o", {f"{at}.attn.o_proj": attn.o_proj}),
                mlp_norm=norm(f"{at}.mlp_norm", block.mlp_norm),
                up=product("up", {name: module for name, module in up.items() if module is not None}),
                down=product("down", {f"{at}.mlp.down_proj": mlp.down_proj}),
                mlp=mlp.kind,
                d_head=D,
                n_turned=config.n_head + config.kv_heads,
            )
        )
    angles = None
    if model.rope is not None:
        angles = torch.stack((model.rope.cos[:, : D // 2], model.rope.sin[:, : D // 2]), -1).to(device)
    return Decoder(
        config=config,
        embed=model.token_table().detach().to(device, dtype),
        pos_embed=None if model.pos_embed is None else model.pos_embed.weight.detach().to(device, dtype),
        angles=angles,
        blocks=blocks,
        final_norm=norm("final_norm", model.final_norm),
        head=product("head", {"head": model.head}),
    )


def _require_own_forward(model: Transformer) -> None:
    """Refuse what decoding would not call.

    Raises:
        TaperlitError: a block or a part of it is of another class, or a module has a ``forward`` of its own or hooks.
    """
    for i, block in enumerate(model.blocks):
        parts = {"": block, ".attn": block.attn, ".mlp": block.mlp}
        for (name, part), kind in zip(parts.items(), (TransformerBlock, Attention, MLP), strict=True):
            if type(part) is not kind:
                raise TaperlitError(
                    f"blocks.{i}{name} is a {type(part).__name__}, which the decoding engine does not know."
                )
    for name, module in model.named_modules():
        hooks = {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} - {call_me}
        if hooks or "forward" in vars(module):
            what = "forward hooks" if hooks else "a forward of its own"
            raise TaperlitError(f"{name or 'The model'} has {what}, which decoding does not call; remove it.")
