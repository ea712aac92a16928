import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taperlit.errors import TaperlitError
from taperlit.metrics import TokenLossTails, bucket_names, position_bucket

HALF_A_BIN = 2.0**-12


def sample(rows=6, length=37, seed=0, ignored=0.2, spread=2.0):
    """Losses over many orders of magnitude, blocks with padding, and a reference's losses."""
    generator = torch.Generator().manual_seed(seed)
    losses, other = (torch.randn(2, rows, length, generator=generator) * spread).exp()
    blocks = torch.randint(50, (rows, length + 1), generator=generator)
    blocks[:, 1:].masked_fill_(torch.rand(rows, length, generator=generator) < ignored, -100)
    losses = losses.where(blocks[:, 1:] != -100, 1e9)  # what padding's losses are is no matter
    return losses, blocks, other


def expected_of(losses, blocks, other, threshold):
    """The figures by numpy in float64."""
    counted = (blocks[:, 1:] != -100).numpy()
    values, reference = losses.numpy().astype(np.float64)[counted], other.numpy().astype(np.float64)[counted]
    rise = values - reference
    return {
        "tokens": counted.sum(),
        "loss_mean": values.mean(),
        "loss_max": values.max(),
        "tokens_risen": (rise > threshold).sum(),
        "share_risen": (rise > threshold).mean(),
        "rise_mean": rise.mean(),
        "rise_max": rise.max(),
        "loss_median": np.quantile(values, 0.5, method="inverted_cdf"),
        "loss_p999": np.quantile(values, 0.999, method="inverted_cdf"),
    }


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 70),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    spread=st.floats(0, 8),
    threshold=st.floats(0, 20),
    seed=st.integers(0, 999),
)
def test_the_figures_are_those_of_all_losses_at_once(rows, length, ignored, spread, threshold, seed):
    losses, blocks, other = sample(rows, length, seed, ignored, spread)
    tails = TokenLossTails(threshold)
    for one in range(rows):
        tails.update(*(each[one : one + 1] for each in (losses, blocks, other)))
    figures = tails.compute() if tails.update_called else {}
    if (blocks[:, 1:] == -100).all():
        assert figures == {"tokens": 0}
        return
    for name, value in expected_of(losses, blocks, other, threshold).items():
        rel = HALF_A_BIN if name in ("loss_median", "loss_p999") else 1e-6
        # A difference of float32 losses is float32 as well.
        slack = 1e-6 * max(losses[blocks[:, 1:] != -100].max(), other.max()) if name.startswith("rise") else 0
        assert figures[name].item() == pytest.approx(value, rel=rel, abs=float(slack)), name
    assert figures["loss_p999"] <= figures["loss_max"]
    assert not figures["loss_nonfinite"]
    assert not figures["reference_nonfinite"]
    for name, size in (("loss_max", losses), ("rise_max", losses - other)):
        before, token, position = figures[f"{name}_at"].tolist()
        places = (blocks[:, :-1] == before) & (blocks[:, 1:] == token) & (torch.arange(length) == position)
        assert (size[places] == figures[name].float()).any()
    for position in range(length):
        first = 2 ** int(math.log2(position)) if position else 0
        last = min(max(2 * first, 1), length) - 1
        here = losses[:, first : last + 1][blocks[:, 1 + first : 2 + last] != -100]
        name = f"loss_at/{first}" if first == last else f"loss_at/{first}-{last}"
        assert (name in figures) == bool(len(here))
        if len(here):
            assert figures[name].item() == pytest.approx(here.double().mean().item(), rel=1e-12)


@given(length=st.integers(1, 5000))
def test_every_position_has_one_bucket_and_the_buckets_double(length):
    names = bucket_names(length)
    ends = [[int(end) for end in name.split("-")] for name in names]
    assert [position for end in ends for position in range(end[0], end[-1] + 1)] == list(range(length))
    sizes = [end[-1] - end[0] + 1 for end in ends]
    assert sizes[:-1] == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048][: len(sizes) - 1]
    numbers = position_bucket(torch.arange(length))
    assert numbers.tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]


def test_the_names_of_a_block_of_256():
    assert bucket_names(256) == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255"]
    assert bucket_names(9)[-1] == "8"


def test_blocks_may_be_of_unequal_length():
    tails = TokenLossTails()
    for length in (7, 3):
        tails.update(torch.full((2, length), float(length)), torch.zeros(2, length + 1, dtype=torch.int64))
    figures = {name: value.tolist() for name, value in tails.compute().items()}
    assert {name: figures[name] for name in figures if "/" in name} == {
        "loss_at/0": 5, "loss_at/1": 5, "loss_at/2-3": (2 * 3 + 4 * 7) / 6, "loss_at/4-6": 7
    }  # fmt: skip


