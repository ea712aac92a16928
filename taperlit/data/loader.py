"""The order of blocks, and a loader that knows where in it a run is."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from taperlit.data.tokens import TokenBlocks


class BlockSampler(DistributedSampler):
    """Blocks in an order that depends on seed and epoch alone.

    One global batch is consecutive in that order, and the ranks take consecutive parts of it; so two processes with
    half the batch see what one sees. In training the last, incomplete global batch is dropped. In evaluation every
    block comes exactly once, and ranks that run out get padding (index -1).

    Args:
        blocks: the data set.
        batch_size: blocks a batch, on one rank.
        rank: of this process.
        world_size: processes.
        seed: of the order.
        train: shuffle and drop, or keep and pad.
    """

    def __init__(
        self, blocks: TokenBlocks, batch_size: int, rank: int, world_size: int, seed: int, train: bool
    ) -> None:
        super().__init__(blocks, world_size, rank, shuffle=train, seed=seed, drop_last=train)
        self.dataset: TokenBlocks
        self.batch_size, self.train = batch_size, train
        self.start = 0  # blocks of this epoch, over all ranks, that the next pass leaves out

    @property
    def global_batch(self) -> int:
        """Blocks a batch, over all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Blocks an epoch on one rank."""
        if self.train:
            return len(self.dataset) // self.global_batch * self.batch_size
        return -(-len(self.dataset) // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch, from its start."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        if not self.train:
            order = np.full(len(self) * self.num_replicas, -1)
            order[: len(self.dataset)] = np.arange(len(self.dataset))
            yield from order[self.rank :: self.num_replicas].tolist()
            return
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for batch in range(start, len(self) * self.num_replicas, self.global_batch):
            mine = batch + self.rank * self.batch_size
            yield from order[mine : mine + self.batch_size].tolist()


class ResumableLoader(DataLoader):
    """A DataLoader whose state is how many blocks were handed out, not how many its workers have fetched ahead.

    Lightning saves and loads the state with its checkpoints.
    """

    def __init__(self, blocks: TokenBlocks, sampler: BlockSampler, **options: Any) -> None:
        # A generator of its own: torch's default one then belongs to the model alone, and a resumed run's draws agree.
        options["generator"] = torch.Generator()
        super().__init__(blocks, sampler.batch_size, sampler=sampler, drop_last=sampler.train, **options)
        self.sampler: BlockSampler
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        # A generator: the sampler is asked for its order at the first batch, after the trainer has set the epoch.
        self.position = self.sampler.start
        for batch in super().__iter__():
            self.position += self.sampler.global_batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and blocks of it handed out over all ranks."""
        return {"epoch": self.sampler.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass begin there."""
        self.sampler.epoch, self.sampler.start = state_dict["epoch"], state_dict["position"]
        self.position = self.sampler.start  # of a run that saves again before it takes a batch
