"""Run a model in float64 without changing it: the independent truth that folding is checked against."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from taperlit.errors import TaperlitError
from taperlit.norm import Gate

_WIDE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


def storage_of(tensor: Tensor) -> int:
    """What all views of one storage have in common; 0 where a tensor has none (sparse ones, functorch's wrappers)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def flat(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, as one dimension."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def is_view(func: Any) -> bool:
    """Whether an operation returns a view of its input and changes nothing."""
    schema = func._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


class Copies(AbstractContextManager["Copies"]):
    """While it is entered, a model's parameters and buffers hold copies, so that nothing a run writes there stays.

    The tensors themselves stay the same objects, and what shared a storage shares one.

    Args:
        model: any.
        wide: make the copies float64 (complex128).
        contents: what copies hold instead, flat, by :func:`storage_of` the tensors before.
        lean: torch's linear maps get the copies of their parameters when they are called and lose them when they
            return, so that one of them is in memory twice, and not the model. Embeddings get none: looking numbers up
            is exact. What else reads such parameters reads the tensors themselves.

    Attributes:
        original: the storage before, by the storage of its copy.
    """

    def __init__(
        self,
        model: nn.Module,
        wide: bool,
        contents: Mapping[int, Callable[[], Tensor]] | None = None,
        lean: bool = False,
    ) -> None:
        self.model, self.wide, self.contents, self.lean = model, wide, contents or {}, lean
        self.original: dict[int, int] = {}
        self._before: list[tuple[Tensor, Tensor]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> "Copies":
        try:
            self._copy()
        except BaseException:  # memory may run out half-way
            self._restore()
            raise
        return self

    def _copy(self) -> None:
        gates = {module.value for module in self.model.modules() if isinstance(module, Gate)}  # they stay float32
        copies: dict[int, Tensor] = {}
        later: set[Tensor] = set()
        if self.lean:
            for module in self.model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    later |= {p for p in module.parameters(recurse=False) if storage_of(p) and p.numel()}
                if isinstance(module, nn.Linear):
                    for hook in (
                        module.register_forward_pre_hook(self._lend, prepend=True),
                        module.register_forward_hook(self._take_back, always_call=True),
                    ):
                        self._hooks.callback(hook.remove)
            self.original |= {storage_of(tensor): storage_of(tensor) for tensor in later}
        for tensor in {*self.model.parameters(), *self.model.buffers()} - later:
            key = storage_of(tensor)
            if not key or not tensor.numel():
                continue
            self._before.append((tensor, tensor.data))
            if key not in copies:
                dtype = _WIDE.get(tensor.dtype, tensor.dtype) if self.wide and tensor not in gates else tensor.dtype
                copies[key] = self._copy_of(tensor, dtype)
            tensor.data = copies[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            self.original[storage_of(tensor)] = key

    def _copy_of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if (content := self.contents.get(storage_of(tensor))) is not None:
            return content().to(tensor.device, dtype)  # nobody else has it
        return flat(tensor).to(dtype, copy=True)

    def _lend(self, module: nn.Module, args: object) -> None:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # no mode is to see this
            for parameter in module.parameters(recurse=False):
                key = storage_of(parameter)
                if self.original.get(key) == key:
                    self._before.append((parameter, parameter.data))
                    dtype = _WIDE.get(parameter.dtype, parameter.dtype) if self.wide else parameter.dtype
                    copy = self._copy_of(parameter, dtype)
                    parameter.data = copy.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
                    self.original[storage_of(copy)] = key

    def _take_back(self, module: nn.Module, args: object, output: object) -> None:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            own = set(module.parameters(recurse=False))
            for tensor, data in self._before:
                if tensor in own:
                    self.original.pop(storage_of(tensor), None)  # it is freed, and may come back as another's
                    tensor.data = data
            self._before = [(tensor, data) for tensor, data in self._before if tensor not in own]

    def _restore(self) -> None:
        self._hooks.close()
        for tensor, data in self._before:
            tensor.data = data
        self._before.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()


class WideInputs(TorchFunctionMode):
    """Widens what functions are given before they look at its dtype; what they write into stays as it is.

    Many of torch's functions compare the dtypes of their arguments before any operation runs.

    Args:
        met: told every dtype that the model asks for.
    """

    def __init__(self, met: Callable[[torch.dtype], None] = lambda dtype: None) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call one function wide."""
        kwargs = kwargs or {}
        if any(isinstance(value, Tensor) and value.is_nested for value in args):
            raise NotImplementedError("a nested tensor")  # torch itself does not survive modes around these
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.met(value)
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name.startswith("__set")
        writes = writes or kwargs.get("out") is not None or bool(kwargs.get("inplace"))
        # An embedding copies rows, which may as well be widened; an address is asked of the tensor itself.
        if not writes and name not in ("embedding", "data_ptr"):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)


class Float64(TorchDispatchMode):
    """Every operation computes in float64 (or complex128), whatever the dtypes of its inputs.

    Numbers are widened where an operation reads them, and whatever an operation makes is wide from then on. A dtype
    that the model asks for (``x.to(torch.bfloat16)``, autocast) is asked in vain. Only what is written into a narrower
    tensor that was there before is rounded to it.

    Attributes:
        coarsest: the largest machine epsilon of the dtypes met so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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

    def met(self, dtype: torch.dtype) -> None:
        """Take note of a dtype that the model computes in."""
        if dtype.is_floating_point:
            self.coarsest = max(self.coarsest, torch.finfo(dtype).eps)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation, its numbers widened."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.met(value)
        if is_view(func):
            return func(*args, **kwargs)
        if not func._schema.is_mutable:
            if _fills(func, args) and kwargs.get("dtype") is None:  # the model's finfo.min may be float64's now
                kwargs = {**kwargs, "dtype": torch.float64}
            if func is not torch.ops.aten.embedding.default:  # of all that it is given it only copies some
                args, kwargs = tree_map(_widen, (args, kwargs))
            return tree_map(_widen, func(*args, **kwargs))
        return _write(func, args, kwargs)


def _fills(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation makes a tensor of a number, whose dtype is the default's."""
    full, scalar = torch.ops.aten.full.default, torch.ops.aten.scalar_tensor.default
    return func in (full, scalar) and isinstance(args[1 if func is full else 0], float)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    return value


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that writes into one of its arguments, whose dtype the others take."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    targets = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    dtypes = {given[name].dtype for name in targets if isinstance(given.get(name), Tensor)}
    target = next((dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), None)

    def fit(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return value.to(target) if is_number and target is not None and value.dtype != target else value

    new = {name: value if name in targets else tree_map(fit, value) for name, value in given.items()}
    return func(*(new[name] for name in names[: len(args)]), **{name: new[name] for name in kwargs})
