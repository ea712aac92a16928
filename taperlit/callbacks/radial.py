"""The radial gradient: how much the loss would change if a residual only grew longer."""

from typing import Any

import torch
from torch import Tensor, nn

from taperlit.callbacks.submodule import first_input, with_first_input


class RadialGradient:
    """Catches ``sum over tokens of <dL/dh, h> / ||h||`` where ``h``, (..., d), is what a module is called with.

    ``L`` is a mean over tokens, so each token's part of ``dL/dh`` is its own loss's gradient over their number, and the
    sum is the mean over the tokens that count of each one's own radial gradient. It is the slope of ``L`` when every
    residual grows by the same length, and does not depend on the batch's size.

    Only what reaches ``h`` through the module counts: a loss on ``h`` itself, such as ScaleAnchor's, stays out. It is
    right in micro-batches, in a loss that is computed in chunks (the parts add up), and under activation checkpointing,
    reentrant or not.
    """

    def __init__(self) -> None:
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self.forget()

    def forget(self) -> None:
        """Stop listening and drop what was caught."""
        self.stop()
        self._passes: list[Tensor] = []  # per backward pass
        self._lost = False

    def listen(self, module: nn.Module) -> None:
        """Catch the next backward pass.

        Goes on listening in it: a reentrant checkpoint's first pass has no graph, and its second one is within the
        backward pass. The second pass of the other kind only fills in tensors, and its own graph is never used.
        """
        self.stop()
        # After the hooks that are there already, which thereby get h and not the branch of it that is watched.
        self._hook = module.register_forward_pre_hook(self._branch, with_kwargs=True)

    def stop(self) -> None:
        """End a batch, which may have had no backward pass."""
        self._inputs: list[tuple[Tensor, int]] = []  # of the module in this batch, and which writing they are from
        self._caught: list[Tensor] = []  # one per call of the module that has a gradient
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _branch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = first_input(module, args, kwargs)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and h.requires_grad):
            return None
        # A name of its own for the module's input: its gradient is without what comes to h from elsewhere.
        branch = h.view_as(h)
        kept = h.detach()
        self._inputs.append((kept, h._version))
        branch.register_hook(lambda gradient: self._catch(gradient, kept))
        return with_first_input(args, kwargs, branch)

    @torch.no_grad()
    def _catch(self, gradient: Tensor, h: Tensor) -> None:
        dtype = torch.promote_types(h.dtype, torch.float32)
        h = h.to(dtype)
        length = torch.linalg.vector_norm(h, dim=-1).clamp(min=torch.finfo(dtype).tiny)  # a zero vector has no radius
        self._caught.append(((gradient.to(dtype) * h).sum(-1) / length).sum())

    def end_pass(self, factor: float | Tensor) -> None:
        """Call after a backward pass.

        Args:
            factor: the batch's loss over the loss that backward was given, which may be scaled for its precision or
                divided by the number of micro-batches.
        """
        # Written over since: what was h is gone, and autograd may have gone round the branch.
        self._lost |= any(h._version != version for h, version in self._inputs)
        if self._caught:
            self._passes.append(torch.stack(self._caught).sum() * factor)
        self.stop()

    def take(self) -> list[Tensor]:
        """One 0-d value per backward pass since the last call; none where ``h`` was written over in any."""
        passes, lost = self._passes, self._lost
        self._passes, self._lost = [], False
        return [] if lost else passes
