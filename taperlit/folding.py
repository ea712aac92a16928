"""Fold norms whose gate is 0 into the linear maps they feed (arXiv:2602.10408, section 3), and prove it.

``c h P D W = h W'`` with ``W' = c P D W``, and the bias ``beta~ W + b``; ``P`` centres in the LayerNorm kind and is the
identity in the RMSNorm kind. Computed in float64, checked in float64, stored in the weights' own dtype.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from taperlit.consumers import (
    Bias,
    Elements,
    Feeds,
    Part,
    Product,
    Watch,
    resolve,
    roles_in,
    run_quietly,
    tensors_of,
)
from taperlit.errors import TaperlitError
from taperlit.float64 import Copies, Float64, WideInputs, flat, storage_of
from taperlit.norm import Affine, Phase, TaperNorm, shared_gate
from taperlit.structure import Scale, Structure, add_bias, explicit_scale, identity_for, replace, submodule, untie
from taperlit.surgery import require_tapered

TOLERANCE = 1e-9  # largest relative difference of float64 outputs that is still rounding

Run = Callable[[], object]


@torch.no_grad()
def fold(
    model: nn.Module,
    run: Run,
    *more_runs: Run,
    tied: Literal["untie", "scale"] = "untie",
    untouched: Iterable[str] = (),
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
            map a matrix of its own, or keep the norm's map as an explicit scale.
        untouched: glob patterns of parameters that no run needs to use. What a norm would feed there is unknown, so
            name only those that never see a norm's output.

    Returns:
        What changed, as plain data; :func:`taperlit.apply_structure` does it again to a fresh model.

    Raises:
        TaperlitError: the gate is not 0; a norm feeds something that is not a linear map, did not run, or needs a bias
            where none is read (the norm is named); the runs leave parameters untouched; or the outputs differ.
    """
    norms = require_tapered(model, "fold")
    check_gate(model)
    try:
        return _fold(model, (run, *more_runs), set(norms), tied, list(untouched))
    except _Changed as changed:
        guilty = [name for name in norms if _changes_alone(model, (run, *more_runs), name, tied)]
        raise TaperlitError(
            f"Folded into what it feeds, {' and '.join(guilty or norms)} {changed}, so nothing is folded; see that the "
            "run gives the same each time, and leave untapered a norm that is asked for more than its output."
        ) from changed


class _Changed(Exception):
    """What is not as it was with norms folded, in words."""


class _Undone(Exception):
    """Raised at the end of a fold that is only tried."""


def _changes_alone(model: nn.Module, runs: tuple[Run, ...], name: str, tied: Literal["untie", "scale"]) -> bool:
    try:
        _fold(model, runs, {name}, tied, ["*"], undo=True)
    except _Changed:
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
) -> Structure:
    """Fold the norms of some names, see :func:`fold`; the others' products are other inputs'."""
    with _restored_on_error(model):
        structure = Structure(identities={}, scales={}, biases={}, untied=[], difference=0.0)
        own = [_own_outputs(model, run) for run in runs]
        watch, before = _watch(model, runs)
        kept = watch.norms.keys() - names
        feeds = resolve(watch, kept)
        _require_numbers(before)
        scaled = {name for name in names if feeds[name].shared and tied == "scale"}
        if tied == "untie" and _untie(model, feeds, structure):
            watch, before = _watch(model, runs)
        feeds = resolve(watch, kept | scaled)
        if _add_biases(model, watch, feeds, structure):
            watch, before = _watch(model, runs)
            feeds = resolve(watch, kept | scaled)
        for name in watch.norms:
            if name in names - scaled:
                _check_foldable(watch, name, feeds[name])
        _check_touched(watch, feeds, untouched)
        folded = _Folded(watch, feeds)
        for name, norm in watch.norms.items():
            if name in scaled:
                structure["scales"][name] = folded.keep_scale(model, name, norm)
            elif name in names:
                weights = [watch.name_of(product.weight, product.module) for product in feeds[name].products]
                structure["identities"][name] = list(dict.fromkeys(weights))
                replace(model, name, identity_for(norm))
        with folded.stored():
            structure["difference"] = max(
                _difference(old, partial(_wide_outputs, model, run, folded.contents), TOLERANCE, "float64")
                for run, old in zip(runs, before, strict=True)
            )
            rounding = 3 * math.sqrt(watch.coarsest)
            for run, old in zip(runs, own, strict=True):
                _difference(old, partial(_own_outputs, model, run), rounding, "its own precision")
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
    norms = require_tapered(model, "rehearse")
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
            _own_outputs(model, r)
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
    fold(model, run, *more_runs, tied=tied, untouched=untouched)


