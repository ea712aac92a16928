"""The taper begins when the alignment scalars have settled, and whoever freezes something then waits for it."""

import itertools
import math

import lightning as L
import pytest
import torch
from processes import on_two
from toy import Moments, Stop, Toy, fit, rows, same, scalars, state_of

from taperlit import AlignmentFreeze, FirstPosition, GateHold, GateSchedule, ScaleAnchor, ShrinkMassive
from taperlit.callbacks.drift import Drift
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms
from taperlit.schedule import gate_at

LEAST, LATEST, END, STEPS = 4, 20, 24, 30
AUTO = {"least": LEAST, "latest": LATEST}


class Rows(Toy):
    """Its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160], batch_idx)


def callbacks(settle, **options):
    return [AlignmentFreeze(ema_rate=0.2), ScaleAnchor("head", ema_rate=0.2),
            GateSchedule("auto", END, settle=settle, **AUTO, **options)]  # fmt: skip


def drifts(moments, rate, steps):
    """The largest smoothed relative change of any c, after every step, by the definition in float64."""
    names, result, means, before, weight = list(moments.batches[0]), [], None, None, 0.0
    for k in range(1, steps + 1):
        c = moments.scalars(rate, [[i] for i in range(k)])
        if before is not None:
            change = [math.log(c[name] / before[name]) for name in names]
            means = [0.9 * m + 0.1 * d for m, d in zip(means or [0.0] * len(names), change, strict=True)]
            weight = 0.9 * weight + 0.1
        result.append(math.inf if means is None else max(abs(m / weight) for m in means))
        before = c
    return result


def decided(settle, sizes):
    return next(k for k, d in enumerate(sizes, 1) if (k >= LEAST and d <= settle) or k >= LATEST)


@pytest.mark.parametrize("settle", [1e9, 0.04, 0.02, 1e-9])
@pytest.mark.parametrize("order", [1, -1])
def test_it_begins_at_the_first_step_at_which_no_scalar_drifts(tmp_path, settle, order):
    model, moments = Rows(), Moments()
    used = callbacks(settle)
    fit(tmp_path, model, *used[::order], moments, steps=STEPS)
    warmup = decided(settle, drifts(moments, 0.2, LATEST))
    assert {1e9: warmup == LEAST, 1e-9: warmup == LATEST}.get(settle, LEAST < warmup < LATEST)
    assert model.gates == pytest.approx([gate_at(k, warmup, END) for k in range(1, STEPS + 1)])
    steps = [[k] for k in range(warmup)]
    assert scalars(model) == pytest.approx(moments.scalars(0.2, steps), rel=1e-5)
    assert used[1].target.item() == pytest.approx(moments.target(0.2, steps), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("after", [2, 9, 10, 12, 13, 14])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after, accumulate):
    whole, first, second = Rows(), Rows(), Rows()
    options = {"steps": STEPS, "accumulate_grad_batches": accumulate}
    fit(tmp_path, whole, *callbacks(0.025), **options)
    assert 9 < sum(g == 1 for g in whole.gates) / accumulate < 14  # the checkpoints are on both sides of the boundary
    fit(tmp_path, first, *callbacks(0.025), Stop(after), **options).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *callbacks(0.025), **options, ckpt_path=tmp_path / "mid.ckpt")
    assert first.gates + second.gates == whole.gates
    assert same(state_of(whole), state_of(second))


def test_the_plan_knows_no_more_than_the_schedule(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(shared_gate(pl_module).plan.warmup)

    fit(tmp_path, model := Rows(), *callbacks(0.025), Look(), steps=STEPS)
    warmup = sum(g == 1 for g in model.gates)
    assert seen == [max(LEAST, min(k, warmup)) for k in range(1, STEPS + 1)]
    assert all(a <= b for a, b in itertools.pairwise(seen))


def test_the_decision_is_told_in_a_line(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, model := Rows(), *callbacks(0.025), steps=STEPS)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GateSchedule: ")]
    warmup = sum(g == 1 for g in model.gates)
    assert len(lines) == 1
    assert lines[0].startswith(
        f"GateSchedule: the gate begins to fall after step {warmup}, the alignment scalars drift"
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_fast_dev_run_goes_through_every_phase(tmp_path, steps):
    model = Toy()
    fit(tmp_path, model, *callbacks(0.025), fast_dev_run=steps)
    assert model.gates[0] == 1.0
    assert steps < 2 or model.gates[-1] == 0.0


def test_others_go_by_the_least_warm_up(tmp_path):
    with pytest.raises(TaperlitError, match="ShrinkMassive ends at step 6, and the gate begins to fall after step 4"):
        fit(tmp_path, Toy(), *callbacks(0.025), ShrinkMassive(end=6), steps=STEPS)
    with pytest.raises(TaperlitError, match="ShrinkMassive finds no linear map"):  # the boundary is right
        fit(tmp_path, Toy(), *callbacks(0.025), ShrinkMassive(end=4), steps=STEPS)
    with pytest.raises(TaperlitError, match=r"AlignmentFreeze.at is step 5, after the gate's warm-up of 4"):
        fit(tmp_path, Toy(), AlignmentFreeze(at=5), callbacks(0.025)[2], steps=STEPS)
    with pytest.raises(
        TaperlitError, match="FirstPosition ends at step 24, not after the gate, which closes at step 24"
    ):
        fit(tmp_path, Toy(), *callbacks(0.025), FirstPosition(24), steps=STEPS)


def test_with_a_hold_the_delay_counts_from_the_boundary_that_was_found(tmp_path):
    class Shaken(Rows):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (1e4 if batch_idx + 1 == 18 else 1)

    model = Shaken(lr=1e-3)
    hold = GateHold(window=8, band=60, far=1e30)
    fit(tmp_path, model, *callbacks(0.025), hold, steps=STEPS)
    warmup = sum(g == 1 for g in model.gates)
    assert warmup < 17
    delays = [0] * 18 + [1] * (STEPS - 18)
    assert model.gates == pytest.approx([gate_at(k - d, warmup, END) for k, d in enumerate(delays, 1)])


class ByHand(Rows):
    """Two optimizers that step in every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        layers = [p for n, p in self.named_parameters() if "layers" in n]
        rest = [p for n, p in self.named_parameters() if "layers" not in n]
        return [torch.optim.AdamW(layers, lr=self.lr), torch.optim.AdamW(rest, lr=self.lr)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


def test_with_manual_optimization_it_begins_between_batches(tmp_path):
    model, freeze = ByHand(), AlignmentFreeze(ema_rate=0.2)
    fit(tmp_path, model, GateSchedule("auto", 44, settle=0.02, least=8, latest=40), freeze, steps=50)
    ones = sum(g == 1 for g in model.gates)
    assert 4 <= ones <= 20
    assert model.gates == pytest.approx([gate_at(2 * k + 1, 2 * ones, 44) for k in range(25)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": "soon"}, "warmup is 'soon'; give steps, a fraction of the run, or auto"),
        ({"warmup": "auto", "settle": 0}, "settle is 0"),
    ],
)
def test_words_and_numbers_that_are_none_are_refused(options, words):
    with pytest.raises(TaperlitError, match=words):
        GateSchedule(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"least": 0.5, "latest": 5}, "takes 6 steps at least and 5 at most; raise latest"),
        ({"latest": 0.7, "end": 8}, "ends at step 8, not after its warm-up of 8; raise end"),
        ({"latest": 13, "end": 0.9}, "latest is 13 steps, longer than the run"),
        ({"least": 0}, "no steps before its boundary"),
    ],
)
def test_boundaries_that_make_no_sense_are_refused_before_the_first_step(tmp_path, options, words):
    model = Toy()
    with pytest.raises(TaperlitError, match=words):
        fit(tmp_path, model, GateSchedule("auto", **{"end": 10, **options}), AlignmentFreeze())
    assert model.gates == []


