"""torch's profiler over one call, without what it prints."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile


def profiled(call: Callable[[], object], memory: bool = False) -> profile:
    """Run a call under the profiler, and wait for a GPU.

    Args:
        call: what is profiled.
        memory: note every allocation and release.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with _no_stderr(), profile(activities=activities, profile_memory=memory) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what is written to the file descriptor: the profiler's library tells of its start past any setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