def check_gate(model: nn.Module) -> None:
    """Refuse a model whose gate is not 0.

    Raises:
        TaperlitError: names the gate's value.
    """
    gate = shared_gate(model)
    if gate is None:
        raise TaperlitError(f"{type(model).__name__} has no gate; call taperlit.taper(model) first.")
    gate.refresh()
    if gate.phase is not Phase.LINEAR:
        raise TaperlitError(
            f"The gate is {gate.value.item():.6g}, not 0: the norms are still in use. "
            "Train to the end of the taper before folding."
        )


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest ``|a - b|`` relative to the largest ``|a|``, in float64.

    Where ``a`` is not finite ``b`` must be the same; if it is not, or the shapes differ, the result is infinite.
    """
    if a.shape != b.shape or not (wild := ~a.isfinite()).equal(~b.isfinite()):
        return math.inf
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    if not torch.equal(a[wild].nan_to_num(7.0), b[wild].nan_to_num(7.0)):
        return math.inf
    a, b = a[~wild], b[~wild]
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() if a.numel() else 0.0


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


def _outputs(
    model: nn.Module, run: Run, contexts: Callable[[], list[AbstractContextManager[object]]], fused: bool = False
) -> tuple[object, list[Tensor]]:
    """What a run returns, and the tensors in it. Gradients are off, unless the run cannot do without them."""
    for gradients in (torch.no_grad(), torch.enable_grad()):
        try:
            result = run_quietly(model, run, *contexts(), gradients, fused=fused)
        except TaperlitError:
            raise
        except Exception:  # whatever a stranger's forward raises
            if isinstance(gradients, torch.enable_grad):
                raise
        else:
            return result, [_dense(tensor) for tensor in tensors_of(result) if not tensor.is_meta]
    raise AssertionError("unreachable")


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.layout is torch.strided else tensor.to_dense()


def _own_outputs(model: nn.Module, run: Run) -> list[Tensor]:
    """A run's outputs in the model's own precision, by whichever path of torch's it would take."""
    return _outputs(model, run, lambda: [Copies(model, wide=False)], fused=True)[1]


def _wide_outputs(model: nn.Module, run: Run, contents: dict[int, Callable[[], Tensor]]) -> list[Tensor]:
    """A run's outputs in float64, of the folded weights as they are before they are rounded."""
    return _outputs(model, run, lambda: [Copies(model, True, contents), WideInputs(), Float64()])[1]


def _watch(model: nn.Module, runs: Iterable[Run]) -> tuple[Watch, list[list[Tensor]]]:
    """Watch the runs in float64, and keep their outputs."""
    watch, outputs = Watch(model), []
    for run in runs:
        try:
            tensors = _outputs(model, partial(watch.returned, run), lambda: [watch.watching()])[1]
        except TaperlitError:
            raise
        except Exception as error:  # whatever a stranger's forward raises
            raise TaperlitError(
                f"{' and '.join(watch.norms)} cannot be folded: the run works, but not in float64, where folding is "
                f"checked ({_line(error)}); let it take the model's plain path, without kernels of its own."
            ) from error
        outputs.append(tensors)
    return watch, outputs


