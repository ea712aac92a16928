"""What is done to weights after a step, against singular value decompositions and formulas in float64."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import join_two
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from taperlit.errors import TaperlitError
from taperlit.static import cap_singular_values, equalize_rows


def matrix(rows=40, columns=12, dtype=torch.float64, seed=0):
    """Rows of different norms, one of them 0."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    made *= torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None]
    made[3] = 0
    return made.to(dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_rows_keep_their_directions_and_get_the_mean_norm(dtype, error):
    before = matrix(dtype=dtype)
    after = before.clone()
    equalize_rows(after)
    wide = before.double()
    norms = torch.tensor([sum(x * x for x in row) ** 0.5 for row in wide.tolist()], dtype=torch.float64)
    mean = norms.sum() / 39
    wanted = torch.stack([row if n == 0 else row / n * mean for row, n in zip(wide, norms, strict=True)])
    torch.testing.assert_close(after.double(), wanted, rtol=2 * error, atol=0)
    assert not after[3].any()
    equalize_rows(again := after.clone())
    torch.testing.assert_close(again.double(), after.double(), rtol=4 * error, atol=0)


def test_no_matrix_with_equal_rows_is_nearer():
    before, after = matrix(), matrix()
    equalize_rows(after)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (factor * after - before).norm() > (after - before).norm()


def test_a_table_of_zeros_stays():
    zeros = torch.zeros(5, 3)
    equalize_rows(zeros)
    assert not zeros.any()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("multiple", [1.2, 1.7])
def test_singular_values_are_capped_and_vectors_stay(shape, dtype, error, multiple):
    before = matrix(*shape, dtype=dtype)
    after = before.clone()
    cap_singular_values(after, multiple)
    u, s, v = torch.linalg.svd(before.double(), full_matrices=False)
    cap = multiple * (s.square().sum() / len(s)).sqrt()
    assert 0 < (s > cap).sum() < len(s)
    wanted = u @ torch.diag(s.clamp(max=cap)) @ v
    torch.testing.assert_close(after.double(), wanted, rtol=0, atol=error * s[0].item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_below_the_cap_nothing_changes(dtype):
    before = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = before.clone()
    cap_singular_values(after, 4.0)
    assert torch.equal(before, after)


def test_called_again_and_again_the_bound_holds_for_what_is_there():
    weight = matrix(16, 48)
    for _ in range(100):
        cap_singular_values(weight, 1.5)
    s = torch.linalg.svdvals(weight)
    assert s[0] / s.square().mean().sqrt() == pytest.approx(1.5, rel=1e-5)


def test_no_direction_is_written_by_more_than_a_multiple_of_a_typical_one():
    weight, x = matrix(16, 48), torch.randn(2000, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        cap_singular_values(weight, 1.5)
    worst = torch.linalg.svd(weight)[2][0]  # the input that is written largest
    written = (x @ weight.T).norm(dim=1) / x.norm(dim=1)
    typical = written.square().mean().sqrt() * (48 / 16) ** 0.5  # of inputs that lie where the matrix sees them
    assert (weight @ worst).norm() < 1.5 * 1.05 * typical
    assert (matrix(16, 48) @ torch.linalg.svd(matrix(16, 48))[2][0]).norm() > 2 * typical


def test_what_is_not_finite_is_refused():
    weight = matrix(4, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(TaperlitError, match="a weight is not finite"):
        cap_singular_values(weight, 2.0)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Shard(1), Replicate()):
        split = distribute_tensor(matrix(41, 12), mesh, [placement])
        equalize_rows(split)
        assert split.placements == (placement,)
        whole = matrix(41, 12)
        equalize_rows(whole)
        torch.testing.assert_close(split.full_tensor(), whole, rtol=1e-12, atol=0)
    (folder / f"{rank}").touch()
    dist.barrier()
    os._exit(0)  # past C++'s static destructors, see tests/processes.py


@pytest.mark.slow
def test_a_table_that_is_split_between_processes(tmp_path):
    join_two(worker, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}
