"""A model's config against the tensors in its file and the memory, before anything of its size is built."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from taperlit.errors import TaperlitError
from taperlit.transformer import TransformerConfig, machine_memory


def check_sizes(config: TransformerConfig, shapes: Mapping[str, Sequence[int]], source: str, mend: str) -> None:
    """Refuse a config whose sizes are not those of the tensors.

    Args:
        config: of our ``Transformer``.
        shapes: of the tensors in the file, by their names in the model.
        source: what holds both, for the error's message.
        mend: what helps then.

    Raises:
        TaperlitError: names the field, its value and the tensor's.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if blocks != config.n_layer:
        raise TaperlitError(f"{source}: n_layer is {config.n_layer}, and its weights are of {blocks} blocks; {mend}.")
    width = ("d_model", config.d_model)
    heads = ("n_head times d_head", config.n_head * config.head_width)
    shared = ("n_kv_head times d_head", config.kv_heads * config.head_width)
    expected = {
        "tok_embed.weight": (("vocab_size", config.vocab_size), width),
        "pos_embed.weight": (("block_size", config.block_size), width),
        "blocks.0.attn.q_proj.weight": (heads, width),
        "blocks.0.attn.k_proj.weight": (shared, width),
        "blocks.0.mlp.up_proj.weight": (("d_ff", config.d_inner), width),
    }
    for name, sizes in expected.items():
        if name not in shapes:
            continue  # what is missing is told by its name, once the model is built
        if len(shapes[name]) != len(sizes):
            raise TaperlitError(f"{source}: {name} has the shape {[*shapes[name]]}, which is no matrix; {mend}.")
        for (field, size), there in zip(sizes, shapes[name], strict=True):
            if size != there:
                raise TaperlitError(f"{source}: {field} is {size}, and {name} has {there}; {mend}.")


def count_parameters(config: TransformerConfig) -> int:
    """Parameters of a ``Transformer`` that is not there yet; a head that shares the embedding's matrix has none."""
    d, f, bias = config.d_model, config.d_inner, int(config.bias)
    q, kv = config.n_head * config.head_width, config.kv_heads * config.head_width
    norm = d * (2 if config.norm == "layernorm" else 1)
    attention = (q + 2 * kv) * (d + int(bool(config.qkv_bias))) + (q + bias) * d
    mlp = (2 if config.gated_mlp else 1) * f * (d + bias) + (f + bias) * d
    tables = config.vocab_size * d * (1 if config.tied else 2)
    positions = config.block_size * d if config.position == "learned" else 0
    return tables + positions + config.n_layer * (attention + mlp + 2 * norm) + norm


def check_memory(config: TransformerConfig) -> None:
    """Refuse a model whose parameters alone are more than all the memory there, where it is about to be built.

    That is on torch's default device and in its default dtype; the meta device holds anything. Every process of a run
    builds the model whole, also where it is split afterwards, so that no other is asked.

    Raises:
        TaperlitError: names the bytes that it needs and those that there are.
    """
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    count = count_parameters(config)
    if (size := count * dtype.itemsize) > (memory := _memory_of(device)):
        what = "this machine" if device.type == "cpu" else f"the device {device}"
        kind = str(dtype).removeprefix("torch.")
        raise TaperlitError(
            f"A model of {count:,} parameters (vocab_size {config.vocab_size}, n_layer {config.n_layer}, d_model "
            f"{config.d_model}, d_ff {config.d_inner}) takes {size / 1e9:,.1f} GB in {kind}, and {what} has "
            f"{memory / 1e9:,.1f}; choose a smaller preset, or lower model.overrides."
        )


def _memory_of(device: torch.device) -> float:
    """Bytes in all; without end where they are not told, as by a GPU that this process does not use yet."""
    if device.type == "cpu":
        return machine_memory()
    if device.type == "cuda" and torch.cuda.is_initialized():
        return float(torch.cuda.get_device_properties(device).total_memory)
    return math.inf


def check_counts(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], source: str, mend: str) -> None:
    """Refuse a ``config.json`` of ``transformers`` with more layers or experts than its tensors can be of.

    Args:
        config: the file's content.
        shapes: of the tensors, by any names.
        source: as in :func:`check_sizes`.
        mend: as in :func:`check_sizes`.

    Raises:
        TaperlitError: names the field and its value.
    """
    most = max(len(shapes), *(size for shape in shapes.values() for size in shape), 0)
    text = config.get("text_config")
    for name, value in {**config, **(text if isinstance(text, Mapping) else {})}.items():
        if ("layer" in name or "expert" in name) and isinstance(value, int | float) and value > most:
            raise TaperlitError(f"{source}: {name} is {value}, and there are {len(shapes)} tensors; {mend}.")
