"""Run a model in float64 without changing it: the independent truth that folding is checked against."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from taperlit.errors import TaperlitError


def storage_of(tensor: Tensor) -> int:
    """What all views of one storage have in common."""
    return tensor.untyped_storage()._cdata


def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether an operation returns a view of its input and changes nothing."""
    schema = func._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


class Float64(TorchDispatchMode):
    """Every operation computes in float64 (or complex128), whatever the dtypes of parameters, buffers and inputs.

    Numbers are widened where an operation reads them; nothing that exists is changed, and whatever an operation makes
    is wide from then on. A dtype that the model asks for (``x.to(torch.bfloat16)``, autocast) is asked in vain. Only
    what is written into a narrower tensor that was there before is rounded to it.

    Args:
        values: flat float64 contents that stand in for the contents of storages, by :func:`storage_of`; made anew each
            time that they are read, so that not all of a model need be held twice.

    Attributes:
        coarsest: the largest machine epsilon of the dtypes met so far.
    """

    def __init__(self, values: Mapping[int, Callable[[], Tensor]] | None = None) -> None:
        super().__init__()
        self.values = values or {}
        self.coarsest = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation wide."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            raise TaperlitError(f"{func} is no operation that can be followed; let the run use the model's plain path.")
        with self:  # inference mode leaves composite operations whole
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        out = self.run(func, args, kwargs)
        self.observe(func, args, kwargs, out)
        return out

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Called after every operation with what it was given and what it made; for subclasses."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, its numbers widened."""
        if is_view(func):
            return func(*args, **kwargs)
        if not func._schema.is_mutable:
            args, kwargs = tree_map(self._wide, (args, kwargs))
            return tree_map(self._wide, func(*args, **kwargs))
        return self._write(func, args, kwargs)

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        targets = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        dtypes = {given[name].dtype for name in targets if isinstance(given.get(name), Tensor)}
        narrow = next((dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), None)

        def fit(value: Any) -> Any:
            wide = self._wide(value)
            is_number = isinstance(wide, Tensor) and (wide.is_floating_point() or wide.is_complex())
            return wide.to(narrow) if is_number and narrow is not None and wide.dtype != narrow else wide

        new = {name: value if name in targets else tree_map(fit, value) for name, value in given.items()}
        positional = [new[name] for name in names[: len(args)]]
        return func(*positional, **{name: new[name] for name in kwargs})

    def _wide(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            self._met(value)
            return _WIDE.get(value, value)
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        self._met(value.dtype)
        if (stand_in := self.values.get(storage_of(value))) is not None:
            return stand_in().as_strided(value.size(), value.stride(), value.storage_offset())
        return value.to(_WIDE.get(value.dtype, value.dtype))

    def _met(self, dtype: torch.dtype) -> None:
        if dtype.is_floating_point:
            self.coarsest = max(self.coarsest, torch.finfo(dtype).eps)


_WIDE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
