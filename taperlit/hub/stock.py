"""A folded model in the stock class that it was folded from, its norms made identities by a huge epsilon.

A norm divides by ``sqrt(mean(h^2) + eps)``. With ``eps = 2^80``, float32, in which norms compute, adds a mean square
below ``2^56`` to it without changing it, so the root is ``2^40``; and a gain of ``2^40`` undoes it. Both are powers of
two, so every value comes out bit for bit, in float32 and bfloat16 (Baroni et al., arXiv:2507.02559, have 1e12 and 1e6,
which round). A LayerNorm centres as well, which does no harm, for what it feeds has the centring folded in: centring
twice is centring once.

Why ``2^80``: with ``2^40`` the mean square must stay below ``2^16``, and SmolLM2-135M's first token reaches ``2^20``.
With a gain of ``1 + weight`` the float32 weight ``2^40 - 1`` rounds to what makes exactly ``2^40`` again. Values down
to ``2^-86`` keep all their bits on the way, and what the backward pass cubes is no subnormal number yet.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from taperlit.checkpoint.assign import assign, build_hollow
from taperlit.hub.load import quiet
from taperlit.hub.registered import fold_config, is_folded, stock_config
from taperlit.structure import Structure
from taperlit.surgery import recognise

EPS = 2.0**80
GAIN = 2.0**40
LARGEST_MEAN_SQUARE = 2.0**56
"""Half of what the last bit of ``EPS`` in float32 counts: below it a mean square is rounded away."""


class NotStockError(Exception):
    """Why the stock class cannot hold a folded model, in words."""


def structure_of(lm: nn.Module, structure: Structure) -> Structure:
    """The record of structure with names as the language model itself has them.

    What an earlier folding did, to a model of a registered class, is in it too.

    Args:
        lm: the ``transformers`` model in a folded ``CausalLM``.
        structure: of that ``CausalLM``, whose names begin with ``lm.``.
    """

    def own(name: str) -> str:
        return name.removeprefix("lm.")

    config = cast(Any, lm).config
    before: Structure | None = config.structure if is_folded(config) else None
    made = Structure(
        identities={own(name): [own(w) for w in weights] for name, weights in structure["identities"].items()},
        scales={own(name): scale for name, scale in structure["scales"].items()},
        biases={own(name): shape for name, shape in structure["biases"].items()},
        untied=[own(name) for name in structure["untied"]],
        difference=structure["difference"],
    )
    if before is not None:
        made["identities"] = {**before["identities"], **made["identities"]}
        made["scales"] = {**before["scales"], **made["scales"]}
        made["biases"] = {**before["biases"], **made["biases"]}
    return made


def stock_model(lm: nn.Module, structure: Structure, dtype: torch.dtype) -> nn.Module:
    """A folded model as its stock class, whose norms are identities.

    Args:
        lm: folded, with float32 weights.
        structure: of :func:`structure_of`.
        dtype: of the result's weights.

    Raises:
        NotStockError: the stock class has a norm that stays beside those that are gone, which have one epsilon; or
            norms that take none from the config; or no place for a bias or a map.
    """
    config = _untied_config(lm, structure)
    for field in _eps_fields(config):
        setattr(config, field, EPS)
    stock = build(config)
    norms = _norms(stock, structure)
    values = dict(lm.state_dict())
    shifts = _move_biases(stock, values, structure, norms)
    for name, (norm, offset) in norms.items():
        scale = values.get(f"{name}.weight")
        weight = torch.ones(norm.weight.shape) if scale is None else scale
        values[f"{name}.weight"] = (GAIN * weight.double() - offset).float()
        if _bias(norm) is not None and f"{name}.bias" not in values:
            values[f"{name}.bias"] = torch.full(norm.bias.shape, shifts.get(name, 0.0))
    return _assigned(stock, values, dtype)


def registered_model(lm: nn.Module, structure: Structure, dtype: torch.dtype) -> nn.Module:
    """A folded model as a class that ``import taperlit`` registers, see :mod:`taperlit.hub.registered`.

    Args:
        lm: folded, with float32 weights.
        structure: of :func:`structure_of`.
        dtype: of the result's weights.

    Raises:
        NotStockError: it was untied otherwise than its config can say.
    """
    config = fold_config(_untied_config(lm, structure), {**structure, "untied": []})
    return _assigned(build(config), dict(lm.state_dict()), dtype)


def build(config: Any) -> Any:
    """The model of a config, its parameters without memory."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return build_hollow(lambda: AutoModelForCausalLM.from_config(config))


def _untied_config(lm: nn.Module, structure: Structure) -> Any:
    """A copy of the stock model's config, with an untied head where folding untied it."""
    config = copy.deepcopy(stock_config(cast(Any, lm).config))
    if not structure["untied"]:
        return config
    head = next(
        f"{name}.weight" for name, module in lm.named_modules() if module is cast(Any, lm).get_output_embeddings()
    )
    if structure["untied"] != [head]:
        raise NotStockError(f"{', '.join(structure['untied'])} has a value of its own, which no config can say")
    config.tie_word_embeddings = False
    return config


