"""Fold norms whose gate is 0 into the linear maps they feed (arXiv:2602.10408, section 3), and prove it.

``c h P D W = h W'`` with ``W' = c P D W``, and the bias ``beta~ W + b``; ``P`` centres in the LayerNorm kind and is the
identity in the RMSNorm kind. Computed in float64, checked in float64, stored in the weights' own dtype.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from taperlit.absorb import Absorbed
from taperlit.baselines.pointwise import Pointwise
from taperlit.compare import Changed, Run, check_same, in_a_line, outputs_of, own_outputs, require_numbers, wide_outputs
from taperlit.conflicts import check_foldable, check_touched, resolve
from taperlit.consumers import Watch
from taperlit.errors import TaperlitError
from taperlit.float64 import storage_of
from taperlit.norm import Phase, TaperNorm, plain_name, shared_gate
from taperlit.products import Feeds, Product
from taperlit.structure import Structure, add_bias, identity_for, replace, submodule, untie
from taperlit.surgery import require_tapered
from taperlit.transformer import Transformer

TOLERANCE = 1e-9  # largest relative difference of float64 outputs that is still rounding


@torch.no_grad()
def fold(
    model: nn.Module,
    run: Run,
    *more_runs: Run,
    tied: Literal["untie", "scale"] = "untie",
    untouched: Iterable[str] = (),
    keep: bool = True,
) -> Structure:
    """Fold every TaperNorm of a model into the linear maps that it feeds, in place, and check that nothing changed.

    What each norm feeds is seen by watching the runs, in eval mode and float64. The outputs of every run are compared
    before and after, in float64 and as the model itself computes them. Whatever goes wrong, the model stays as it was.

    Example::

        structure = fold(model, lambda: model(tokens))

    Args:
        model: its gate must be 0.
        run: runs the model once and returns its output: a tensor, or tuples, mappings or data classes of them. It must
            give the same each time; torch's random generators are put back before each.
        *more_runs: others, for a model that does not use all of its parameters in one.
        tied: what to do with a norm whose matrix other inputs use too (a head tied to the embedding): give the linear
            map a matrix of its own, or keep the norm's map as an explicit scale. With the former a ``Transformer``'s
            ``embed_norm`` goes into its table too.
        untouched: glob patterns of parameters that no run needs to use. What a norm would feed there is unknown, so
            name only those that never see a norm's output.
        keep: hold copies until the fold is proven, so that the model stays as it was whatever goes wrong. False is for
            a model that is thrown away then: it may be left half folded, but the peak is 1.7 times its weights, and not
            7 times. It is refused where a run writes into it, and where a folded matrix is read past the module that
            holds it.

    Returns:
        What changed, as plain data; :func:`taperlit.apply_structure` does it again to a fresh model.

    Raises:
        TaperlitError: the gate is not 0; the model has a DyT or a Derf; a norm feeds something that is not a linear
            map, did not run, or needs a bias where none is read (the norm is named); the runs leave parameters
            untouched; or the outputs differ.
    """
    refuse_pointwise(model)
    norms = require_tapered(model, "fold")
    check_gate(model)
    try:
        return _fold(model, (run, *more_runs), set(norms), tied, list(untouched), keep=keep)
    except Changed as changed:
        guilty = [name for name in norms if keep and _changes_alone(model, (run, *more_runs), name, tied)]
        names = guilty or list(norms)
        if len(names) > 3 and not keep:  # nobody knows which
            names = [*names[:3], f"{len(names) - 3} more"]
        raise TaperlitError(
            f"Folded into what it feeds, {' and '.join(names)} {changed}, so nothing is folded; see that the "
            "run gives the same each time, and leave untapered a norm that is asked for more than its output."
        ) from changed


class _Undone(Exception):
    """Raised at the end of a fold that is only tried."""


def _changes_alone(model: nn.Module, runs: tuple[Run, ...], name: str, tied: Literal["untie", "scale"]) -> bool:
    try:
        _fold(model, runs, {name}, tied, ["*"], undo=True)
    except Changed:
        return True
    except (TaperlitError, _Undone):
        pass
    return False


def _fold(
    model: nn.Module,
    runs: tuple[Run, ...],
    names: set[str],
    tied: Literal["untie", "scale"],
    untouched: list[str],
    undo: bool = False,
    keep: bool = True,
) -> Structure:
    """Fold the norms of some names, see :func:`fold`; the others' products are other inputs'."""
    with _restored_on_error(model):
        structure = Structure(identities={}, scales={}, biases={}, untied=[], difference=0.0)
        unwritten = None if keep else _versions(model)
        own = [own_outputs(model, run, keep) for run in runs]
        if tied == "untie":
            _fold_embed_norms(model, structure)
        watch, before = _watch(model, runs, keep)
        kept = watch.norms.keys() - names
        feeds = resolve(watch, kept)
        require_numbers(before)
        scaled = {name for name in names if feeds[name].shared and tied == "scale"}
        if tied == "untie" and _untie(model, feeds, structure):
            watch, before = _watch(model, runs, keep)
        feeds = resolve(watch, kept | scaled)
        if _add_biases(model, watch, feeds, structure):
            watch, before = _watch(model, runs, keep)
            feeds = resolve(watch, kept | scaled)
        for name in watch.norms:
            if name in names - scaled:
                check_foldable(watch, name, feeds[name])
        check_touched(watch, feeds, untouched)
        folded = Absorbed(watch, feeds, keep)
        for name, norm in watch.norms.items():
            if name in scaled:
                structure["scales"][name] = folded.keep_scale(model, name, norm)
            elif name in names:
                weights = [watch.name_of(product.weight, product.module) for product in feeds[name].products]
                structure["identities"][name] = list(dict.fromkeys(weights))
                replace(model, name, identity_for(norm))
        structure["difference"] = max(
            check_same(old, partial(wide_outputs, model, run, folded.contents, not keep), TOLERANCE, "float64")
            for run, old in zip(runs, before, strict=True)
        )
        del before
        if unwritten is not None:
            _require_unwritten(unwritten)
        with folded.stored():
            rounding = 3 * math.sqrt(watch.coarsest)
            for run, old in zip(runs, own, strict=True):
                check_same(old, partial(own_outputs, model, run, keep), rounding, "its own precision")
            if undo:
                raise _Undone
    return structure


def rehearse(
    model: nn.Module,
    run: Run,
    *more_runs: Run,
    tied: Literal["untie", "scale"] = "untie",
    untouched: Iterable[str] = (),
) -> None:
    """Try whether a model will fold once it is trained: fold it with its gate at 0 and made-up linear maps.

    Args:
        model: a copy that may be spoilt; its gate may be anywhere.
        run: see :func:`fold`.
        *more_runs: see :func:`fold`.
        tied: see :func:`fold`.
        untouched: see :func:`fold`.

    Raises:
        TaperlitError: as :func:`fold` will.
    """
    refuse_pointwise(model)
    norms = require_tapered(model, "rehearse")
    for r in (run, *more_runs):
        own_outputs(model, r)  # what the user's own run raises is the user's
    # As the model is now: made-up maps may send all tokens of a mixture of experts to one.
    watch, _ = _watch(model, (run, *more_runs))
    check_touched(watch, resolve(watch), list(untouched))
    generator = torch.Generator().manual_seed(0)
    scales: dict[str, Tensor] = {}

    def note(name: str, norm: TaperNorm, x: Tensor) -> None:
        if storage_of(x):  # not one of functorch's
            scales[name] = x.detach().double().square().mean().sqrt()

    hooks = [
        norm.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0]))
        for name, norm in norms.items()
    ]
    try:
        for r in (run, *more_runs):
            own_outputs(model, r)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, norm in norms.items():
            # Small, so that an untrained model's residual stream stays of its size without the norms.
            norm.alignment.fill_(0.1 / max(float(scales.get(name, 1.0)), 1e-6))
            for parameter in (norm.taper_weight, norm.taper_bias):
                if parameter is not None:
                    noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(0.5 + noise.to(parameter.device))
    gate = shared_gate(model)
    assert gate is not None
    gate.set(0.0)
    if gate.first is not None:
        gate.set_first(0.0)
    fold(model, run, *more_runs, tied=tied, untouched=["*"])


def refuse_pointwise(model: nn.Module) -> None:
    """Refuse a model with layers of :mod:`taperlit.baselines` that are never linear, be it tapered elsewhere or not.

    Raises:
        TaperlitError: it has a DyT or a Derf; names the first.
    """
    for name, module in model.named_modules():
        if isinstance(module, Pointwise):
            kind = type(module).__name__
            raise TaperlitError(
                f"{plain_name(name)} is a {kind}, whose {module.function} stays at inference and is no linear map, so "
                f"the model cannot be folded; only tapered norms and FakeLN's can."
            )


def check_gate(model: nn.Module) -> None:
    """Refuse a model whose gate is not 0.

    Raises:
        TaperlitError: names the gate's value.
    """
    gate = shared_gate(model)
    if gate is None:
        raise TaperlitError(f"{type(model).__name__} has no gate; call taperlit.taper(model) first.")
    gate.refresh()
    if gate.phase is Phase.LINEAR_FIRST:
        assert gate.first is not None
        raise TaperlitError(
            f"Position 0 still has a share of {gate.first.item():.6g} in a scalar of its own: train to the end of "
            "FirstPosition before folding."
        )
    if gate.phase is not Phase.LINEAR:
        raise TaperlitError(
            f"The gate is {gate.value.item():.6g}, not 0: the norms are still in use. "
            "Train to the end of the taper before folding."
        )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, the model's modules, parameters and attributes are then as they were."""
    tables = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
    states = [(m, dict(vars(m)), {t: dict(vars(m)[t]) for t in tables if t in vars(m)}) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in states:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in contents.items():
                attributes[table].clear()
                attributes[table].update(content)
        raise


def _versions(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """How often each of a model's tensors has been written to, by torch's count."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor, tensor._version) for name, tensor in tensors if not tensor.is_inference()]


def _require_unwritten(versions: list[tuple[str, Tensor, int]]) -> None:
    """Refuse runs that wrote into a model's own tensors: before and after were not of the same weights."""
    for name, tensor, version in versions:
        if tensor._version != version:
            raise TaperlitError(f"The run writes into {name}, so it needs a copy of its own; fold with keep=True.")


def _watch(model: nn.Module, runs: Iterable[Run], keep: bool = True) -> tuple[Watch, list[list[Tensor]]]:
    """Watch the runs in float64, and keep their outputs."""
    watch, outputs = Watch(model, lean=not keep), []
    for run in runs:
        try:
            tensors = outputs_of(model, partial(watch.returned, run), lambda: [watch.watching()])
        except TaperlitError:
            raise
        except Exception as error:  # whatever a stranger's forward raises
            raise TaperlitError(
                f"{' and '.join(watch.norms)} cannot be folded: the run works, but not in float64, where folding is "
                f"checked ({in_a_line(error)}); let it take the model's plain path, without kernels of its own."
            ) from error
        outputs.append(tensors)
    return watch, outputs


def _fold_embed_norms(model: nn.Module, structure: Structure) -> None:
    """Divide the embeddings' rows once and for all; the outputs in the model's own precision tell that it was right."""
    for module in model.modules():
        if isinstance(module, Transformer) and module.config.embed_norm:
            weight = module.tok_embed.weight
            module.fold_embed_norm()
            named = model.named_parameters(remove_duplicate=False)
            structure["untied"] += [plain_name(name) for name, parameter in named if parameter is weight]


def _untie(model: nn.Module, feeds: dict[str, Feeds], structure: Structure) -> bool:
    names = {name for feed in feeds.values() for name, separable in feed.shared.items() if separable}
    for name in sorted(names):
        untie(model, name)
        structure["untied"].append(name)
    return bool(names)


def _add_biases(model: nn.Module, watch: Watch, feeds: dict[str, Feeds], structure: Structure) -> bool:
    """Give zeros to modules whose products need a bias and read none; the next watch tells whether they are read."""
    added = False
    for product in {id(p): p for feed in feeds.values() for p in feed.products}.values():
        if product.bias is not None or not watch.has_bias(product):
            continue
        for name, size in places_of_a_bias(model, watch, product).items():
            _require_no_adapter(model, name)
            add_bias(model, name, [size])
            structure["biases"][name] = [size]
            added = True
    return added


def places_of_a_bias(model: nn.Module, watch: Watch, product: Product) -> dict[str, int]:
    """The biases that a product's module could have and has not, by name with their elements.

    Empty of a module without such an attribute, as one that holds the matrices of several experts.
    """
    weight = watch.name_of(product.weight, product.module)
    prefix, _, _ = weight.rpartition(".")
    module = submodule(model, prefix)
    if isinstance(module, nn.MultiheadAttention):
        # Its fused path reads both biases or neither.
        shapes = {"in_proj_bias": 3 * module.embed_dim, "out_proj.bias": module.embed_dim}
    else:
        shapes = {"bias": product.weight.size[0] * product.weight.size[2]}
    found = {}
    for leaf, size in shapes.items():
        name = f"{prefix}.{leaf}" if prefix else leaf
        holder, _, last = name.rpartition(".")
        if getattr(submodule(model, holder), last, size) is None:
            found[name] = size
    return found


def _require_no_adapter(model: nn.Module, name: str) -> None:
    """Refuse a bias for a map of an adapter: ``peft`` would leave it out when it merges that into its base layer.

    Raises:
        TaperlitError: names it.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        if isinstance(submodule(model, ".".join(parts[:i])), BaseTunerLayer) and parts[i] != "base_layer":
            raise TaperlitError(
                f"{name} would hold a norm's bias, which peft loses when it merges the adapter: merge it first "
                "(merge_and_unload, or taperlit.hub.lora.merge_lora), then fold."
            )
