"""The q and k path of attention, apart from the v path: whose inputs they are, and where a fused product keeps them.

Separate projections get another input by a hook. A fused one is called with both inputs, and its output is stitched
together; which of its columns are values is written down per class of attention, never guessed.
"""

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.norm import plain_name


class Halved(Protocol):
    """A norm with another output for the q and k path."""

    def for_path(self, name: str, x: Tensor | None) -> Tensor | None:
        """What the projection ``name`` gets in place of ``x``, or None."""


class Path(NamedTuple):
    """A module that computes q, k or all three.

    Args:
        name: in the model.
        module: itself.
        values: of a fused one, which of the columns of its output are v: (d_out,) bool; None of a separate one.
    """

    name: str
    module: nn.Module
    values: Tensor | None


class SeparatePath:
    """A forward pre-hook on a q or k projection.

    Args:
        norm: that feeds it.
        name: of the projection.
    """

    def __init__(self, norm: Halved, name: str) -> None:
        self.norm, self.name = norm, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put the frozen output in the input's place."""
        frozen = self.norm.for_path(self.name, args[0] if args else None)
        return None if frozen is None else (frozen, *args[1:])


class FusedPath:
    """A forward hook on a projection that computes q, k and v at once.

    Args:
        norm: that feeds it.
        name: of the projection.
        values: (d_out,) bool, the columns that are v.
    """

    def __init__(self, norm: Halved, name: str, values: Tensor) -> None:
        self.norm, self.name, self.values = norm, name, values

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Put q and k of the frozen output into the result; v stays."""
        frozen = self.norm.for_path(self.name, args[0] if args else None)
        if frozen is None:
            return None
        return torch.where(self.values.to(output.device), output, module.forward(frozen))


def _last_third(attention: Any, width: int) -> Tensor:
    return torch.arange(width) >= width - width // 3


def _last_heads(attention: Any, width: int) -> Tensor:
    return torch.arange(width) >= width - attention.num_key_value_heads * attention.head_dim


def _third_of_each_head(attention: Any, width: int) -> Tensor:
    head = getattr(attention, "head_dim", None) or attention.head_size
    return torch.arange(width) % (3 * head) >= 2 * head


# By the class of the attention and the projection's name there.
_FUSED: dict[tuple[str, str], Callable[[Any, int], Tensor]] = {
    ("GPT2Attention", "c_attn"): _last_third,
    ("Phi3Attention", "qkv_proj"): _last_heads,
    ("GPTNeoXAttention", "query_key_value"): _third_of_each_head,
    ("BloomAttention", "query_key_value"): _third_of_each_head,
}
_FUSED_NAMES = {name for _, name in _FUSED}


def find_paths(model: nn.Module, norm: str) -> list[Path]:
    """The modules that compute q and k of the attention that a norm feeds.

    Args:
        model: that both are in.
        norm: the norm's name; attention is in the module that holds it.

    Raises:
        TaperlitError: there are no such modules, or several, or one whose columns are unknown.
    """
    block = norm.rpartition(".")[0]
    inside = {
        f"{block}.{name}": module
        for name, module in model.get_submodule(block).named_modules()
        if not any(fnmatch.fnmatchcase(part, "cross*") or part == "encoder_attn" for part in name.split("."))
    }

    def called(leaf: str) -> list[str]:
        return [name for name in inside if plain_name(name).rpartition(".")[2] == leaf]

    fused = [name for leaf in sorted(_FUSED_NAMES) for name in called(leaf)]
    separate = [called(f"{letter}_proj") for letter in "qkv"]
    if len(fused) == 1 and not any(separate):
        (name,) = fused
        attention = inside.get(name.rpartition(".")[0], model)
        key = (type(attention).__name__, plain_name(name).rpartition(".")[2])
        if key not in _FUSED:
            raise TaperlitError(f"which columns of {name} are values is not known of a {key[0]}")
        return [Path(name, inside[name], _FUSED[key](attention, _width(inside[name])))]
    if fused or [len(names) for names in separate] != [1, 1, 1]:
        raise TaperlitError(f"{block} has no q_proj, k_proj and v_proj of one attention, nor a fused one that is known")
    return [Path(names[0], inside[names[0]], None) for names in separate[:2]]


def _width(module: nn.Module) -> int:
    size = getattr(module, "out_features", None) or getattr(module, "nf", None)  # transformers' Conv1D says nf
    if size is None:
        raise TaperlitError(f"how wide the output of a {type(module).__name__} is, is not known")
    return cast(int, size)


def hooks_on(module: nn.Module) -> Iterator[SeparatePath | FusedPath]:
    """The hooks of this file that hang on a module."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if isinstance(hook, SeparatePath | FusedPath):
            yield hook