def _eps_fields(config: Any) -> list[str]:
    """The fields of a config that are an epsilon: ``rms_norm_eps``, ``layer_norm_epsilon``, ``norm_eps``."""
    return [name for name, value in vars(config).items() if "eps" in name and isinstance(value, float)]


def _norms(stock: nn.Module, structure: Structure) -> dict[str, tuple[Any, float]]:
    """The norms that are to be identities or a map, each with what is added to its weight to make its gain.

    Raises:
        NotStockError: see :func:`stock_model`.
    """
    users = {
        name: module
        for name, module in stock.named_modules()
        if not module._modules and EPS in [value for value in vars(module).values() if isinstance(value, float)]
    }
    gone = [*structure["identities"], *structure["scales"]]
    if left := [name for name in users if name not in gone]:
        stay = "stays" if len(left) == 1 else "stay"
        raise NotStockError(f"{', '.join(places_of(left))} {stay}, and all norms share one epsilon")
    norms = {}
    for name in gone:
        if name not in users:
            raise NotStockError(f"{name} takes no epsilon from the config")
        norm: Any = users[name]
        if getattr(norm, "weight", None) is None:
            raise NotStockError(f"{name} has no gain to undo the epsilon")
        kind = recognise(_with_small_eps(norm))
        scale = structure["scales"].get(name)
        if scale is not None and (scale["centred"] != kind.centred or (scale["bias"] and _bias(norm) is None)):
            raise NotStockError(f"{name} kept a map that a {type(norm).__name__} cannot be")
        norms[name] = (norm, kind.gain_offset)
    return norms


def _bias(norm: nn.Module) -> Tensor | None:
    return getattr(norm, "bias", None)


def _with_small_eps(norm: nn.Module) -> nn.Module:
    """A norm as usual, for a bias would drown all that one with a huge epsilon and a gain near 1 puts out."""
    small = copy.copy(norm)
    vars(small).update({name: 1e-5 for name, value in vars(norm).items() if isinstance(value, float) and value == EPS})
    return small


def _move_biases(
    stock: nn.Module, values: dict[str, Tensor], structure: Structure, norms: dict[str, tuple[Any, float]]
) -> dict[str, float]:
    """Give the biases that folding made to the norms and matrices of a stock class that has none there.

    A matrix ``W`` after a LayerNorm has the centring in it, so it maps the vector of all ones to 0, and
    ``W' = W + b 1^T / (s d)`` maps it to ``b / s``. A bias of ``s`` in every channel of the norm then adds ``b`` to
    what ``W'`` puts out, and nothing to what the norm's other readers do; and as the norm itself centres, ``1^T`` sees
    nothing else.

    Args:
        stock: hollow.
        values: the folded model's state dict; its biases are taken out, its matrices replaced.
        structure: of :func:`structure_of`.
        norms: of :func:`_norms`.

    Returns:
        ``s`` by the norm's name.

    Raises:
        NotStockError: a bias is not of that kind.
    """
    readers: dict[str, list[str]] = {}  # by norm, the linear maps that got a bias
    for bias in structure["biases"]:
        name = bias.removesuffix(".bias")
        norm = next((norm for norm, weights in structure["identities"].items() if f"{name}.weight" in weights), None)
        place = stock.get_submodule(name)
        if norm is None or not isinstance(place, nn.Linear):
            raise NotStockError(f"{bias} was made by folding, and the class has none")
        readers.setdefault(norm, []).append(name)
    shifts = {}
    for norm, names in readers.items():
        module, _ = norms[norm]
        if _bias(module) is None or not recognise(_with_small_eps(module)).centred:
            raise NotStockError(f"{names[0]}.bias was made by folding, and the class has none")
        maps = {name: (values[f"{name}.weight"].double(), values.pop(f"{name}.bias").double()) for name in names}
        d = next(iter(maps.values()))[0].shape[1]
        # So large that what is added to a matrix is no larger than what is in it.
        sizes = [(b.abs().max() / (d * w.square().mean().sqrt().clamp(min=1e-12))).item() for w, b in maps.values()]
        if not max(sizes):
            continue
        shifts[norm] = shift = 2.0 ** math.ceil(math.log2(max(sizes)))
        for name, (w, b) in maps.items():
            values[f"{name}.weight"] = (w + b[:, None] / (shift * d)).float()
    return shifts


def _assigned(model: Any, values: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A hollow model with tensors in a dtype; those that are one in ``values`` are one in it."""
    made: dict[int, Tensor] = {}
    for value in values.values():
        if id(value) not in made:
            made[id(value)] = value.to(dtype) if value.is_floating_point() else value
    # A state dict has a tied parameter once for each name, as different objects on the same memory.
    first: dict[tuple, int] = {}
    for value in values.values():
        place = (value.data_ptr(), value.shape, value.stride())
        made[id(value)] = made[first.setdefault(place, id(value))]
    assign(model, {name: made[id(value)] for name, value in values.items()}, type(model).__name__)
    return cast(nn.Module, model.eval())


def places_of(names: Iterable[str]) -> dict[str, int]:
    """Names with their blocks' numbers as ``*``, each once, and how many there are of it."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
