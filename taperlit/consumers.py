"""Find which linear maps each norm feeds, by labelling the numbers of a forward pass.

Each feature of a norm's output gets a label, and so does each element of a parameter. Views share their storage's
labels and copies copy them; so, at a matrix product, labels tell exactly which elements of which parameter multiply
which feature of which norm, however either was sliced, transposed, packed or copied on its way. Whatever else reads a
norm's output is written down by name. So is whatever else reads a parameter: a matrix that other inputs use too cannot
absorb a norm.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from taperlit.float64 import Copies, Float64, WideInputs, is_view, storage_of
from taperlit.norm import plain_name, tapered_norms
from taperlit.products import Bias, Elements, Part, Product, Read

_SHIFT = 40  # a label is a source's number, shifted, plus the index within the source; 0 is no label
_INDEX = (1 << _SHIFT) - 1

# Positions of what is added, and of the two factors.
_PRODUCTS = {
    "mm": (None, 0, 1), "addmm": (0, 1, 2), "bmm": (None, 0, 1), "baddbmm": (0, 1, 2), "mv": (None, 0, 1),
    "addmv": (0, 1, 2), "dot": (None, 0, 1),
}  # fmt: skip
# They put all numbers elsewhere and change none; what they fill in is no norm's.
_MOVES = {
    "clone", "_to_copy", "_unsafe_view", "cat", "stack", "repeat", "roll", "flip", "constant_pad_nd", "lift_fresh_copy",
}  # fmt: skip
# They pick numbers by other tensors, whose content may be another in the next run.
_CHOICES = {"where", "index", "index_select", "gather", "take"}
# They look at a tensor's shape and dtype, not at its numbers.
_NO_READ = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_empty_strided", "is_same_size",
}  # fmt: skip


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in a model's output: a tensor, tuples, lists, mappings and data classes of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name))


@dataclass(frozen=True)
class Chosen:
    """A stack of matrices that one was picked from.

    Args:
        storage: of the parameter.
        offset: of the stack in it.
        size: elements per matrix.
    """

    storage: int
    offset: int
    size: int


def _picked_axes(operation: str, args: tuple[Any, ...]) -> list[int]:
    """The axes along which an operation picks by another tensor."""
    source: Tensor = args[0]
    if operation == "take":
        return list(range(source.dim()))
    if operation in ("index_select", "gather"):
        return [args[1] % source.dim()]
    axes, axis = [], 0
    for index in args[1]:
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            axes += list(range(axis, axis + width))
        axis += width
    return axes


class Watch(Float64):
    """Follows norm outputs and parameters through the operations of one or more runs, see the head of this file.

    Args:
        model: tapered, in eval mode.
        lean: see :class:`taperlit.float64.Copies`.

    Attributes:
        products: in the order they ran.
        reads: of parameters, other than those products.
        others: per norm, what else read its output, in words.
    """

    def __init__(self, model: nn.Module, lean: bool = False) -> None:
        super().__init__()
        self.model, self.lean = model, lean
        self.norms = tapered_norms(model)
        self.ran: set[str] = set()
        self.module_names: dict[nn.Module, str] = {module: plain_name(name) for name, module in model.named_modules()}
        self.parameters: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.numel():
                self.parameters.setdefault(storage_of(parameter), []).append((plain_name(name), parameter))
        self.products: list[Product] = []
        self.reads: list[Read] = []
        self.others: dict[str, list[str]] = {name: [] for name in self.norms}
        self._sources: list[object] = [None]  # by number: a norm's name, a parameter's storage, a Product, a Chosen
        self._parameter_numbers = {key: self._new_source(key) for key in self.parameters}
        self._original: Mapping[int, int] = {}  # the storages that hold the parameters while a run is watched
        self._norm_numbers = {name: self._new_source(name) for name in self.norms}
        self._labels: dict[int, Tensor] = {}  # storage -> one label per element, of what is no parameter's own storage
        self._keep: dict[int, object] = {}  # a freed storage's key could come back as another tensor's
        self._stack: list[nn.Module] = []

    def has_bias(self, product: Product) -> bool:
        """Whether one of its norms adds a bias, which the product's result then needs."""
        return any(self.norms[part.norm].taper_bias is not None for part in product.parts)

    def size_of(self, storage: int) -> int:
        """Elements in a parameter's storage."""
        _, parameter = self.parameters[storage][0]
        return parameter.untyped_storage().nbytes() // parameter.element_size()

    def name_of(self, elements: Elements, module: str) -> str:
        """The name of the parameter that elements are of: the one that a module holds, if it has several."""
        names = [name for name, _ in self.parameters[elements.storage]]
        first = elements.first
        there = [
            name
            for name, p in self.parameters[elements.storage]
            if p.storage_offset() <= first < p.storage_offset() + p.numel()
        ]
        return next((name for name in there if name.rpartition(".")[0] == module), (there or names)[0])

    def _new_source(self, source: object) -> int:
        self._sources.append(source)
        return len(self._sources) - 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside, wide and on copies of the model's tensors."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.met(tensor.dtype)
        with ExitStack() as stack:
            self._original = stack.enter_context(Copies(self.model, wide=True, lean=self.lean)).original
            for name, norm in self.norms.items():
                hook = norm.register_forward_hook(lambda _, __, out, name=name: self._follow(name, out))
                stack.callback(hook.remove)
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(WideInputs(self.met))
            stack.enter_context(self)
            stack.callback(self._forget)
            yield

    def _forget(self) -> None:
        """A run is over, and its storages may be others' soon."""
        self._original, self._labels, self._keep = {}, {}, {}

    def _enter(self, module: nn.Module, args: object) -> None:
        self._stack.append(module)
        for device in ("cpu", "cuda"):  # of what autocast asks for, no operation here gets to know
            if torch.is_autocast_enabled(device):
                self.met(torch.get_autocast_dtype(device))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._stack.pop()

    def returned(self, run: Callable[[], object]) -> object:
        """Run, inside :meth:`watching`: a norm's output among what is returned is read by whoever ran the model."""
        result = run()
        for tensor in tensors_of(result):
            for name in self._norms_in(self._labels_of(tensor)):
                self.others[name].append("the model's output")
        return result

    def _follow(self, name: str, output: Tensor) -> None:
        self.ran.add(name)
        if not storage_of(output):
            self.others[name].append("a tensor without a storage")
            return
        shape = self.norms[name].kind.shape
        features = torch.arange(torch.Size(shape).numel(), device=output.device).view(shape)
        with torch.inference_mode(False):
            self._set_labels(output, ((self._norm_numbers[name] << _SHIFT) + features).expand(output.shape))

    # Labels

    def _number(self, tensor: Tensor) -> int | None:
        """The number of the parameter whose storage a tensor shows, or None."""
        original = self._original.get(storage_of(tensor))
        return None if original is None else self._parameter_numbers.get(original)

    def _labels_of(self, tensor: Tensor) -> Tensor | None:
        """int64 labels of a tensor's shape, or None where it has none."""
        if (number := self._number(tensor)) is not None:
            return (number << _SHIFT) + self._view(tensor).index().to(tensor.device)
        if (flat := self._labels.get(storage_of(tensor))) is None:
            return None
        return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _set_labels(self, tensor: Tensor, labels: Tensor) -> None:
        key = storage_of(tensor)
        if key not in self._labels:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._labels[key] = torch.zeros(size, dtype=torch.int64, device=tensor.device)
            self._keep[key] = tensor.untyped_storage()
        view = self._labels[key].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        view.copy_(labels)

    def _is_labelled(self, tensor: Tensor) -> bool:
        return self._number(tensor) is not None or storage_of(tensor) in self._labels

    def _sources_in(self, labels: Tensor | None) -> list[object]:
        if labels is None or not labels.numel():
            return []
        return [self._sources[number] for number in self._numbers_in(labels)]

    def _numbers_in(self, labels: Tensor) -> list[int]:
        """The sources' numbers behind labels, ascending."""
        numbers = labels >> _SHIFT
        low, high = numbers.aminmax()
        if low == high:  # nearly always, and a pass over them where unique() would sort
            return [int(low)]
        found = torch.zeros(len(self._sources), dtype=torch.bool, device=labels.device)
        found[numbers.flatten()] = True
        return found.nonzero().flatten().tolist()

    def _norms_in(self, labels: Tensor | None) -> list[str]:
        return [source for source in self._sources_in(labels) if isinstance(source, str)]

    def _elements(self, labels: Tensor) -> Elements | None:
        """The parameter's elements behind labels, if they are all of one parameter's storage."""
        sources = self._sources_in(labels)
        if len(sources) != 1 or not isinstance(sources[0], int):
            return None
        return Elements(sources[0], tuple(labels.shape), (), 0, (labels & _INDEX).cpu())

    def _chosen(self, labels: Tensor) -> Elements | None:
        """The elements behind labels (batch, K, O) if each matrix is one of a stack, whichever it is."""
        sources = self._sources_in(labels)
        if len(sources) != 1 or not isinstance(chosen := sources[0], Chosen):
            return None
        index = labels & _INDEX
        matrix = (index - chosen.offset) // chosen.size
        if not bool((matrix == matrix[:, :1, :1]).all()):
            return None
        return Elements(chosen.storage, tuple(labels.shape), (), 0, index.cpu())

    def _view(self, tensor: Tensor) -> Elements:
        """The elements of a parameter's storage that a view of it shows."""
        storage = self._original[storage_of(tensor)]
        return Elements(storage, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def _module(self) -> str:
        return self.module_names.get(self._stack[-1], "") if self._stack else ""

    # Operations

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Move labels where the operation moved numbers, and write down who read what."""
        operation = func.overloadpacket.__name__
        try:
            self._observe(operation, func, args, kwargs, out)
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
            for name in self.ran:  # an operation on tensors of a kind that has no labels
                self.others[name].append(f"{operation}, which cannot be followed")

    def _observe(self, operation: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        retyped = is_view(func) and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        if operation in _NO_READ or (is_view(func) and not retyped):
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
        if not any(self._is_labelled(tensor) for tensor in tensors):
            return
        if operation in _PRODUCTS:
            self._product(operation, args, kwargs, out)
        elif operation == "mul" and isinstance(args[1], int | float) and args[1] == 1:  # vmap's bias
            self._set_labels(out, cast(Tensor, self._labels_of(args[0])))
        elif operation in _MOVES and not (operation == "constant_pad_nd" and self._pads_beside_a_bias(args)):
            self._move(func, args, kwargs, out)
        elif operation in _CHOICES and self._choose(func, args, out):
            pass
        elif operation == "copy_":
            self._overwrite(args[0], args[1])
        elif operation in ("fill_", "zero_"):
            self._overwrite(args[0], None)
        elif operation not in ("add", "add_") or not self._add(args, kwargs, out):
            for tensor in tensors:
                self._read(tensor, operation)
        if func._schema.is_mutable and operation != "copy_":
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    self._overwrite(value, None, reads=False)

    def _read(self, tensor: object, operation: str) -> None:
        """The operation uses the tensor's numbers, and not as a norm's linear map does."""
        if not isinstance(tensor, Tensor):
            return
        if self._number(tensor) is not None:
            self.reads.append(Read(self._module(), self._view(tensor)))
            return
        if (labels := self._labels_of(tensor)) is None:
            return
        for number in self._numbers_in(labels):
            source = self._sources[number]
            if isinstance(source, str):
                self.others[source].append(operation)
            elif isinstance(source, int | Chosen):
                storage = source if isinstance(source, int) else source.storage
                mine = labels[labels >> _SHIFT == number] & _INDEX
                self.reads.append(Read(self._module(), Elements(storage, (len(mine),), (), 0, mine.cpu())))

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        def labels(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not (value.is_floating_point() or value.is_complex()):
                return value  # an index or a mask
            found = self._labels_of(value)
            return torch.zeros(value.shape, dtype=torch.int64, device=value.device) if found is None else found

        operation = func.overloadpacket.__name__
        if operation in ("clone", "_to_copy", "lift_fresh_copy"):
            moved = labels(args[0]).to(out.device)
        elif operation == "constant_pad_nd":
            moved = func(labels(args[0]), args[1])
        else:
            moved = func(*tree_map(labels, args), **tree_map(labels, kwargs))
        if out.numel():
            self._set_labels(out, moved)

    def _choose(self, func: Any, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether an operation that picks numbers picks the same labels whichever it picks, and then move them.

        Tokens may be picked by what the input says, but not features; nor elements of a parameter, but for whole
        matrices out of a stack of them (experts).
        """
        operation = func.overloadpacket.__name__
        if operation == "where":
            pair = [self._labels_of(value) if isinstance(value, Tensor) else None for value in args[1:3]]
            if len(pair) < 2 or pair[0] is None or pair[1] is None:
                return False
            a, b = pair[0].expand(out.shape), pair[1].expand(out.shape)
            if not torch.equal(a, b):
                return False
            self._set_labels(out, a)
            return True
        source: Tensor = args[0]
        if (labels := self._labels_of(source)) is None:
            return True
        axes = _picked_axes(operation, args)
        if not all(bool((labels == labels.narrow(axis, 0, 1)).all()) for axis in axes):
            if self._number(source) is None or axes != [0] or source.dim() < 3 or not source.is_contiguous():
                return False
            chosen = Chosen(self._view(source).storage, int(source.storage_offset()), source[0].numel())
            labels = (self._number_of(chosen) << _SHIFT) + (labels & _INDEX)
        self._set_labels(out, func(labels, *args[1:]))
        return True

    def _pads_beside_a_bias(self, args: tuple[Any, ...]) -> bool:
        """Whether padding stands beside what a bias is added to, or is not 0: a fold would add the bias there too."""
        names = self._norms_in(self._labels_of(args[0]))
        return bool(names) and (args[2:3] not in ((), (0,)) or any(self.norms[n].taper_bias is not None for n in names))

    def _number_of(self, source: object) -> int:
        return self._sources.index(source) if source in self._sources else self._new_source(source)

    def _overwrite(self, target: Tensor, source: Tensor | None, reads: bool = True) -> None:
        """Something was written over a tensor: a copy of the source, or numbers without labels."""
        if self._number(target) is not None:
            if reads:
                self._read(target, "a write over it")
            return
        found = None if source is None else self._labels_of(source)
        if found is not None or self._is_labelled(target):
            self._set_labels(target, torch.zeros((), dtype=torch.int64) if found is None else found.to(target.device))

    def _product(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        added, left, right = _PRODUCTS[operation]
        a, b, result = _as_3d(operation, args[left], args[right], out)
        if not result.numel():
            return
        holders = [self._number(x) is None and bool(self._norms_in(self._labels_of(x))) for x in (a, b)]
        if holders == [True, False]:
            given, matrix = a, b
        elif holders == [False, True]:  # W h and not h W
            given, matrix, result = b.mT, a.mT, result.mT
        else:
            for position in _PRODUCTS[operation]:
                self._read(None if position is None else args[position], operation)
            return
        labels = cast(Tensor, self._labels_of(given))  # (batch, rows, K)
        product, why = self._fold_into(labels, matrix)
        if product is None:
            for name in self._norms_in(labels):
                self.others[name].append(f"{operation}, {why}")
            self._read(matrix, operation)
            self._read(None if added is None else args[added], operation)
            return
        self.products.append(product)
        if added is not None:
            plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1
            product.bias = self._bias(args[added], out, result, holders[1]) if plain else None
            if product.bias is None:
                self._read(args[added], operation)
        if product.bias is None and self.has_bias(product):
            columns = torch.arange(result.shape[0] * result.shape[2], device=out.device)
            number = self._new_source(product)
            named = (number << _SHIFT) + columns.view(result.shape[0], 1, result.shape[2]).expand(result.shape)
            self._set_labels(out, (named.mT if holders[1] else named).reshape(out.shape))

    def _fold_into(self, labels: Tensor, matrix: Tensor) -> tuple[Product | None, str]:
        """The product of labelled (batch, rows, K) with a matrix (batch, K, O), or why it is no norm's linear map."""
        if not bool((labels == labels[:, :1]).all()):
            return None, "where the features do not stay in place from row to row"
        row = labels[:, 0].cpu()  # (batch, K)
        numbers = row >> _SHIFT
        parts = []
        for name in self._norms_in(labels):
            norm, where = self.norms[name], numbers == self._norm_numbers[name]
            features = row & _INDEX
            if norm.centred:
                every = torch.arange(torch.Size(norm.kind.shape).numel())
                for mask, found in zip(where, features, strict=True):
                    if not torch.equal(found[mask].sort().values, every):
                        return None, "of some of its features, while its mean is over all"
            parts.append(Part(name, where, features))
        if self._number(matrix) is not None:
            weight: Elements | None = self._view(matrix)
        else:
            found = self._labels_of(matrix)
            weight = None if found is None else self._elements(found) or self._chosen(found)
        if weight is None:
            return None, "with a matrix that is no parameter"
        others = torch.stack([part.where for part in parts]).logical_not().all(0)
        if bool(others.any()):
            mine = weight.index()[others]
            self.reads.append(Read(self._module(), Elements(weight.storage, tuple(mine.shape), (), 0, mine)))
        return Product(self._module(), weight, parts), ""

    def _bias(self, bias: Tensor, out: Tensor, result: Tensor, transposed: bool) -> Bias | None:
        """The elements of a parameter that were added to a product's result as it was made, if they were."""
        labels = self._labels_of(bias)
        if labels is None:
            return None
        labels = labels.expand(out.shape)
        rows = (labels.mT if transposed and labels.dim() > 1 else labels).reshape(result.shape)
        if bias.dim() == 1 and not transposed:
            rows = rows[:, :1]  # the same for every row
        columns = torch.arange(result.shape[0] * result.shape[2], device=rows.device)
        columns = columns.view(result.shape[0], 1, result.shape[2]).expand(rows.shape)
        return self._pair(columns, rows, len(columns) * columns.shape[2])

    def _pair(self, columns: Tensor, labels: Tensor, count: int) -> Bias | None:
        """What was added to which of a product's columns, if a parameter's elements were added to each."""
        pairs = torch.stack((columns.flatten(), labels.flatten())).unique(dim=1)
        elements = self._elements(pairs[1])
        if elements is None or len(pairs[0].unique()) != count:
            return None
        return Bias(elements, pairs[0].cpu())

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Whether it adds a parameter to a product's result, as its bias."""
        if kwargs.get("alpha", 1) != 1 or not all(isinstance(value, Tensor) for value in args[:2]):
            return False
        for result, bias in (args[:2], args[1::-1]):
            labels, found = self._labels_of(result), self._labels_of(bias)
            sources = self._sources_in(labels)
            if len(sources) != 1 or not isinstance(product := sources[0], Product) or found is None:
                continue
            if product.bias is None and result.shape == out.shape:
                batch, _, width = product.weight.size
                columns = cast(Tensor, labels) & _INDEX
                product.bias = self._pair(columns, found.expand(out.shape), batch * width)
                if product.bias is not None:
                    return True
        return False


def _as_3d(operation: str, a: Tensor, b: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors and the result as (batch, rows, K), (batch, K, columns), (batch, rows, columns)."""
    if operation in ("bmm", "baddbmm"):
        return a, b, out
    if operation == "dot":
        return a[None, None], b[None, :, None], out[None, None, None]
    if operation in ("mv", "addmv"):
        return a[None], b[None, :, None], out[None, :, None]
    return a[None], b[None], out[None]


def run_quietly(
    model: nn.Module, run: Callable[[], object], *contexts: AbstractContextManager[object], fused: bool = False
) -> object:
    """Run a model in eval mode and uncompiled, and put back its modes and torch's random generators.

    Args:
        model: that the run runs.
        run: returns the model's output.
        *contexts: entered around the run.
        fused: let torch's encoder layers and attention take their fused paths, which hide what feeds what.
    """
    modes = {module: module.training for module in model.modules()}
    enabled = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.callback(_set_modes, modes)
        stack.callback(torch.backends.mha.set_fastpath_enabled, enabled)
        torch.backends.mha.set_fastpath_enabled(enabled and fused)
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        for context in contexts:
            stack.enter_context(context)
        return run()


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training
