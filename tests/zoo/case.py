"""What a case of the zoo is, and the words its modules are built from.

A module of the zoo is a class whose constructor takes the norm's class (``nn.RMSNorm`` or ``nn.LayerNorm``). The
decorator :func:`zoo` says what it is and what ``fold`` owes it for each of the two kinds:

- ``FOLDS``: the model computes the same without its norms.
- ``REFUSED``: no fold is right; one line names the norm and the reason, and the model is untouched.
- ``EITHER``: a right fold and a refusal are both good. Nothing is ever allowed to crash or to differ silently.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

FOLDS, REFUSED, EITHER = "folds", "refused", "either"
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "own": None}  # own: the model brings norms of its own class
D = 8  # width of nearly every module

# A module that runs in float64 when asked to must not be refused because folding could not be checked there.
NOT_FOR_WANT_OF_FLOAT64 = r"^(?!The run works, but not in float64)"

Sizes = dict[str, int]
SIZES: list[Sizes] = [{"B": 2, "T": 5}, {"B": 2, "T": 5}, {"B": 3, "T": 7}, {"B": 1, "T": 6}]  # given run, three fresh


@dataclass(frozen=True)
class Input:
    """One input of a model: a shape whose letters B and T change from batch to batch, and how it is filled."""

    shape: tuple[int | str, ...]
    fill: Callable[[tuple[int, ...], torch.Generator], Tensor]

    def make(self, sizes: Sizes, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """A tensor; floats are of the model's ``dtype``."""
        tensor = self.fill(tuple(sizes.get(n, n) for n in self.shape), generator)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def floats(*shape: int | str) -> Input:
    """Standard normal values that do not average to zero."""
    return Input(shape, lambda s, g: torch.randn(s, generator=g, dtype=torch.float64) + 0.2)


def tokens(*shape: int | str) -> Input:
    """Ids below 12."""
    return Input(shape, lambda s, g: torch.randint(12, s, generator=g))


def flags(*shape: int | str) -> Input:
    """Booleans, True for about one in three, and never for the first of the last axis."""

    def fill(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        mask = torch.rand(shape, generator=generator) < 0.35
        mask[..., 0], mask[..., -1] = False, True
        return mask

    return Input(shape, fill)


def call(model: nn.Module, *inputs: Tensor) -> object:
    """Call the model as everybody does."""
    return model(*inputs)


@dataclass(frozen=True)
class Case:
    """A module of the zoo.

    Args:
        name: of the module.
        about: what it is, for the table.
        build: makes it from the norm's class.
        verdicts: what fold owes it, by the norm's kind.
        why: a regular expression that the line of a refusal must match.
        blames: one that the norm's name must match; by default any tapered norm's name will do.
        whole: only comparing the outputs finds it, so that the line may name the model or the run instead of a norm.
        inputs: what the model takes.
        names: patterns of the norms that are tapered.
        run: what ``fold`` is given to run; gets the model and the inputs.
        call: how outputs are made to compare, if not as ``run`` makes them.
        prepare: changes the model after it is tapered (hooks, compilation); returns the model to fold.
        read: takes the tensors out of an output that is neither a tensor, a tuple, a list nor a dict.
        sizes: of the given run and of the fresh ones.
        more: how many of the fresh batches ``fold`` runs too.
        train: leave the model in training mode.
        dtypes: the model's.
        raises: exceptions of the run's own that may come out instead of a refusal.
        tolerance: largest relative difference in float32.
        options: further arguments of ``fold``.
    """

    name: str
    about: str
    build: Callable[[type[nn.Module]], nn.Module]
    verdicts: dict[str, str]
    theme: str
    why: str = NOT_FOR_WANT_OF_FLOAT64
    blames: str = ""
    whole: bool = False
    inputs: tuple[Input, ...] = (floats("B", "T", D),)
    names: tuple[str, ...] = ("*",)
    run: Callable[..., object] = call
    call: Callable[..., object] = call
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    read: Callable[[object], object] = lambda output: output
    sizes: list[Sizes] = field(default_factory=lambda: SIZES)
    more: int = 0
    train: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    raises: tuple[type[Exception], ...] = ()
    tolerance: float = 1e-4
    options: dict[str, object] = field(default_factory=dict)

    def trials(self) -> list[tuple[str, torch.dtype]]:
        """Kinds of norm and dtypes to judge: what folds in all, what is not sure to fold in a second dtype once."""
        first = next(iter(self.verdicts))
        return [
            (kind, dtype)
            for kind, verdict in self.verdicts.items()
            for dtype in self.dtypes
            if verdict == FOLDS or kind == first or dtype == self.dtypes[0]
        ]

    def batches(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """The inputs of the given run and of three fresh ones."""
        generator = torch.Generator().manual_seed(1)
        return [tuple(i.make(sizes, generator, dtype) for i in self.inputs) for sizes in self.sizes]


CASES: dict[str, Case] = {}


def add(name: str, about: str, build: Callable, rms: str | None = None, layer: str | None = None, **words) -> None:
    """Put a case into the zoo; ``layer`` is the verdict for LayerNorm if it is not that for RMSNorm.

    A model that brings norms of its own class has only the verdict ``own=``.
    """
    if name in CASES:
        raise ValueError(f"Two modules of the zoo are called {name}.")
    own = words.pop("own", None)
    verdicts = {"own": own} if own else {"rms": rms, "layer": layer or rms}
    verdicts = {kind: verdict for kind, verdict in verdicts.items() if verdict}
    theme = words.pop("theme", build.__module__.rpartition(".")[2])
    CASES[name] = Case(name, about, build, verdicts, theme, **words)


def zoo(about: str, rms: str | None, layer: str | None = None, **words) -> Callable[[type], type]:
    """Put a class into the zoo under its own name."""

    def put(cls: type) -> type:
        add(cls.__name__, about, cls, rms, layer, **words)
        return cls

    return put


class Normed(nn.Module):
    """Has one norm, ``norm``, of width ``D``."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm = norm(D)


def matrix(*shape: int) -> nn.Parameter:
    """A random parameter of a size that keeps values near one."""
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


# What the lines of refusals say.
BIAS = "bias"
SHARED = "other inputs use too"
