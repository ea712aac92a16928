"""Products of few rows with a matrix, and the ways in which the matrix may lie in memory."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["rows", "columns", "split", "packed"]
"""How a matrix that maps d_in to d_out lies in memory. ``rows``: as ``nn.Linear`` has it, (d_out, d_in). ``columns``:
(d_in, d_out), which a CPU multiplies one row with faster in float32. ``split``: columns, in as many parts as torch has
threads; one product of one row uses a single thread, a batch of them all. ``packed``: in oneDNN's own order."""


@dataclass(frozen=True)
class Product:
    """``y = x W + b``, with a matrix by rows or columns.

    Args:
        weight: (d_in, d_out), whatever its strides.
        bias: (d_out,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, d_in) to (N, d_out)."""
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + y``, the sum inside the product."""
        if self.bias is not None:
            residual = residual + self.bias
        return torch.addmm(residual, x, self.weight)


@dataclass(frozen=True)
class SplitProduct(Product):
    """The same as a batch of products; ``weight`` is (parts, d_in, d_out / parts)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, d_in) to (N, d_out)."""
        parts = self.weight.shape[0]
        if self.bias is None:
            y = torch.bmm(x.expand(parts, -1, -1), self.weight)
        else:
            y = torch.baddbmm(self.bias.view(parts, 1, -1), x.expand(parts, -1, -1), self.weight)
        return y.transpose(0, 1).reshape(x.shape[0], -1)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + y``, the sum inside the product."""
        N, parts = x.shape[0], self.weight.shape[0]
        if self.bias is not None:
            residual = residual + self.bias
        residual = residual.view(N, parts, -1).transpose(0, 1)
        return torch.baddbmm(residual, x.expand(parts, -1, -1), self.weight).transpose(0, 1).reshape(N, -1)


@dataclass(frozen=True)
class PackedProduct(Product):
    """The same by oneDNN; ``weight`` is (d_out, d_in) in an order that only it knows.

    Inductor compiles linear maps to these operations; they have no public name.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, d_in) to (N, d_out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return y

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual + y``, the sum inside the product."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y


def make_product(weight: Tensor, bias: Tensor | None, layout: Layout) -> Product:
    """A product with a matrix (d_out, d_in) as ``nn.Linear`` has it; ``rows`` shares its memory."""
    if layout == "split":
        return SplitProduct(torch.stack(weight.t().chunk(torch.get_num_threads(), 1)), bias)
    if layout == "packed":
        return PackedProduct(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1), bias)
    return Product(weight.t().contiguous() if layout == "columns" else weight.t(), bias)


def layouts_for(d_in: int, d_out: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Layout]:
    """The layouts that a matrix can have here.

    Args:
        d_in: of the matrix.
        d_out: of it.
        device: where it is.
        dtype: of it.
        compiled: the product is compiled, by a compiler that knows nothing of packed matrices, and makes slow loops of
            a batch of products.
    """
    layouts: list[Layout] = ["rows", "columns"]
    threads = torch.get_num_threads()
    if device.type != "cpu" or compiled:
        return layouts
    if threads > 1 and d_out % threads == 0:
        layouts.append("split")
    if _packs(d_in, d_out, dtype):
        layouts.append("packed")
    return layouts


def _packs(d_in: int, d_out: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, takes the dtype, and computes what it should."""
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((1, d_in), (d_out, d_in), (1, d_out))
    )
    try:
        y = make_product(weight, residual[0], "packed").added_to(residual, x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    wanted = 2 * residual.double() + x.double() @ weight.double().t()
    return bool((y - wanted).abs().max() < 8 * torch.finfo(dtype).eps * math.sqrt(d_in) * wanted.abs().max())
