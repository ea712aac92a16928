"""When a hand-written backward pass may stand in for torch's own."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def only_backward(*tensors: Tensor | None) -> bool:
    """Whether all that can follow a forward pass on these tensors is a backward pass in eager mode.

    A compiler fuses and differentiates plain operations better than ours; ``torch.func``, forward-mode differentiation
    and tensor subclasses such as DTensor need them; dispatch modes, which count operations or label tensors, ask to see
    them. The names with an underscore are torch's only way to ask.

    Args:
        tensors: inputs and parameters; None is left out.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors if tensor is not None)
    )