def test_scalars_that_nobody_moves_have_settled(tmp_path):
    model = Toy()
    fit(tmp_path, model, AlignmentFreeze(at=3), steps=4)
    before = scalars(model)
    model.gates.clear()
    fit(tmp_path, model, GateSchedule("auto", 9, least=3, latest=6))
    assert scalars(model) == before
    assert model.gates == pytest.approx([gate_at(k, 3, 9) for k in range(1, 13)])


def test_a_number_that_is_none_has_not_settled():
    drift = Drift()
    assert drift.largest == math.inf
    for value in (1.0, 1.0):
        drift.update(torch.tensor([value, 2.0]))
    assert drift.largest == 0
    drift.update(torch.tensor([math.nan, 2.0]))
    assert drift.largest == math.inf


class Dealt(Toy):
    """Every process has its share of each batch of 8; the second's are much larger."""

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


class Kept(L.Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.gates, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_begin_together_and_as_one(tmp_path):
    one, two = Dealt(), Dealt()
    options = {"steps": 20}

    def auto():
        return [AlignmentFreeze(ema_rate=0.2), GateSchedule("auto", 18, settle=0.02, least=4, latest=16)]

    fit(tmp_path, one, *auto(), **options)
    assert 4 < sum(g == 1 for g in one.gates) < 16
    fit(tmp_path, two, *auto(), Kept(), **options, **on_two())
    gates = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert gates[0] == gates[1] == one.gates
    assert scalars(two) == pytest.approx(scalars(one), rel=1e-5)
    assert all(norm.frozen for norm in tapered_norms(two).values())
