"""Two DDP processes against one that sees both batches."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import join_two
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from taperlit.norm import tapered_norms, update_alignment
from taperlit.surgery import taper

GATES = [1.0, 1.0, 1.0, 0.7, 0.2, 0.0, 0.0]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 1))
    taper(model)
    return model


def batches():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(12, 8, generator=generator) * (1 + rank) for rank in range(2)] for _ in range(2 * len(GATES))]


def train(model, forward, data, reduce):
    norms = tapered_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gate = next(iter(norms.values())).gate
    losses = []
    for step, g in enumerate(GATES):
        if step == 3:
            for norm in norms.values():
                norm.freeze()
        gate.set(g)
        for x in data[2 * step : 2 * step + 2]:  # two micro-batches a step
            loss = forward(x).square().mean() / 2
            loss.backward()
            losses.append(reduce(loss.detach()).item())
        update_alignment(norms.values(), reduce)
        for norm in norms.values():
            for parameter in norm.idle_parameters():
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return losses, [norm.alignment.item() for norm in norms.values()]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def mean(value):
        value = value.clone()
        dist.all_reduce(value)
        return value / 2

    model = build()
    data = [pair[rank] for pair in batches()]
    result = train(model, DistributedDataParallel(model), data, mean)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # past C++'s static destructors, see tests/processes.py


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    join_two(worker, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = build()
    losses, scalars = train(model, model, [torch.cat(pair) for pair in batches()], lambda value: value)
    for other_losses, other_scalars in results:
        assert other_scalars == pytest.approx(scalars, rel=1e-5)
        assert other_losses == pytest.approx(losses, rel=1e-5)
