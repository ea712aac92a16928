"""A learnable scalar after the token embedding, in the embedding's own module."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.norm import plain_name

_NAMES = ("tok_embed", "wte", "embed_tokens", "embed_in", "word_embeddings", "tok_embeddings")


class ScaledEmbedding(nn.Module):
    """A mix-in before an embedding's own class: its output times ``scale``, (1,).

    The instance and its ``weight`` stay, so that a tied head reads the matrix as it is, without the scale.
    """

    scale: nn.Parameter  # of one dimension: FSDP2 shards no scalars

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Token ids (...) to (..., d_model).

        Raises:
            TaperlitError: tensor parallelism has split the matrix over processes.
        """
        y: Tensor = super().forward(*args, **kwargs)
        if hasattr(y, "device_mesh"):  # parts of a sum, whose product with a split scale has no gradient in torch
            raise TaperlitError(
                "DyT's and Derf's scalar after the embedding knows no tensor parallelism; set the strategy's "
                "tensor_parallel_size to 1."
            )
        return y * self.scale.to(y.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the embedding, and the scale to ``sqrt(d_model)``."""
        super().reset_parameters()  # type: ignore[misc]
        self.scale.fill_(math.sqrt(self.embedding_dim))  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so no importer finds it by name.
        return _new_scaled, (_OWN_CLASS[type(self)],), self.__dict__.copy()


_SCALED_CLASS: dict[type[nn.Module], type[ScaledEmbedding]] = {}
_OWN_CLASS: dict[type[nn.Module], type[nn.Module]] = {}  # of the classes that were made


def _scaled_class(own: type[nn.Module]) -> type[ScaledEmbedding]:
    if own not in _SCALED_CLASS:
        made = type(f"Scaled{own.__name__}", (ScaledEmbedding, own), {"__doc__": f"A {own.__name__} with a scale."})
        _SCALED_CLASS[own], _OWN_CLASS[made] = made, own
    return _SCALED_CLASS[own]


def _new_scaled(own: type[nn.Module]) -> ScaledEmbedding:
    cls = _scaled_class(own)
    return cls.__new__(cls)


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of a model's tokens: its only one, or the one of a known name.

    Raises:
        TaperlitError: there is none, or several may be it.
    """
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    known = {name: e for name, e in embeddings.items() if plain_name(name).rpartition(".")[2] in _NAMES}
    found = known or embeddings
    if len(found) != 1:
        raise TaperlitError(
            f"Which of {', '.join(found)} embeds the tokens is unknown; only {', '.join(_NAMES)} are known by name."
            if found
            else f"{type(model).__name__} has no nn.Embedding for the scalar after it to be in."
        )
    return next(iter(found.values()))


def scale_embedding(embedding: nn.Embedding) -> None:
    """Put the scalar, ``sqrt(d_model)`` at first, into an embedding, in place: its class changes."""
    weight = embedding.weight
    start = torch.full((1,), math.sqrt(embedding.embedding_dim), device=weight.device, dtype=weight.dtype)
    embedding.scale = nn.Parameter(start)
    cast(nn.Module, embedding).__class__ = _scaled_class(type(embedding))