def _require_numbers(outputs: Iterable[list[Tensor]]) -> None:
    for tensors in outputs:
        if not any(bool(t.isfinite().any()) for t in tensors if t.numel() and _is_number(t)):
            raise TaperlitError(
                "A run returned no finite numbers to check the folding with; let it return the model's output."
            )


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _difference(old: list[Tensor], outputs: Callable[[], list[Tensor]], tolerance: float, where: str) -> float:
    """Largest relative difference of outputs from the old ones.

    Raises:
        _Changed: it is above the tolerance, or there are no such outputs any more.
    """
    try:
        new = outputs()
    except Exception as error:  # whatever a stranger's forward raises
        raise _Changed(f"leaves a model that does not run ({_line(error)})") from error
    difference = 0.0 if len(new) == len(old) else math.inf
    for a, b in zip(old, new, strict=False):
        if _is_number(a):
            difference = max(difference, largest_difference(a, b))
        elif where == "float64" and not torch.equal(a, b):  # rounding may move what was compared or counted
            difference = math.inf
    if not difference <= tolerance:
        raise _Changed(f"changes the output by {difference:.1e} (relative, in {where})")
    return difference


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


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
        weight = watch.name_of(product.weight, product.module)
        prefix, _, _ = weight.rpartition(".")
        module = submodule(model, prefix)
        if isinstance(module, nn.MultiheadAttention):
            # Its fused path reads both biases or neither.
            shapes = {"in_proj_bias": 3 * module.embed_dim, "out_proj.bias": module.embed_dim}
        else:
            shapes = {"bias": product.weight.size[0] * product.weight.size[2]}
        for leaf, size in shapes.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            holder = submodule(model, name.rpartition(".")[0])
            if hasattr(holder, name.rpartition(".")[2]) and getattr(holder, name.rpartition(".")[2]) is None:
                add_bias(model, name, [size])
                structure["biases"][name] = [size]
                added = True
    return added


def _check_foldable(watch: Watch, name: str, feed: Feeds) -> None:
    reasons = list(feed.others)
    reasons += [f"{weight}, which other inputs use too" for weight in feed.shared]
    if reasons:
        raise TaperlitError(
            f"{name} feeds something that is not a linear map of its own ({', '.join(dict.fromkeys(reasons))}), so it "
            "cannot be folded; leave it untapered"
            + (", or fold with tied='scale'." if feed.shared and not feed.others else ".")
        )
    if not feed.products:
        raise TaperlitError(f"{name} ran, but nothing that the run used reads its output; leave it untapered.")
    for product in feed.products:
        if product.bias is None and watch.has_bias(product):
            weight = watch.name_of(product.weight, product.module)
            raise TaperlitError(
                f"{name} adds a bias, and the product with {weight} reads none that could take it; give that linear "
                "map a bias, or leave the norm untapered."
            )


def _check_touched(watch: Watch, feeds: dict[str, Feeds], patterns: list[str]) -> None:
    """Refuse parameters that no run used: a norm may feed them."""
    elements = [read.elements for read in watch.reads]
    elements += [
        e for p in watch.products for e in (p.weight, None if p.bias is None else p.bias.elements) if e is not None
    ]
    touched: dict[int, list[Elements]] = {}
    for element in elements:
        touched.setdefault(element.storage, []).append(element)
    own = {storage_of(p) for norm in watch.norms.values() for p in norm.parameters() if p.numel()}
    absorbing = {product.weight.storage for feed in feeds.values() for product in feed.products}
    missing = []
    for storage, parameters in watch.parameters.items():
        name = parameters[0][0]
        if storage in own or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if storage not in touched:
            missing.append(name)
        elif storage in absorbing:
            used = torch.zeros(watch.size_of(storage), dtype=torch.bool)
            for element in touched[storage]:
                view = element.view(used)
                if view is None:
                    used[element.index()] = True
                else:
                    view.fill_(True)
            if not bool(used.all()):
                missing.append(f"part of {name}")
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise TaperlitError(
            f"The run used {shown} nowhere, so which norms feed them is unknown; pass more runs that use them, or name "
            "them in untouched= if no norm does."
        )


