"""Find which linear maps each norm feeds."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taperlit.norm import tapered_norms


@dataclass(frozen=True)
class Consumer:
    """A weight matrix that multiplies a norm's output.

    Args:
        weight: the parameter's name.
        bias: the name its bias has or would have.
        transposed: stored as (d_in, d_out), as in GPT-2's Conv1D, and not as ``nn.Linear`` has it.
    """

    weight: str
    bias: str
    transposed: bool


@dataclass
class Feeds:
    """What one norm's output goes into.

    Args:
        consumers: the linear maps.
        others: what cannot absorb the norm: operations that are not linear maps, as torch names them, and matrices
            that other inputs use too.
        shared: names of consumer weights that an embedding shares; a copy of its own makes such a one foldable.
    """

    consumers: list[Consumer]
    others: list[str]
    shared: list[str]


_ALIASES = {"view", "_unsafe_view", "reshape", "transpose", "t", "permute", "unsqueeze", "squeeze", "expand"}
_ALIASES |= {"alias", "detach", "clone", "contiguous", "_to_copy", "slice", "split", "split_with_sizes", "unbind"}
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1)}  # positions of input and matrix


class _Watch(TorchDispatchMode):
    """Follows tensors through aten operations by their storage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        self.norm_of: dict[int, str] = {}  # storage -> the norm whose output it is
        self.copy_of: dict[int, nn.Parameter] = {}  # storage -> the parameter it is a copy of (autocast)
        self.width: dict[str, int] = {}
        self.keep: list[Tensor] = []  # a freed storage's address could come back as another tensor's
        self.products: dict[str, list[tuple[nn.Parameter, bool]]] = {}
        self.others: dict[str, list[str]] = {}
        self.other_uses: set[nn.Parameter] = set()

    def follow(self, name: str, output: Tensor) -> None:
        self.keep.append(output)
        self.width.setdefault(name, output.shape[-1])
        self.norm_of[output.untyped_storage().data_ptr()] = name
        self.products.setdefault(name, [])
        self.others.setdefault(name, [])

    def _source(self, tensor: object) -> str | None:
        return self.norm_of.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None

    def _parameter(self, tensor: object) -> nn.Parameter | None:
        if not isinstance(tensor, Tensor):
            return None
        address = tensor.untyped_storage().data_ptr()
        return self.parameters.get(address, self.copy_of.get(address))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if operation in _ALIASES:
            for part in tree_leaves(out):
                if (name := self._source(args[0])) is not None:
                    self.follow(name, part)
                if (parameter := self._parameter(args[0])) is not None:
                    self.keep.append(part)
                    self.copy_of[part.untyped_storage().data_ptr()] = parameter
            return out
        if operation in _PRODUCTS:
            left, right = (args[position] for position in _PRODUCTS[operation])
            name, parameter = self._source(left), self._parameter(right)
            # A product of part of the output, or with part of a matrix, cannot be folded into the whole matrix.
            whole = name is not None and left.shape[-1] == self.width[name]
            if whole and parameter is not None and right.numel() == parameter.numel():
                self.products[name].append((parameter, right.stride()[-2:] == parameter.stride()))
                tensors = [t for t in tensors if t is not left and t is not right]
        for tensor in tensors:
            if (name := self._source(tensor)) is not None:
                self.others[name].append(operation)
            if (parameter := self._parameter(tensor)) is not None:
                self.other_uses.add(parameter)
        return out


@torch.enable_grad()  # with gradients off, torch's encoder layers take a fused path that hides their projections
def find_consumers(model: nn.Module, run: Callable[[], object]) -> dict[str, Feeds]:
    """Find what every TaperNorm of a model feeds, by watching one forward pass.

    Args:
        model: in any state; it is put into eval mode for the pass.
        run: runs the model once, on real or made input.

    Returns:
        A :class:`Feeds` a norm, by name; a norm that did not run has an empty one.
    """
    norms = tapered_norms(model)
    watch = _Watch(model)
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for name, norm in norms.items():
            hook = norm.register_forward_hook(lambda _, __, out, name=name: watch.follow(name, out))
            stack.callback(hook.remove)
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in training.items()])
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        stack.enter_context(watch)
        run()
    return {name: _feeds(model, watch, name) for name in norms}


def _feeds(model: nn.Module, watch: _Watch, name: str) -> Feeds:
    consumers: dict[str, Consumer] = {}
    others, shared = list(watch.others.get(name, [])), []
    for parameter, transposed in watch.products.get(name, []):
        names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
        # Of a tied matrix's names, the embedding's is not the one that multiplies.
        multiplies = [n for n in names if not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding)]
        elsewhere = any(parameter is p for other, ps in watch.products.items() if other != name for p, _ in ps)
        if elsewhere or parameter in watch.other_uses:
            if len(names) == 1 or len(multiplies) != 1:
                others.append(f"{names[0]}, which other inputs use too")
                continue
            shared.append(multiplies[0])
        consumers[multiplies[0]] = Consumer(multiplies[0], _bias_name(multiplies[0]), transposed)
    return Feeds(list(consumers.values()), others, shared)


def _bias_name(weight: str) -> str:
    module, _, leaf = weight.rpartition(".")
    return f"{module}.{leaf.replace('weight', 'bias')}" if module else leaf.replace("weight", "bias")
