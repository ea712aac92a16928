"""Models built with parameters that hold no memory, and a file's values given to them: one copy at any time."""

import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._pytree import tree_leaves

from taperlit.errors import TaperlitError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FILLS = {"bernoulli_", "exponential_", "kaiming_normal_", "kaiming_uniform_", "normal_", "random_", "uniform_"}
_TORCHS_OWN = set(vars(nn.Module()))  # the dictionaries of parameters, buffers, children and hooks


class _Unfilled(TorchFunctionMode):
    """Leaves out random fills of what holds no memory: torch would import its compiler, for seconds, to do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_hollow(build: Callable[[], ModuleT]) -> ModuleT:
    """Build a model whose parameters are on the meta device, while all else is computed as ever.

    Each parameter goes to the meta device as it is registered, before anybody fills it. It stays the same Python
    object, so that ties and other references hold.

    Args:
        build: returns the model. One that was built before is returned as it is.

    Raises:
        TaperlitError: ``build`` needs the values of parameters, or keeps a tensor that shares memory with one, or a
            parameter whose shape is not known yet.
    """
    thread = threading.get_ident()  # the hook is torch's for all threads
    emptied: dict[StorageWeakRef, str] = {}  # what a parameter held, and the parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return
        held = StorageWeakRef(parameter.untyped_storage())
        try:
            _become(parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
        except RuntimeError:
            return  # a view or a weak reference holds the tensor itself: let it live until a file's values replace it
        emptied[held] = f"{type(module).__name__}.{name}"

    hook = register_module_parameter_registration_hook(empty)
    try:
        with _Unfilled():
            model = build()
    except TaperlitError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TaperlitError(
            f"The model cannot be built while its parameters hold no values ({reason}): its constructor may not read "
            "or replace them. Keep what it makes of them in registered buffers; or build the model before, which takes "
            "the memory of two, and pass build=lambda: model."
        ) from error
    finally:
        hook.remove()
    if not isinstance(model, nn.Module):
        raise TaperlitError(f"build() must return a torch.nn.Module, not a {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TaperlitError(f"{name} is a lazy parameter without a shape; run the model once in build().")
        if not parameter.is_meta:
            emptied[StorageWeakRef(parameter.untyped_storage())] = name
    parameters = set(model.parameters())
    for name, tensor in _all_tensors(model):
        if tensor.is_meta or tensor in parameters:
            continue
        if (owner := emptied.get(StorageWeakRef(tensor.untyped_storage()))) is not None:
            raise TaperlitError(
                f"{name} shares its memory with the parameter {owner}, whose values are to come from the file; "
                "read the parameter itself instead."
            )
    return model


def assign(model: nn.Module, values: dict[str, Tensor], source: str) -> None:
    """Make tensors a model's parameters and buffers, in place and without a copy.

    Parameters are tied where ``values`` has one tensor for several names, and nowhere else.

    Args:
        model: of :func:`build_hollow`.
        values: a tensor for each name in its state dict.
        source: what the values come from, for the error's message.

    Raises:
        TaperlitError: a tensor is missing, left over, of another shape or kind of numbers, or a tensor of the model got
            no values.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    for name, there in model.state_dict().items():
        if (value := values.get(name)) is not None and _kind(value) != _kind(there):
            raise TaperlitError(
                f"{source}: {name} is of {_dtype(value)}, and {type(model).__name__} has it of {_dtype(there)}; build "
                "the model that it is of."
            )
    try:
        missing, unexpected = model.load_state_dict(values, strict=False, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip().rstrip(".")
        raise TaperlitError(f"{source} does not fit {type(model).__name__}: {first}.") from error
    kind = type(model).__name__
    if missing:
        raise TaperlitError(f"{source} has no {missing[0]}, which {kind} has; build the model that it is of.")
    if unexpected:
        raise TaperlitError(f"{source} has {unexpected[0]}, which {kind} has not; build the model that it is of.")
    _share(model, before)
    replaced = {*before.values()} - {*model.parameters()}
    for name, tensor in _all_tensors(model):
        if tensor.is_meta or tensor in replaced:
            raise TaperlitError(
                f"{name} of {kind} has no values: they are not in {source}, and its constructor makes them of a "
                "parameter's; make it a registered buffer."
            )


def check_finite(model: nn.Module, source: str, mend: str) -> None:
    """Refuse a model with a parameter that is not finite.

    Args:
        model: with its values.
        source: what they come from, for the error's message.
        mend: what helps then.

    Raises:
        TaperlitError: names the parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and not parameter.is_meta:
            values = parameter.detach()
            values = values if values.itemsize > 1 else values.float()  # torch compares no numbers of 8 bits
            if not all(bound.isfinite() for bound in values.aminmax()):  # NaN is its own bound; no second copy is made
                raise TaperlitError(f"{source}: {name} has values that are not finite; {mend}.")


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "nothing of numbers"
    kinds = {"floating": value.is_floating_point(), "complex": value.is_complex(), "bool": value.dtype is torch.bool}
    return next((name for name, is_it in kinds.items() if is_it), "integer")


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _share(model: nn.Module, before: dict[str, nn.Parameter]) -> None:
    """Make one parameter of those that share their values, and where possible the object that was there before."""
    groups: dict[tuple, list[str]] = {}
    after = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in after.items():
        place = (parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride())
        groups.setdefault(place if parameter.numel() else (name,), []).append(name)
    used: set[nn.Parameter] = set()
    for names in groups.values():
        new = after[names[0]]
        old = next((before[name] for name in names if name in before and before[name] not in used), new)
        used.add(old)
        if old is not new and type(old) is type(new):
            try:
                _become(old, new)
                new = old
            except RuntimeError:
                pass  # a view or a weak reference holds the old tensor itself
        for name in names:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = new


def _become(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Give a parameter another's tensor; object and attributes stay.

    Raises:
        RuntimeError: something else holds the tensor itself.
    """
    other.__dict__.update(parameter.__dict__)
    swap_tensors(parameter, other)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors in plain attributes, by name."""
    yield from chain(model.named_parameters(), model.named_buffers())
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _TORCHS_OWN and not isinstance(value, nn.Module):
                for leaf in tree_leaves(value):
                    if isinstance(leaf, torch.Tensor):
                        yield f"{prefix}.{name}".lstrip("."), leaf