class _Folded:
    """The weights that absorb the norms, old and new, in float64."""

    def __init__(self, watch: Watch, feeds: dict[str, Feeds]) -> None:
        self.watch = watch
        self.maps = {name: norm.linear_map() for name, norm in watch.norms.items()}
        self.products = list({id(p): p for feed in feeds.values() for p in feed.products}.values())
        changed = {p.weight.storage for p in self.products}
        changed |= {p.bias.elements.storage for p in self.products if p.bias is not None and watch.has_bias(p)}
        self.old = {storage: self._flat(storage).clone() for storage in changed}
        self.contents: dict[int, Callable[[], Tensor]] = {s: partial(self.new, s) for s in changed}

    def _flat(self, storage: int) -> Tensor:
        return flat(self.watch.parameters[storage][0][1])

    def new(self, storage: int) -> Tensor:
        """What a parameter's storage is to hold: flat float64."""
        old = self.old[storage].double()
        new = old.clone()
        for product, elements, _ in roles_in(self.watch, storage, self.products):
            if elements is product.weight:
                self._scale(product, old, new)
            else:
                index, columns = elements.index().to(old.device), cast(Bias, product.bias).columns.to(old.device)
                self._put(new, index, old[index] + self._bias(product).flatten()[columns], product)
        return new

    def _scale(self, product: Product, old: Tensor, new: Tensor) -> None:
        if product.whole and (target := product.weight.view(new)) is not None:
            part = product.parts[0]
            gain, _ = self.maps[part.norm]
            target.mul_(gain[part.features.to(new.device)][:, :, None])  # (batch, K, O)
            if self.watch.norms[part.norm].centred:
                target.sub_(target.mean(1, keepdim=True))
            return
        for part in product.parts:
            gain, _ = self.maps[part.norm]
            for index, features in self._matrices(product.weight, part, old.device):
                weight = old[index] * gain[features][:, None]
                if self.watch.norms[part.norm].centred:
                    weight = weight - weight.mean(0, keepdim=True)
                self._put(new, index, weight, product)

    @staticmethod
    def _matrices(weight: Elements, part: Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: the indices (K, O) at a part's positions, and their features (K,)."""
        for index, where, features in zip(weight.index(), part.where, part.features, strict=True):
            yield index[where].to(device), features[where].to(device)

    def _bias(self, product: Product) -> Tensor:
        """``beta~ W``: (batch, O) float64."""
        old = self.old[product.weight.storage]
        if product.whole and (weight := product.weight.view(old)) is not None:
            part = product.parts[0]
            return torch.einsum("bk,bko->bo", cast(Tensor, self.maps[part.norm][1])[part.features], weight.double())
        rows = []
        for part in product.parts:
            _, bias = self.maps[part.norm]
            if bias is None:
                continue
            matrices = self._matrices(product.weight, part, old.device)
            rows.append(torch.stack([bias[features] @ old[index].double() for index, features in matrices]))
        return torch.stack(rows).sum(0)

    def _put(self, new: Tensor, index: Tensor, values: Tensor, product: Product) -> None:
        new[index] = values
        if not torch.equal(new[index], values) and not torch.allclose(
            new[index], values, rtol=1e-12, atol=0.0
        ):  # an element that is used twice
            name = self.watch.name_of(product.weight, product.module)
            raise TaperlitError(
                f"{product.parts[0].norm} feeds {name}, which uses one number for several features, so it cannot be "
                "folded; leave it untapered."
            )

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Write the new values into the parameters; if anything is raised inside, the old ones again."""
        for storage in self.old:
            self._flat(storage).copy_(self.new(storage))
        try:
            yield
        except BaseException:
            for storage, old in self.old.items():
                self._flat(storage).copy_(old)
            raise

    def keep_scale(self, model: nn.Module, name: str, norm: TaperNorm) -> Scale:
        """Put an explicit affine map in a norm's place."""
        gain, bias = self.maps[name]
        scale = Scale(shape=list(norm.kind.shape), centred=norm.centred, bias=bias is not None)
        module: Affine = explicit_scale(model, name, scale)
        for parameter, value in ((module.weight, gain), (module.bias, bias)):
            if parameter is not None and value is not None:
                parameter.copy_(value.view(parameter.shape))
                self.contents[storage_of(parameter)] = partial(cast, Tensor, value)
        replace(model, name, module)
        return scale
