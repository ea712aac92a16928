"""Fold a module of the zoo and hold it to its verdict."""

import json
import math
import re
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taperlit.errors import TaperlitError
from taperlit.folding import fold, rehearse
from taperlit.norm import TaperNorm, shared_gate, tapered_norms
from taperlit.structure import apply_structure
from taperlit.surgery import taper
from zoo.case import EITHER, FOLDS, NORMS, REFUSED, Case

TOLERANCE = 1e-9  # in float64; a case says its own for float32


class Wrong(AssertionError):
    """A verdict that does not hold."""


@dataclass(frozen=True)
class Outcome:
    """What became of a module.

    Args:
        difference: largest relative difference of its outputs if it was folded.
        line: of the refusal if it was refused.
    """

    difference: float | None = None
    line: str | None = None


def plain(case: Case, kind: str, dtype: torch.dtype, seed: int) -> nn.Module:
    """The module before it is tapered; parameters that begin as a constant get random values."""
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed takes ten times as long
    model = case.build(NORMS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(0.3 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model.double()
    return model.train(case.train)


def tapered(case: Case, kind: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The module with its gate at 0 and random linear maps, gains of both signs."""
    model = plain(case, kind, dtype, seed)
    taper(model, list(case.names))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.copy_(torch.rand((), generator=generator) * 3 + 0.1)
            for parameter in norm.parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    shared_gate(model).set(0.0)
    return case.prepare(model.train(case.train))


def outputs(case: Case, model: nn.Module, batches: list[tuple[Tensor, ...]]) -> list[list[object]]:
    """The leaves of the output for each batch, and once more for the first without gradients."""
    results = []
    for batch, context in [*((batch, torch.enable_grad) for batch in batches), (batches[0], torch.no_grad)]:
        torch.default_generator.manual_seed(0)
        with context():
            leaves = tree_leaves(case.read(case.call(model, *(t.clone() for t in batch))))
        results.append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    return results


def difference(a: object, b: object) -> float:
    """Largest difference of two leaves relative to the largest number of the first; infinite if they do not compare."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if isinstance(a, float) and isinstance(b, float) and not math.isnan(a):
            return abs(a - b) / max(abs(a), 1e-300)
        return 0.0 if type(a) is type(b) and (a == b or a != a) else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(a.masked_fill(finite, 0).nan_to_num(2, 3, 4), b.masked_fill(finite, 0).nan_to_num(2, 3, 4)):
        return math.inf
    a, b = a[finite], b[finite]
    if not b.isfinite().all():
        return math.inf
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-300)).item() if a.numel() else 0.0


def largest(before: list[list[object]], after: list[list[object]]) -> float:
    """Largest difference over all leaves of all batches."""
    if [len(leaves) for leaves in before] != [len(leaves) for leaves in after]:
        return math.inf
    pairs = [pair for a, b in zip(before, after, strict=True) for pair in zip(a, b, strict=True)]
    return max((difference(a, b) for a, b in pairs), default=0.0)


def bits(tensor: Tensor) -> object:
    """A tensor's dtype, shape and bytes."""
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def portrait(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a refusal must leave as it is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "state dict": [(key, bits(value)) for key, value in model.state_dict().items()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        "modules": [(name, id(m), type(m), m.training) for name, m in modules.items()],
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()],
        "own forwards": [name for name, m in modules.items() if "forward" in vars(m)],
    }


def judge(case: Case, kind: str, dtype: torch.dtype) -> Outcome:
    """Fold one module in one dtype.

    Raises:
        Wrong: its verdict does not hold, or something crashed, differs or is half-changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = case.batches(dtype)
        before = outputs(case, tapered(case, kind, dtype), batches)
        model = tapered(case, kind, dtype)
        norms, known = list(tapered_norms(model)), portrait(model)
        runs = [lambda batch=batch: case.run(model, *batch) for batch in case.batches(dtype)[: 1 + case.more]]
        try:
            structure = fold(model, *runs, **case.options)
        except TaperlitError as error:
            outcome = Outcome(line=str(error))
            _check_line(case, kind, norms, type(model).__name__, str(error))
        except case.raises as error:
            outcome = Outcome(line=f"the run's own {type(error).__name__}: {error}")
        except Exception as error:
            _check_untouched(case, known, model, before, batches, f"crashed ({type(error).__name__}: {error})")
            raise Wrong(f"crashed: {type(error).__name__}: {error}") from error
        else:
            outcome = Outcome(_check_folded(case, kind, dtype, model, structure, before, batches))
        if outcome.line is not None:
            _check_untouched(case, known, model, before, batches, f"refused ({outcome.line})")
        verdict = case.verdicts[kind]
        if verdict == FOLDS and outcome.line is not None:
            raise Wrong(f"should fold, and was refused: {outcome.line}")
        if verdict == REFUSED and outcome.line is None:
            raise Wrong(f"should be refused, and was folded (difference {outcome.difference:.1e})")
        if dtype == case.dtypes[0] and kind == next(iter(case.verdicts)):
            _check_rehearsal(case, kind, dtype)
        return outcome


def _check_rehearsal(case: Case, kind: str, dtype: torch.dtype) -> None:
    """With the gate still open, a rehearsal on a copy must tell what folding will do."""
    model = tapered(case, kind, dtype)
    shared_gate(model).set(1.0)
    runs = [lambda batch=batch: case.run(model, *batch) for batch in case.batches(dtype)[: 1 + case.more]]
    try:
        rehearse(model, *runs, **case.options)
    except (TaperlitError, *case.raises) as error:
        if case.verdicts[kind] == FOLDS:
            raise Wrong(f"folds, and its rehearsal was refused: {error}") from error
    except Exception as error:
        raise Wrong(f"the rehearsal crashed: {type(error).__name__}: {error}") from error
    else:
        if case.verdicts[kind] == REFUSED:
            raise Wrong("is refused, and its rehearsal was not")


def _check_line(case: Case, kind: str, norms: list[str], model: str, line: str) -> None:
    if "\n" in line:
        raise Wrong(f"refused in more than one line: {line!r}")
    named = [name for name in norms if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", line)]
    whole = case.whole or (case.verdicts[kind] == EITHER and not case.blames)
    if not (any(re.search(case.blames, n) for n in named) or (whole and re.search(rf"\b(runs?|{model})\b", line))):
        raise Wrong(f"refused, and the line does not name {case.blames or 'a norm'}: {line}")
    if not re.search(case.why, line):
        raise Wrong(f"refused, and the line does not say {case.why!r}: {line}")


def _check_untouched(case, known, model, before, batches, what) -> None:
    now = portrait(model)
    for part, old in known.items():
        if now[part] != old:
            raise Wrong(f"{what}, and left half-changed: {part}")
    for a, b in zip(before, outputs(case, model, batches), strict=True):
        if len(a) != len(b) or not all(_same(x, y) for x, y in zip(a, b, strict=True)):
            raise Wrong(f"{what}, and left half-changed: outputs")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return type(a) is type(b) and (a == b or a != a or not isinstance(a, float | int | str))


def _outputs_after(case, model, batches):
    try:
        return outputs(case, model, batches)
    except Exception as error:
        raise Wrong(f"folded, and crashes when called: {type(error).__name__}: {error}") from error


def _check_folded(case, kind, dtype, model, structure, before, batches) -> float:
    tolerance = TOLERANCE if dtype == torch.float64 else case.tolerance
    if any(isinstance(module, TaperNorm) for module in model.modules()):
        raise Wrong("folded, and a TaperNorm is left")
    if model.training != case.train:
        raise Wrong("folded, and the training mode changed")
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    worst = largest(before, _outputs_after(case, model, batches))
    if not worst <= tolerance:
        raise Wrong(f"folded, and differs silently: {worst:.1e}")
    fresh = case.prepare(plain(case, kind, dtype, seed=1))
    apply_structure(fresh, json.loads(json.dumps(structure)))
    fresh.load_state_dict(state)
    again = largest(before[:1], _outputs_after(case, fresh, batches[:1])[:1])
    if not again <= tolerance:
        raise Wrong(f"folded, and the record on a fresh model gives something else: {again:.1e}")
    return worst
