"""A decode step as compiled kernels, and on a GPU as one CUDA graph."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from taperlit.compare import in_a_line
from taperlit.errors import TaperlitError

Step = Callable[[Tensor], Tensor]

WARMUP_STEPS = 3


def captured(step: Step, tokens: Tensor) -> Step:
    """Compile a step; on a GPU, capture what it launches.

    Args:
        step: a method from (B,) token ids to (B, vocab_size) logits; all else that it uses are tensors that stay.
        tokens: such as it will be called with. The step runs with them a few times.

    Returns:
        The same function. On a GPU its result is overwritten by the next call.

    Raises:
        TaperlitError: it cannot be compiled here; for want of a C++ compiler, say.
    """
    compiled = torch.compile(_own_code(step), fullgraph=True, dynamic=False)
    kept = tokens.clone()  # one tensor for all calls: another kind, an inference tensor say, would be compiled anew
    if tokens.device.type != "cuda":

        def run(tokens: Tensor) -> Tensor:
            kept.copy_(tokens)
            return compiled(kept)

        with _refused():
            run(tokens)
        return run
    # torch's own graph and not compile's "reduce-overhead", which would copy every weight that is not a module's
    # parameter into the graph's pool.
    stream = torch.cuda.Stream(tokens.device)
    stream.wait_stream(torch.cuda.current_stream(tokens.device))
    with _refused(), torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            compiled(kept)
    torch.cuda.current_stream(tokens.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compiled(kept)

    def replay(tokens: Tensor) -> Tensor:
        kept.copy_(tokens)
        graph.replay()
        return logits

    return replay


@contextmanager
def _refused() -> Iterator[None]:
    """Tell in one line what a compiler raises."""
    try:
        yield
    except Exception as error:
        raise TaperlitError(f"The step cannot be compiled here ({in_a_line(error)}); give --backend eager.") from error


def _own_code(step: Step) -> Step:
    """A method with a code object of its own.

    ``torch.compile`` keeps what it compiled with the code object: the engines of one process would share a list there,
    be looked for in it at every step, and after a few of them be refused.
    """
    method = cast(types.MethodType, step)
    function, code = method.__func__, method.__func__.__code__.replace()
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return types.MethodType(copy, method.__self__)
