"""How many kernels a call runs: a figure without noise, which holds on every machine."""

import ast
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from taperlit.bench.profiling import profiled
from taperlit.errors import TaperlitError

_ALLOCATES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_"}
# They return their argument's memory; what their schemas say of it has other reasons.
_VIEWS = {"_unsafe_view", "detach", "detach_", "alias", "lift", "lift_fresh", "_reshape_alias", "set_"}
# In code that inductor wrote: what is no kernel.
_NO_CALLS = {
    "assert_size_stride", "assert_alignment", "reinterpret_tensor", "empty_strided", "empty_strided_cpu",
    "empty_strided_cuda", "alloc_from_pool", "as_strided", "_set_device", "set_device", "get_raw_stream", "clear",
    "del", "append", "reversed", "len", "DeviceGuard", "synchronize", "_DeviceGuard", "empty_strided_cpu_pinned",
    "rand_strided", "copy_if_misaligned", "make_graph_cache", "record_function", "_RecordFunctionFast",
}  # fmt: skip


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if is_kernel(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def is_kernel(func: Any) -> bool:
    """Whether an operation computes something: it is no view and does more than to allocate memory."""
    name = func.overloadpacket.__name__
    if name in _ALLOCATES or name in _VIEWS:
        return False
    schema = func._schema
    return schema.is_mutable or not any(result.alias_info is not None for result in schema.returns)


def dispatched(call: Callable[[], object]) -> list[str]:
    """The names of the operations that an eager call dispatches, without views and allocations.

    An operation of torch's that is made of others (``rms_norm`` on a CPU) is those others: gradients are off, but it is
    no inference mode, in which torch dispatches some of them as one.
    """
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        call()
    return counter.names


def compiled(build: Callable[[], object]) -> list[str]:
    """The names of the kernels that compiled code calls, in the code that ``torch.compile`` writes for the CPU.

    Args:
        build: compiles and runs one graph, which torch has not compiled in this process yet.

    Raises:
        TaperlitError: nothing was compiled.
    """
    from torch._inductor.graph import GraphLowering  # the whole compiler

    written: dict[str, None] = {}
    with mock.patch.object(GraphLowering, "save_output_code", lambda code: written.setdefault(code)):
        build()
    if not written:
        raise TaperlitError(
            "torch.compile wrote no code, so that there are no kernels to count; see that it may compile."
        )
    return [name for code in written for name in called_in(code)]


def called_in(code: str) -> Iterator[str]:
    """The kernels that inductor's generated module calls, in order: its own, extern ones and torch's operations."""
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef) and function.name == "call":
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and (name := _dotted(node.func)) and _is_kernel_call(name):
                    yield name


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else node.attr
    return ""


def _is_kernel_call(name: str) -> bool:
    root, _, rest = name.partition(".")
    if root in ("extern_kernels", "aten") or name.startswith("torch.ops."):
        return not name.startswith("torch.ops.inductor.") or "reinterpret" not in name
    return root.startswith(("cpp_", "triton_")) and rest in ("", "run") and root not in _NO_CALLS


def launched(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that one call launches on a GPU, a replayed graph's among them; copies count."""
    call()
    return [event.name for event in profiled(call).events() or () if event.device_type == DeviceType.CUDA]
