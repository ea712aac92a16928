"""How the matrices lie in memory, chosen by a short measurement."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from taperlit.decode.clock import fastest
from taperlit.transformer import TransformerConfig

Layout = Literal["rows", "columns"]
"""How a matrix that maps d_in to d_out lies in memory: ``rows`` as ``nn.Linear`` has it, (d_out, d_in); ``columns`` as
(d_in, d_out). With one row of input a CPU reads the second faster in float32."""

MEASURED_BYTES = (
    64 << 20
)  # at most: more than caches hold, so that a small model is measured in them and a large one not


def lay(weight: Tensor, layout: Layout) -> Tensor:
    """(d_out, d_in) as ``nn.Linear`` has it to (d_in, d_out), a view of the same or a copy in the other order."""
    return weight.t().contiguous() if layout == "columns" else weight.t()


def fastest_layout(config: TransformerConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> Layout:
    """The faster layout for the products of a model's blocks.

    Args:
        config: of the model.
        batch_size: rows of each product.
        device: where they run.
        dtype: of the matrices.
    """
    d, f, kv = config.d_model, config.d_inner, config.kv_heads * config.d_head
    shapes = [(d + 2 * kv, d), (d, d), (2 * f if config.mlp == "swiglu" else f, d), (d, f)]  # (d_out, d_in)
    size = sum(d_out * d_in for d_out, d_in in shapes) * dtype.itemsize
    blocks = max(1, min(config.n_layer, MEASURED_BYTES // size))
    weights = [torch.full(shape, 0.1, device=device, dtype=dtype) for _ in range(blocks) for shape in shapes]
    inputs = {d_in: torch.full((batch_size, d_in), 0.1, device=device, dtype=dtype) for _, d_in in shapes}

    def work(layout: Layout) -> Callable[[], None]:
        pairs = [(inputs[weight.shape[1]], lay(weight, layout)) for weight in weights]

        def products() -> None:
            for x, weight in pairs:
                torch.mm(x, weight)

        return products

    with torch.inference_mode():
        return fastest({"rows": work("rows"), "columns": work("columns")}, device)