def test_quantiles_from_the_smallest_loss_to_the_largest():
    losses = torch.tensor([[0.0, -0.0, 1e-30, 1e-3, 11.5, 3e38]])
    tails = TokenLossTails()
    tails.update(losses, torch.zeros(1, 7, dtype=torch.int64))
    figures = tails.compute()
    assert figures["loss_median"].item() == pytest.approx(1e-30, rel=HALF_A_BIN)  # the third of six
    assert figures["loss_p999"].item() == pytest.approx(3e38, rel=HALF_A_BIN)
    assert tails.histogram.sum() == 6
    tails.update(torch.full((1, 3), 7.0), torch.zeros(1, 4, dtype=torch.int64))
    assert tails.compute()["loss_median"].item() == pytest.approx(7, rel=HALF_A_BIN)  # the fifth of nine


@pytest.mark.parametrize(
    ("tokens", "beyond"), [(1000, 1), (3000, 3), (7000, 7), (1001, 1), (1999, 1), (2000, 2), (999, 0), (1, 0)]
)
def test_the_rank_of_a_quantile_is_exact(tokens, beyond):
    """Of 1000 tokens the 99.9th percentile may leave one above it, and not two."""
    for large, expected in ((beyond, 1), (beyond + 1, 2)):
        losses = torch.ones(1, tokens)
        losses[0, :large] = 2
        tails = TokenLossTails()
        tails.update(losses, torch.zeros(1, tokens + 1, dtype=torch.int64))
        assert tails.compute()["loss_p999"].item() == pytest.approx(expected, rel=HALF_A_BIN)


def processes(parts):
    """What the first of several processes computes, each of which saw one part."""
    every = [TokenLossTails(1.0) for _ in parts]
    for tails, part in zip(every, parts, strict=True):
        for batch in part:
            tails.update(*batch)
    names = iter([name for name in every[0]._reductions])
    first = every[0]
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda state, group=None: [getattr(each, name) for name in [next(names)] for each in every]
    return first.compute()


@pytest.mark.parametrize("order", [1, -1])
def test_several_processes_are_one(order):
    losses, blocks, other = sample(rows=9, length=21)
    losses[[2, 2, 7, 7], [3, 4, 3, 4]] = torch.tensor([1.0, 2e4, 1.0, 2e4])  # equal ones in two processes
    blocks[2, 4:6], blocks[7, 4:6] = torch.tensor([9, 9]), torch.tensor([3, 8])
    batches = [(losses[i : i + 1], blocks[i : i + 1], other[i : i + 1]) for i in range(9)]
    one = TokenLossTails(1.0)
    one.update(losses, blocks, other)
    idle = [(losses[:1], torch.full_like(blocks[:1], -100), other[:1])]  # of a process that got padding alone
    figures = processes([*(batches[i::3] for i in range(3)), idle][::order])
    assert figures.keys() == one.compute().keys()
    for name, value in one.compute().items():
        if name == "loss_mean" or name.startswith(("loss_at/", "rise_mean")):  # sums in another order
            assert figures[name].item() == pytest.approx(value.item(), rel=1e-14), name
        else:
            assert torch.equal(figures[name], value), name
    assert one.compute()["loss_max_at"].tolist() == [3, 8, 4]


def test_merged_metrics_are_one():
    losses, blocks, other = sample()
    one, first, second = TokenLossTails(), TokenLossTails(), TokenLossTails()
    one.update(losses, blocks, other)
    first.update(losses[:2], blocks[:2], other[:2])
    second.update(losses[2:], blocks[2:], other[2:])
    first.merge_state(second)
    for name, value in one.compute().items():
        torch.testing.assert_close(first.compute()[name], value, rtol=1e-14, atol=0)


def test_what_is_not_finite_counts_as_the_worst():
    losses = torch.ones(2, 4)
    losses[0, 2], losses[1, 3] = float("nan"), float("inf")
    other = torch.ones(2, 4)
    other[1, 3], other[1, 0] = float("inf"), float("nan")
    blocks = torch.arange(10).view(2, 5)
    tails = TokenLossTails()
    tails.update(losses, blocks, other)
    figures = {name: value.tolist() for name, value in tails.compute().items()}
    inf = float("inf")
    assert figures["loss_nonfinite"] == 2
    assert figures["loss_mean"] == figures["loss_max"] == figures["loss_p999"] == figures["loss_at/2-3"] == inf
    assert figures["loss_max_at"] == [2, 3, 2]
    assert figures["loss_median"] == pytest.approx(1, rel=HALF_A_BIN)
    assert figures["loss_at/0"] == figures["loss_at/1"] == 1
    assert figures["reference_nonfinite"] == 2
    assert figures["tokens_risen"] == 1
    assert figures["share_risen"] == pytest.approx(1 / 6)
    assert figures["rise_max"] == figures["rise_mean"] == inf
    assert figures["rise_max_at"] == [2, 3, 2]


def test_without_a_reference_nothing_is_said_of_one():
    losses, blocks, _ = sample()
    tails = TokenLossTails()
    tails.update(losses, blocks)
    assert not [name for name in tails.compute() if "ris" in name or "reference" in name]


@pytest.mark.parametrize(
    ("losses", "message"),
    [(torch.zeros(2, 5), "give one for each"), (torch.full((2, 4), -2.5), "A token loss is -2.5")],
)
def test_what_are_no_losses_is_refused(losses, message):
    with pytest.raises(TaperlitError, match=message):
        TokenLossTails().update(losses, torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(TaperlitError, match="threshold is"):
        TokenLossTails(threshold)
