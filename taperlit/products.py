"""Products of norms' outputs with parameters: which elements of which parameter multiply which features."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Elements:
    """Elements of one storage: a view's geometry or, where a copy was used, their indices.

    Args:
        storage: see :func:`taperlit.float64.storage_of`.
        size: of the view.
        stride: in elements.
        offset: in elements.
        explicit: int64 indices of shape ``size`` instead.
    """

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    explicit: Tensor | None = None

    def index(self) -> Tensor:
        """Their int64 indices in the storage, of shape ``size``."""
        if self.explicit is not None:
            return self.explicit
        index = torch.tensor(self.offset)
        for axis, (size, stride) in enumerate(zip(self.size, self.stride, strict=True)):
            shape = [1] * len(self.size)
            shape[axis] = size
            index = index + (torch.arange(size) * stride).view(shape)
        return index

    @property
    def first(self) -> int:
        """The smallest of their indices."""
        return self.offset if self.explicit is None else int(self.explicit.min())

    def view(self, content: Tensor) -> Tensor | None:
        """Them in a flat storage's content, to read and to write; None where no view shows each of them once."""
        reach = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=False)):
            if size > 1 and stride < reach:
                return None
            reach = max(reach, stride * size)
        return None if self.explicit is not None else content.as_strided(self.size, self.stride, self.offset)

    def same(self, other: "Elements") -> bool:
        """Whether they are the same, in the same order."""
        if (self.storage, self.size) != (other.storage, other.size):
            return False
        if self.explicit is None and other.explicit is None:
            return (self.stride, self.offset) == (other.stride, other.offset)
        return torch.equal(self.index(), other.index())


@dataclass(eq=False)
class Bias:
    """What was added to a product's result.

    Args:
        elements: (n,) of a parameter.
        columns: (n,) which of the product's ``batch * O`` columns each was added to.
    """

    elements: Elements
    columns: Tensor


@dataclass(eq=False)
class Part:
    """What one norm contributes to a product.

    Args:
        norm: its name.
        where: (batch, K) bool: the positions along the summed axis that hold its features.
        features: (batch, K) int64: which of them, at those positions.
    """

    norm: str
    where: Tensor
    features: Tensor

    def same(self, other: "Part") -> bool:
        """Whether both are alike."""
        return (
            self.norm == other.norm
            and torch.equal(self.where, other.where)
            and torch.equal(self.features * self.where, other.features * other.where)
        )


@dataclass(eq=False)
class Product:
    """A product of norms' outputs with a parameter's elements, as it ran.

    Args:
        module: name of the module whose forward ran it.
        weight: (batch, K, O) elements.
        parts: one per norm.
        bias: the parameter that was added to the result, or None.
    """

    module: str
    weight: Elements
    parts: list[Part]
    bias: Bias | None = None

    @property
    def whole(self) -> bool:
        """Whether one norm's features stand at every position."""
        return len(self.parts) == 1 and bool(self.parts[0].where.all())

    def same_weight(self, other: "Product") -> bool:
        """Whether it scales the same elements in the same way."""
        return (
            len(self.parts) == len(other.parts)
            and self.weight.same(other.weight)
            and all(a.same(b) for a, b in zip(self.parts, other.parts, strict=True))
        )


@dataclass(frozen=True, eq=False)
class Read:
    """An operation that read parameters in another way than a norm's linear map does."""

    module: str
    elements: Elements


@dataclass
class Feeds:
    """What one norm's output goes into.

    Args:
        products: with parameters.
        others: what cannot absorb the norm, in words.
        shared: names of matrices and biases that others use too, and whether a copy of its own would mend each.
    """

    products: list[Product] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    shared: dict[str, bool] = field(default_factory=dict)
