"""A checkpoint in shards, as FSDP2 writes it, made of one that is a file."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint import save

from taperlit.checkpoint.reader import read_checkpoint
from taperlit.checkpoint.sharded import DIGEST, META, digest


def main(args: Sequence[str]) -> int:
    """Write the first argument's content as the folder that the second names."""
    source, target = map(Path, args)
    content = read_checkpoint(source)
    state = {"state_dict": {name: value.clone() for name, value in content.pop("state_dict").items()}}
    (optimizer,) = content.pop("optimizer_states")
    state["optimizer_0"] = {"state": {str(key): value for key, value in optimizer["state"].items()}, "param_groups": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=target)
    torch.save(content, target / META)
    (target / DIGEST).write_text(digest(target))
    return 0
