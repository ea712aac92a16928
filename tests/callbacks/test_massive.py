"""ShrinkMassive: units that write massive activations, planted and found."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from processes import on_two
from torch import nn
from toy import Stop, fit, same, state_of

from taperlit import AlignmentFreeze, GateSchedule, ShrinkMassive, taper
from taperlit.callbacks import RngState
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms

WIDTH, HIDDEN, MULTIPLE = 8, 32, 4.0


class Conv1D(nn.Module):
    """A linear map as GPT-2 has it, (d_in, d_out)."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * 0.1)

    def forward(self, x):
        return x @ self.weight


class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.norm, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.down = Conv1D(HIDDEN, WIDTH) if conv else nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(L.LightningModule):
    """Three blocks on (B, 5, 8); in the first, two units write a hundred times the residual at the first position."""

    def __init__(self, conv=False, planted=True, lr=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.Sequential(*(Block(conv) for _ in range(3)))
        self.head = nn.Linear(WIDTH, 1)
        self.lr = lr
        if planted:
            with torch.no_grad():
                for index, units, size in ((0, (3, 20), 60.0), (2, (7,), -60.0)):
                    self.blocks[index].up.weight[list(units)] = 0.0
                    self.blocks[index].up.weight[list(units), 0] = 1.0
                    self.blocks[index].up.bias[list(units)] = -2.0  # only the first position gets over it
                    self.columns(index)[:, list(units)] = 0.0
                    self.columns(index)[0, list(units)] = size
        taper(self)

    def columns(self, index):
        down = self.blocks[index].down
        return down.weight.T if isinstance(down, Conv1D) else down.weight

    def forward(self, x):
        return self.head(self.blocks(x))

    def training_step(self, batch, batch_idx):
        start = batch_idx * batch.shape[0] * self.trainer.world_size + self.global_rank * batch.shape[0]
        return (self(tokens()[start : start + batch.shape[0]]).sum((-1, -2)) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(tokens(), batch_size=4 // self.trainer.world_size)


def tokens():
    x = torch.randn(160, 5, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.5
    x[:, 0, 0] = 6.0
    return x


def callbacks(**words):
    return [GateSchedule(6, 9), AlignmentFreeze(), ShrinkMassive(**{"begin": 2, "end": 5, **words})]


def by_formula(model, batches):
    """Per block: the massive units, what they write together, and the median, in float64."""
    model, found, smallest = model.double(), {}, 1.0
    peaks, medians = [torch.zeros(HIDDEN).double() for _ in range(3)], [[] for _ in range(3)]
    for x in batches:
        h = x.double()
        for i, block in enumerate(model.blocks):
            a = torch.relu(block.up(block.norm(h)))
            written = a.unsqueeze(-1) * model.columns(i).T  # (B, T, unit, d_model)
            peaks[i] = torch.maximum(peaks[i], written.square().mean(-1).sqrt().amax((0, 1)))
            h = h + block.down(a)
            medians[i].append(h.square().mean(-1).sqrt().median())
    for i in range(2):  # no norm comes after the last
        median = torch.stack(medians[i]).mean()
        units = (peaks[i] > MULTIPLE * median).nonzero().flatten().tolist()
        if units:
            smallest = min(smallest, (MULTIPLE * median / peaks[i][units].sum()).item())
            found[i] = (units, smallest)
    return found


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@torch.no_grad()
def test_it_finds_and_shrinks_what_was_planted(tmp_path, conv, accumulate):
    model = Blocks(conv)
    before = state_of(model)
    with torch.enable_grad():
        fit(tmp_path, model, *callbacks(), accumulate_grad_batches=accumulate)
    expected = by_formula(Blocks(conv), tokens()[: 2 * accumulate * 4].split(4))
    assert expected.keys() == {0}
    assert expected[0][0] == [3, 20]
    original = Blocks(conv).columns(0)
    original[:, [3, 20]] *= expected[0][1]
    torch.testing.assert_close(model.columns(0), original, rtol=1e-4, atol=1e-7)
    changed = [
        name for name, old in before.items() if "down.weight" in name and not torch.equal(old, model.state_dict()[name])
    ]
    assert changed == ["blocks.0.down.weight"]


def test_what_is_written_later_shrinks_no_less(tmp_path):
    model = with_the_last_block_in_the_middle()
    expected = by_formula(with_the_last_block_in_the_middle(), tokens()[:8].split(4))
    assert expected.keys() == {0, 1}
    assert expected[1][1] == expected[0][1]
    mine = callbacks()
    fit(tmp_path, model, *mine)
    found = mine[2].state_dict()["found"]
    assert {name: list(one[0]) for name, one in found.items()} == {f"blocks.{i}.down": expected[i][0] for i in expected}
    assert [one[2] for one in found.values()] == pytest.approx([expected[i][1] for i in expected], rel=1e-5)


def with_the_last_block_in_the_middle():
    model = Blocks()
    with torch.no_grad():
        model.blocks[1].load_state_dict(model.blocks[2].state_dict())
    return model


def test_norms_hardly_see_it(tmp_path):
    model, whole, x = Blocks(), Blocks(), tokens()[:8]
    fit(tmp_path, model, *callbacks())
    shared_gate(model).set(1.0)
    small, large = model.blocks[0](x)[:, 0], whole.blocks[0](x)[:, 0]
    assert (small.norm(dim=-1) < 0.2 * large.norm(dim=-1)).all()
    before, after = whole.blocks[1].norm(large), model.blocks[1].norm(small)
    assert torch.cosine_similarity(before, after, dim=-1).min() > 0.9


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_begun_too_late_to_measure_it_says_so(tmp_path, stop):
    fit(tmp_path, Blocks(), *callbacks()[:2], Stop(stop)).save_checkpoint(tmp_path / "last.ckpt")
    if stop < 2:  # one of its two steps is left
        mine = callbacks()
        fit(tmp_path, Blocks(), *mine, ckpt_path=tmp_path / "last.ckpt")
        assert [*mine[2].state_dict()["found"]] == ["blocks.0.down"]
        return
    with pytest.raises(TaperlitError, match="came after step 2, up to which it measures; begin anew with it"):
        fit(tmp_path, Blocks(), *callbacks(), ckpt_path=tmp_path / "last.ckpt")


def test_nothing_massive_changes_nothing(tmp_path):
    model = Blocks(planted=False)
    before = state_of(model)
    fit(tmp_path, model, *callbacks())
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items() if "down" in name)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 7])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, stop):
    whole, part, rest = Blocks(lr=1e-6), Blocks(lr=1e-6), Blocks(lr=1e-6, seed=3)
    fit(tmp_path, whole, *callbacks(), RngState())
    fit(tmp_path, part, *callbacks(), RngState(), Stop(stop)).save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, rest, *callbacks(), RngState(), ckpt_path=tmp_path / "last.ckpt")
    assert same(state_of(whole), state_of(rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_factors_of_nearly_1_come_to_what_was_asked(dtype):
    name, units, factor = "blocks.0.down", [3, 20], 0.04
    # As checkpoints from before the remainders were kept have it.
    begun = {"seen": {}, "found": {name: (tuple(units), 100.0, factor)}, "applied": 2, "steps": (2, 1002)}

    def go(model, state, steps):
        callback = ShrinkMassive()
        callback.load_state_dict(state)
        for step in steps:
            callback.on_train_batch_start(SimpleNamespace(global_step=step), model)
        return callback.state_dict()

    def weights():
        model = Blocks(planted=False).to(dtype)
        return model, model.columns(0).detach()

    (whole, columns), (part, again), (_, expected) = weights(), weights(), weights()
    original = expected[:, units].float()
    go(whole, begun, range(2, 1004))
    torch.testing.assert_close(columns[:, units].float(), original * factor, rtol=0.01, atol=0)
    go(part, go(part, begun, range(2, 517)), range(517, 1004))  # resumed
    assert torch.equal(again, columns)
    for _ in range(1000):
        expected[:, units] *= factor ** (1 / 1000)
    assert torch.equal(expected, columns) == (dtype == torch.float32)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_fast_dev_run_shrinks_in_its_second_step(tmp_path, steps):
    model = Blocks()
    fit(tmp_path, model, *callbacks(), fast_dev_run=steps)
    shrunk = model.columns(0)[:, 3].norm() < 0.5 * Blocks().columns(0)[:, 3].norm()
    assert shrunk == (steps > 1)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match=r"ShrinkMassive\.multiple is 0\.5"):
        ShrinkMassive(multiple=0.5)
    with pytest.raises(TaperlitError, match="ends at step 2 and begins after step 2; raise end"):
        fit(tmp_path, Blocks(), *callbacks(end=0.2))
    with pytest.raises(TaperlitError, match=r"ends at step 7, and the gate begins to fall after step 6: lower"):
        fit(tmp_path, Blocks(), *callbacks(end=7))
    frozen = Blocks()
    frozen.blocks[0].down.weight.requires_grad_(False)
    with pytest.raises(TaperlitError, match=r"of blocks\.0\.down, which are sharded or not trained"):
        fit(tmp_path, frozen, *callbacks())
    without = Blocks()
    for block in without.blocks:
        block.up, block.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with pytest.raises(TaperlitError, match="finds no linear map from more than 8 inputs to 8 outputs"):
        fit(tmp_path, without, *callbacks())
    fit(tmp_path, part := Blocks(), *callbacks()[:2], Stop(8)).save_checkpoint(tmp_path / "last.ckpt")
    assert next(iter(tapered_norms(part).values())).gate.value < 1
    with pytest.raises(TaperlitError, match="a gate that is below 1 already"):
        fit(tmp_path, Blocks(), *callbacks(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, two = Blocks(), Blocks()
    fit(tmp_path, one, *callbacks())
    fit(tmp_path, two, *callbacks(), **on_two())
    # The median of two halves' medians is not the whole's, so the factors differ by that.
    ratio = (two.columns(0)[0, [3, 20]] / one.columns(0)[0, [3, 20]]).detach()
    torch.testing.assert_close(ratio[0], ratio[1])
    assert 0.7 < ratio[0] < 1.4
    torch.testing.assert_close(two.columns(1), one.columns(1))
