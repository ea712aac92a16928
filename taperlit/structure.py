"""The record of structure: what folding did to a model, as plain data, to be done again to a freshly built one."""

from collections.abc import Iterator
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.norm import Affine, call_me, plain_name


class Scale(TypedDict):
    """An explicit affine map in a norm's place."""

    shape: list[int]
    centred: bool
    bias: bool


class Structure(TypedDict):
    """How a folded model differs from the model that its class builds.

    Keys:
        identities: the norms that are gone, and the names of the weights that absorbed each.
        scales: the norms that became an explicit :class:`taperlit.norm.Affine`.
        biases: the parameters that were made, and their shapes.
        untied: the parameters that got a value of their own where they shared one.
        difference: the largest relative difference of the outputs, folded against unfolded, in float64.
    """

    identities: dict[str, list[str]]
    scales: dict[str, Scale]
    biases: dict[str, list[int]]
    untied: list[str]
    difference: float


def apply_structure(model: nn.Module, structure: Structure) -> nn.Module:
    """Give a freshly built model the structure of a folded one, in place; its weights are to be loaded then.

    Example::

        model = apply_structure(MyModel(), structure)
        model.load_state_dict(folded_state_dict)

    Args:
        model: of any class, as its constructor builds it, untapered; on the meta device too.
        structure: as :func:`taperlit.fold` returned it.

    Returns:
        The model.

    Raises:
        TaperlitError: the model has no module or parameter of a name in the record.
    """
    try:
        for name in structure["untied"]:
            untie(model, name)
        for name, shape in structure["biases"].items():
            add_bias(model, name, shape)
        for name in structure["identities"]:
            replace(model, name, identity_for(submodule(model, name)))
        for name, scale in structure["scales"].items():
            replace(model, name, explicit_scale(model, name, scale))
    except (AttributeError, KeyError, TypeError) as error:
        raise TaperlitError(
            f"The record of structure does not fit {type(model).__name__}: {' '.join(str(error).split())}; build the "
            "model that was folded."
        ) from error
    return model


def describe(structure: Structure) -> list[str]:
    """A line per norm: what it became."""
    lines = [f"{name} -> {', '.join(weights)}" for name, weights in structure["identities"].items()]
    return lines + [f"{name} -> kept as an explicit scale" for name in structure["scales"]]


def owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    module, _, leaf = parameter.rpartition(".")
    return submodule(model, module), leaf


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its plain name, also inside of what ``torch.compile`` wrapped.

    Raises:
        AttributeError: there is none.
    """
    for found, module in model.named_modules(remove_duplicate=False):
        if plain_name(found) == name:
            return module
    raise AttributeError(f"it has no module {name!r}")


def places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parent that holds a module, with its name there: a module may have several names."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place, under each of its names."""
    old = submodule(model, name)
    new.train(old.training)
    for parent, leaf in list(places(model, old)):
        parent._modules[leaf] = new


def identity_for(norm: nn.Module) -> nn.Identity:
    """An identity that has a norm's forward hooks, and that torch's encoder layers call."""
    identity = nn.Identity()
    for name, value in vars(norm).items():
        if name.startswith("_forward_") and name in vars(identity):
            getattr(identity, name).update(value)
    if isinstance(norm, nn.LayerNorm):
        # nn.TransformerEncoderLayer compares its norms' eps, and then leaves its fused path where there is a hook.
        identity.__dict__["eps"] = norm.eps
        if call_me not in identity._forward_pre_hooks.values():
            identity.register_forward_pre_hook(call_me)
    return identity


def explicit_scale(model: nn.Module, name: str, scale: Scale) -> Affine:
    """An :class:`Affine` of the identity map, on the device and of the dtype that a norm's parameters have."""
    norm = submodule(model, name)
    like = next(norm.parameters(), next(model.parameters()))
    return Affine(tuple(scale["shape"]), scale["centred"], scale["bias"], like.device, like.dtype)


def add_bias(model: nn.Module, name: str, shape: list[int]) -> nn.Parameter:
    """Register a parameter of zeros where a module has None.

    Raises:
        KeyError: the module has something of that name.
    """
    module, leaf = owner(model, name)
    like = next(module.parameters())
    if module.__dict__.get(leaf, "") is None:
        del module.__dict__[leaf]
    if module._parameters.get(leaf) is not None:
        raise KeyError(f"{name} exists already")
    zeros = torch.zeros(shape, device=like.device, dtype=like.dtype)
    parameter = nn.Parameter(zeros, like.requires_grad)
    module.register_parameter(leaf, parameter)
    return parameter


def untie(model: nn.Module, name: str) -> nn.Parameter:
    """Give a parameter a value of its own under one of its names."""
    module, leaf = owner(model, name)
    old = cast(Tensor, module._parameters[leaf])
    module._parameters[leaf] = new = nn.Parameter(old.detach().clone(), old.requires_grad)
    return new
