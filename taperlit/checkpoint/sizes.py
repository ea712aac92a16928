"""A model's config against the tensors in its file, before anything of its size is built."""

from collections.abc import Mapping, Sequence
from typing import Any

from taperlit.errors import TaperlitError
from taperlit.transformer import TransformerConfig


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
