"""LoRA through ``peft``: adapters beside a model's linear maps, and merged into them."""

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from taperlit.errors import TaperlitError
from taperlit.ranges import require_range
from taperlit.surgery import known_norms


@dataclass
class Lora:
    """Train low-rank adapters of the linear maps, and the norms, in place of all weights (arXiv:2106.09685).

    Args:
        rank: of each adapter.
        alpha: an adapter's output is scaled by ``alpha / rank``.
        dropout: probability with which an adapter's input is zeroed in training.
        targets: names of the maps, or ends of their names (``[q_proj, v_proj]``); None takes every linear map of the
            blocks.

    Raises:
        TaperlitError: a value out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require_range("lora.rank", self.rank, least=1)
        require_range("lora.alpha", self.alpha, above=0)
        require_range("lora.dropout", self.dropout, least=0, below=1)
        if self.targets == []:
            raise TaperlitError("lora.targets names no linear map; leave it out to take all of the blocks'.")


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Give a model's linear maps adapters, in place; it computes what it did until they are trained.

    A map's own weight is then called ``<map>.base_layer.weight``; every other name stays. Only the adapters and the
    norms' gains and biases are trainable afterwards, and so the taper's, which :func:`taperlit.taper` makes of the
    norms': add adapters first. They work on the meta device and under
    :func:`taperlit.checkpoint.assign.build_hollow` too.

    Args:
        model: a :class:`taperlit.hub.causal_lm.CausalLM`, or any model whose blocks are ``model.blocks``.
        lora: what to add.

    Raises:
        TaperlitError: ``peft`` is missing, the model has adapters already or no blocks, or no linear map has a name
            that is asked for, or its weight is another module's too.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise TaperlitError("LoRA needs peft: pip install 'taperlit[lora]'.") from error
    if _adapted(model):
        raise TaperlitError("The model has LoRA adapters already; merge them first (taperlit.hub.lora.merge_lora).")
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if lora.targets is None:
        blocks = getattr(model, "blocks", None)
        if blocks is None:
            raise TaperlitError(f"{type(model).__name__} has no blocks; name its linear maps in lora.targets.")
        chosen = {names[module] for module in blocks.modules() if module in names}
    else:
        chosen = set().union(*(_named(target, [*names.values()]) for target in lora.targets))
    uses = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    for module, name in names.items():
        if name in chosen and uses[id(module.weight)] > 1:
            raise TaperlitError(
                f"lora.targets: the weight of {name} is another module's too, and LoRA would change both."
            )
    norms = [model.get_submodule(name) for name in known_norms(model)]
    # peft tells by such warnings that GPT-2's matrices are transposed, which it sees and heeds.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=lora.dropout,
            target_modules=sorted(chosen),
        )
        inject_adapter_in_model(config, model)
    del model.peft_config  # a note of its own, which would not be known after loading
    for norm in norms:
        norm.requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Merge all LoRA adapters into their linear maps, in place: every map and weight has its own name again.

    What :func:`add_lora` froze stays frozen. A model without adapters is left as it is, and ``peft`` is not imported.

    Raises:
        TaperlitError: an adapter's values are not finite.
    """
    for name, layer in _adapted(model).items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise TaperlitError(
                f"The LoRA adapter of {name} has values that are not finite; use an earlier checkpoint."
            ) from error
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())


def _named(target: str, names: list[str]) -> set[str]:
    """The maps that a target means."""
    found = {name for name in names if f".{name}".endswith(f".{target}")}
    if not found:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise TaperlitError(f"lora.targets: no linear map is called {target}; choose of {ends}.")
    return found


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters by name; none where nothing imported ``peft`` yet."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
