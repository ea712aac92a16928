"""Find the module that a callback was given by name, and see or change what it is called with."""

from typing import Any

import lightning as L
from torch import Tensor, nn

from taperlit.errors import TaperlitError


def named_module(pl_module: L.LightningModule, name: str, who: str) -> nn.Module:
    """A submodule by its dotted name; the empty name is the LightningModule itself.

    Raises:
        TaperlitError: there is none of that name.
    """
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        raise TaperlitError(
            f"{who} finds no module {name!r} in {type(pl_module).__name__}; its children are "
            f"{', '.join(child for child, _ in pl_module.named_children())}."
        ) from error


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module is called with, by position or by name.

    Raises:
        TaperlitError: it is called without any.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TaperlitError(f"A {type(module).__name__} is called without a tensor, so its input cannot be watched.")


def with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another tensor in place of the one that :func:`first_input` finds."""
    for i, given in enumerate(args):
        if isinstance(given, Tensor):
            return (*args[:i], value, *args[i + 1 :]), kwargs
    name = next(name for name, given in kwargs.items() if isinstance(given, Tensor))
    return args, {**kwargs, name: value}
