"""How the matrices of a model lie in memory, chosen by a short measurement."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taperlit.decode.clock import fastest
from taperlit.decode.product import Layout, layouts_for, make_product
from taperlit.errors import TaperlitError
from taperlit.transformer import TransformerConfig

Layouts = Mapping[str, Layout]
"""The layout of each of a step's products: ``qkv``, ``o``, ``up`` (with the gate), ``down`` and ``head``."""

MEASURED_BYTES = 48 << 20  # of each product's matrices: more than caches hold, where the model has as many


def shapes_of(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each of a step's products."""
    d, f, D = config.d_model, config.d_inner, config.head_width
    return {
        "qkv": ((config.n_head + 2 * config.kv_heads) * D, d),
        "o": (d, config.n_head * D),
        "up": (2 * f if config.gated_mlp else f, d),
        "down": (d, f),
        "head": (config.vocab_size, d),
    }


def fastest_layouts(
    config: TransformerConfig, batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Layouts:
    """The fastest layout of each product.

    Args:
        config: of the model.
        batch_size: rows of each product.
        device: where they run.
        dtype: of the matrices.
        compiled: the step is compiled.
    """
    with torch.inference_mode():
        return {
            name: _fastest(shape, 1 if name == "head" else config.n_layer, batch_size, device, dtype, compiled)
            for name, shape in shapes_of(config).items()
        }


def same_layouts(
    layout: Layout | Layouts,
    config: TransformerConfig,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Layouts:
    """A layout for each product, as it was asked for; arguments as for :func:`fastest_layouts`.

    Raises:
        TaperlitError: a matrix cannot have that layout here.
    """
    layouts = {}
    for name, (d_out, d_in) in shapes_of(config).items():
        layouts[name] = layout if isinstance(layout, str) else layout[name]
        possible = layouts_for(d_in, d_out, device, dtype, compiled)
        if layouts[name] not in possible:
            raise TaperlitError(f"The {name} matrix cannot be {layouts[name]} here; give {' or '.join(possible)}.")
    return layouts


def in_words(layouts: Layouts) -> str:
    """Layouts in a line: one word where all are the same."""
    different = set(layouts.values())
    return different.pop() if len(different) == 1 else ", ".join(f"{name} {layouts[name]}" for name in layouts)


def _fastest(
    shape: tuple[int, int], count: int, batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Layout:
    d_out, d_in = shape
    count = max(1, min(count, MEASURED_BYTES // (d_out * d_in * dtype.itemsize)))
    x = torch.full((batch_size, d_in), 0.1, device=device, dtype=dtype)

    def work(layout: Layout) -> Callable[[], Tensor]:
        products = [make_product(x.new_full(shape, 0.1), None, layout) for _ in range(count)]

        def all_of_them() -> Tensor:
            return [product(x) for product in products][-1]

        return all_of_them

    return fastest({layout: work(layout) for layout in layouts_for(d_in, d_out, device, dtype, compiled)}, device)
