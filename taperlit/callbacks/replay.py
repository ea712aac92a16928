"""Run a batch once more, to see where its forward pass went wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taperlit.callbacks.gradients import any_bad
from taperlit.callbacks.submodule import first_input
from taperlit.callbacks.token_scale import token_scale
from taperlit.distributed import local
from taperlit.norm import plain_name, tapered_norms


@dataclass
class Seen:
    """What a second run of a batch showed.

    Args:
        bad_output: the first module whose output was not finite; None where none was.
        why_unknown: why that says nothing of the first run; empty where it does.
        largest: the largest token's scale over the median, at the TaperNorm where that is most, and the same in words.
    """

    bad_output: str | None = None
    why_unknown: str = ""
    largest: tuple[float, str] = (0.0, "")


def run_again(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Seen:
    """Run the training step of a batch once more, eagerly and without gradients, up to the first error."""
    seen = Seen()
    hooks = [module.register_forward_hook(_output(seen, name)) for name, module in pl_module.named_modules() if name]
    for name, norm in tapered_norms(pl_module).items():
        hooks.append(norm.register_forward_pre_hook(_input(seen, name), with_kwargs=True))
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = trainer.strategy.training_step(batch, batch_idx)
        loss = output.get("loss") if isinstance(output, dict) else output
        if seen.bad_output is None and (not isinstance(loss, Tensor) or not any_bad([loss])):
            seen.why_unknown = "running its batch once more gave a finite loss"
    except Exception as error:  # whatever it is, it must not hide what the guard has to say
        if seen.bad_output is None:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            seen.why_unknown = (
                f"its batch could not be run once more ({told})"
                if pl_module.automatic_optimization
                else "with manual optimization a batch runs once more only up to its first backward pass"
            )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _output(seen: Seen, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if seen.bad_output is None and any_bad(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            seen.bad_output = plain_name(name)

    return hook


def _input(seen: Seen, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        s = token_scale(module, local(first_input(module, args, kwargs)))
        finite = s.where(s.isfinite(), 0.0)
        median = finite.median()
        ratio = (finite.max() / median).item() if median > 0 else 0.0
        if ratio > seen.largest[0]:
            place = ", ".join(str(int(i)) for i in torch.unravel_index(finite.argmax(), finite.shape))
            seen.largest = (
                ratio,
                (f"at {plain_name(name)} the largest token, [{place}], is {ratio:.3g} times the median ({median:.3g})"),
            )

    return hook
