"""The gate waits and goes back when training leaves its band, and is closed in time all the same."""

import math
import re
import statistics

import lightning as L
import pytest
import torch
from processes import on_two
from toy import Stop, Toy, fit, rows, same, state_of

from taperlit import AlignmentFreeze, FirstPosition, GateHold, GateSchedule, ScaleAnchor, taper
from taperlit.callbacks import FiniteGuard
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms
from taperlit.schedule import gate_at

WARMUP, END, STEPS = 12, 24, 38


def schedule(*delays):
    """The gate of every step by the method's formula, given the delay at which each of them is."""
    return [gate_at(k + 1 - delay, WARMUP, END) for k, delay in enumerate(delays)]


class Shaken(Toy):
    """Some steps' batches have one row that is many times as large, or the whole batch is not a number."""

    def __init__(self, at=(), times=1e3, lr=1e-3, accumulate=1):
        super().__init__(lr=lr)
        self.at, self.times, self.accumulate = at, times, accumulate

    def training_step(self, batch, batch_idx):
        batch = rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160]  # a resumed run's loader begins anew
        if batch_idx // self.accumulate + 1 in self.at:
            batch = torch.cat((batch[:1] * self.times, batch[1:]))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows().repeat(2, 1), batch_size=4)


def run(tmp_path, model, *callbacks, hold=None, steps=STEPS, guard=True, **options):
    hold = GateHold(window=8, band=60, far=1e30, back=4) if hold is None else hold
    guards = [FiniteGuard(skip=True)] if guard else []
    kept = fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(), hold, *guards, *callbacks, steps=steps,
               **options)  # fmt: skip
    return kept, hold


def test_a_calm_run_is_as_without(tmp_path):
    model, plain = Shaken(), Shaken()
    _, hold = run(tmp_path, model)
    fit(tmp_path, plain, GateSchedule(WARMUP, END), AlignmentFreeze(), FiniteGuard(skip=True), steps=STEPS)
    assert hold.events == []
    assert model.gates == plain.gates == pytest.approx(schedule(*[0] * STEPS))
    assert same(state_of(model), state_of(plain))
    assert all(norm.peak is None for norm in tapered_norms(model).values())


def test_a_step_out_of_the_band_lets_the_gate_wait(tmp_path):
    model = Shaken(at={16, 20})
    _, hold = run(tmp_path, model)
    assert model.gates == pytest.approx(schedule(*[0] * 16, *[1] * 4, *[2] * 18))
    assert [(e["step"], e["what"], e["delay"]) for e in hold.events] == [
        (16, "waits", 1), (17, "goes on", 1), (20, "waits", 2), (21, "goes on", 2),
    ]  # fmt: skip
    assert hold.events[0]["why"].startswith(("the loss is", "the gradient norm is"))


def test_what_stays_out_sends_the_gate_back(tmp_path):
    model = Shaken(at={17, 18, 19})
    _, hold = run(tmp_path, model)
    # waits after 17 and 18; after 19 (at clock 17) it goes back by 4
    assert model.gates == pytest.approx(schedule(*[0] * 17, 1, 2, *[20 - 13] * 19))
    assert [e["what"] for e in hold.events] == ["waits", "goes back", "goes on"]


def test_what_is_far_out_sends_the_gate_back_at_once(tmp_path):
    model = Shaken(at={18})
    _, hold = run(tmp_path, model, hold=GateHold(window=8, band=60, far=1e3, back=4))
    assert model.gates == pytest.approx(schedule(*[0] * 18, *[5] * 20))
    assert [e["what"] for e in hold.events] == ["goes back", "goes on"]


@pytest.mark.parametrize("at", [14, 20])
def test_a_step_that_is_not_finite_sends_the_gate_back_but_not_to_1(tmp_path, at):
    model = Shaken(at={at}, times=math.nan)
    kept, hold = run(tmp_path, model)
    clock = max(WARMUP + 1, at - 4)
    delay = at + 1 - clock
    assert model.gates == pytest.approx(schedule(*[0] * at, *[delay] * (STEPS - at)))
    assert all(g < 1 for g in model.gates[WARMUP:])
    assert hold.events[0]["why"] == "the step is not finite"
    assert all(value.isfinite().all() for value in state_of(model).values())
    assert [callback.skipped for callback in kept.callbacks if isinstance(callback, FiniteGuard)] == [1]


class Spoilt(Shaken):
    """The loss is finite and its gradients are not."""

    def on_after_backward(self):
        pass

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.head.bias * 0).sqrt().sum() if batch_idx + 1 in self.at else loss


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_a_guard_left_out_counts_as_not_finite_in_any_order(tmp_path, first):
    model, hold, guard = (
        Spoilt(at={18}, times=1.0),
        GateHold(window=8, band=60, far=1e30, back=4),
        FiniteGuard(skip=True),
    )
    pair = [hold, guard] if first else [guard, hold]
    fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(), *pair, steps=STEPS)
    assert guard.skipped == 1
    assert model.gates == pytest.approx(schedule(*[0] * 18, *[5] * (STEPS - 18)))


def test_without_skipping_the_guard_stops_the_run_as_before(tmp_path):
    with pytest.raises(TaperlitError, match=r"step 18 .*the loss is not finite"):
        run(tmp_path, Shaken(at={18}, times=math.nan), FiniteGuard(), guard=False)


def test_no_step_is_no_bad_step(tmp_path):
    class Nothing(Shaken):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx + 1 == 18 else loss

    model = Nothing()
    _, hold = run(tmp_path, model)
    assert hold.events == []


@pytest.mark.parametrize("times", [1e3, math.nan])
def test_the_gate_is_closed_in_time_whatever_happens(tmp_path, times):
    model = Shaken(at=set(range(WARMUP + 1, STEPS, 2)), times=times)
    hold = GateHold(window=8, band=1, far=1e30, back=4, latest=30)
    run(tmp_path, model, hold=hold)
    assert model.gates[28] > 0  # at step 29
    assert set(model.gates[29:]) == {0.0}
    assert all(e["delay"] <= 6 for e in hold.events)
    assert "may no more" in "".join(e["why"] for e in hold.events)
    assert shared_gate(model).value == 0


def test_a_token_that_grows_is_seen_where_loss_and_gradients_are_calm(tmp_path):
    class Quiet(Shaken):
        def loss(self, x):
            return super().loss(x[1:])  # the row is in the batch, and in no loss

        def training_step(self, batch, batch_idx):
            self.layers(self.embed(rows()[:20]))
            if batch_idx + 1 == 18:
                self.layers(self.embed(rows()[:20] * torch.tensor([30.0] + [1.0] * 19)[:, None]))
            return super().training_step(batch, batch_idx)

    model = Quiet()
    hold = GateHold(window=8, band=20, far=1e30, back=4)
    run(tmp_path, model, hold=hold)
    assert [e["step"] for e in hold.events] == [18, 19]
    assert re.match(r"the largest token at layers\.\d\.norm, over the mean, is", hold.events[0]["why"])


class Signals(L.Callback):
    """Loss, gradient norm and largest over mean scale per step, in float64 and by torch's plainest means."""

    def __init__(self):
        self.rows, self.scales = [], {}

    def on_fit_start(self, trainer, pl_module):
        for name, norm in tapered_norms(pl_module).items():
            norm.register_forward_pre_hook(lambda norm, args, name=name: self.look(name, norm, args[0]))

    def look(self, name, norm, h):
        if norm.training:
            h = h.detach().double()
            r = [(row - (row.mean() if norm.centred else 0)).square().mean().sqrt().item() for row in h.flatten(0, -2)]
            self.scales.setdefault(name, []).extend(r)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = [p.grad.double().square().sum().item() for p in pl_module.parameters() if p.grad is not None]
        self.gradient = math.sqrt(sum(squares))

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        ratios = (max(r) / statistics.fmean(r) for r in self.scales.values())
        self.rows.append((outputs["loss"].item(), self.gradient, *ratios))
        self.scales.clear()


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_the_bands_are_those_of_the_formula(tmp_path, norm):
    signals, hold = Signals(), GateHold(window=9, band=2, far=1e30, patience=100, latest=STEPS)
    model = Toy(norm)
    fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(), hold, signals, steps=STEPS)
    delay, delays = 0, []
    for k, row in enumerate(signals.rows):
        delays.append(delay)
        out = False
        for value, *past in zip(row, *signals.rows[max(0, k - 9) : k], strict=True):
            if len(past) >= 5:
                past = sorted(past)
                middle = past[(len(past) - 1) // 2]  # torch's median: the lower of two
                spread = sorted(abs(v - middle) for v in past)[(len(past) - 1) // 2]
                out |= value > middle + 2 * max(spread, 0.01 * abs(middle))
        if out and WARMUP < k + 1 - delay < END:
            delay = min(delay + 1, STEPS - END)
    assert 1 < delay < STEPS - END
    assert model.gates == pytest.approx(schedule(*delays))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_of_one_step_share_a_gate_and_a_judgement(tmp_path, accumulate):
    model = Shaken(at={17, 18, 19}, accumulate=accumulate)
    hold = GateHold(window=8, band=60, far=1e30, back=4, latest=26)
    run(tmp_path, model, hold=hold, steps=26, accumulate_grad_batches=accumulate)
    gates = schedule(*[0] * 17, 1, *[2] * 8)
    assert model.gates == pytest.approx([g for g in gates for _ in range(accumulate)])
    assert [e["step"] for e in hold.events] == [17, 19, 20]


@pytest.mark.parametrize("after", [10, 18, 19, 25])
@pytest.mark.parametrize("times", [1e3, math.nan])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after, times):
    def callbacks():
        hold = GateHold(window=8, band=60, far=1e30, back=4)
        anchor = ScaleAnchor("head")
        return [GateSchedule(WARMUP, END), AlignmentFreeze(), hold, anchor, FiniteGuard(skip=True)]

    shaken = {"at": {17, 18, 19}, "times": times}
    whole, first, second = Shaken(**shaken), Shaken(**shaken), Shaken(**shaken)
    expected = callbacks()
    fit(tmp_path, whole, *expected, steps=STEPS)
    fit(tmp_path, first, *callbacks(), Stop(after), steps=STEPS).save_checkpoint(tmp_path / "mid.ckpt")
    resumed = callbacks()
    fit(tmp_path, second, *resumed, steps=STEPS, ckpt_path=tmp_path / "mid.ckpt")
    assert first.gates + second.gates == whole.gates
    assert same(state_of(whole), state_of(second))
    assert resumed[2].events == expected[2].events


def test_the_delay_outlives_the_one_who_made_it(tmp_path):
    """Resumed without it, the gate does not jump to where the schedule would have been."""
    first, second = Shaken(at={16}), Shaken()
    run(tmp_path, first, Stop(18))[0].save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, GateSchedule(WARMUP, END), AlignmentFreeze(), steps=STEPS, ckpt_path=tmp_path / "mid.ckpt")
    assert second.gates == pytest.approx(schedule(*[1] * STEPS)[18:])


def test_the_delay_is_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    run(tmp_path, Shaken(at={16}), logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("taper/delay")
    delays = [float(line.split(",")[column]) for line in lines[1:]]
    assert delays == [0.0] * 16 + [1.0] * 22


def test_lbfgs_and_fast_dev_run_are_borne(tmp_path):
    class Searches(Shaken):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    run(tmp_path, Searches(), hold=GateHold(window=8, band=1e9, far=1e9))
    model = Shaken(at={2})
    run(tmp_path, model, fast_dev_run=5)
    assert (model.gates[0], model.gates[-1]) == (1.0, 0.0)


class ByHand(Shaken):
    """Two optimizers that step in every batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        norms = [p for n, p in self.named_parameters() if "layers" in n]
        rest = [p for n, p in self.named_parameters() if "layers" not in n]
        return [torch.optim.AdamW(norms, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


def test_with_manual_optimization_a_batch_is_held_as_a_whole(tmp_path):
    model = ByHand(at={10})
    _, hold = run(tmp_path, model, steps=40)
    assert hold.events[0]["step"] == 20
    expected = [gate_at(2 * k + 1 - (2 if k >= 10 else 0), WARMUP, END) for k in range(20)]
    assert model.gates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"band": 0}, "band is 0; it must be above 0"),
        ({"band": 200}, "far is 100.0; it must be at least 200"),
        ({"window": 3}, "window is 3; it must be at least 4"),
        ({"patience": 0}, "patience is 0; it must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(TaperlitError, match=words):
        GateHold(**options)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([AlignmentFreeze(at=3), GateHold()], "GateHold without GateSchedule has no gate to hold: add"),
        ([GateSchedule(3, 9), AlignmentFreeze(), GateHold(latest=8)], "latest is step 8, before step 9"),
        ([GateSchedule(3, 9), AlignmentFreeze(), GateHold(latest=13)], "latest is 13 steps, longer than the run"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, callbacks, words):
    model = Toy()
    with pytest.raises(TaperlitError, match=words):
        fit(tmp_path, model, *callbacks)
    assert model.gates == []
    assert all(norm.peak is None for norm in tapered_norms(model).values())


class Sequences(Toy):
    """The same on (B, 1, 4) batches, whose first position is all there is; for what is refused before a step."""


def test_the_first_position_must_end_after_the_latest_close(tmp_path):
    with pytest.raises(
        TaperlitError, match="FirstPosition ends at step 10, not after the gate, which closes at step 11"
    ):
        fit(tmp_path, Sequences(), GateSchedule(3, 9), AlignmentFreeze(), GateHold(latest=11), FirstPosition(10))


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(TaperlitError, match="GateHold found no TaperNorm"):
        fit(tmp_path, Toy(tapered=False), GateHold())


@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_peak_of_a_norm_tells_the_largest_token_and_the_mean(kind, compiled):
    model = torch.nn.Sequential(kind(16))
    taper(model)
    norm = model[0]
    called = torch.compile(norm, backend="aot_eager") if compiled else norm
    h = torch.randn(2, 5, 16) * torch.rand(2, 5, 1)
    called(h)
    assert norm.peak is None
    norm.peak = torch.zeros(3)
    scales = torch.zeros(0)
    for value in (h, 3 * h, h.square()):
        called(value)
        value = value.double() - (value.double().mean(-1, keepdim=True) if norm.centred else 0)
        scales = torch.cat((scales, value.square().mean(-1).sqrt().flatten()))
        largest, total, count = norm.peak.tolist()
        assert count == len(scales)
        assert largest / (total / count) == pytest.approx((scales.max() / scales.mean()).item(), rel=1e-5)
    norm.peak.zero_()
    norm.eval()(h)
    called(h * float("nan"))
    assert norm.peak.tolist() == [0, 0, 0]
    norm.train()(h * float("nan"))
    assert norm.peak[0].isnan()


class ShakenOnOne(Shaken):
    """Only the second process sees the large row."""

    def training_step(self, batch, batch_idx):
        at, self.at = self.at, self.at if self.global_rank == 1 else ()
        loss = super().training_step(batch, batch_idx)
        self.at = at
        return loss


class Kept(L.Callback):
    def on_train_end(self, trainer, pl_module):
        (hold,) = (callback for callback in trainer.callbacks if isinstance(callback, GateHold))
        torch.save([pl_module.gates, hold.events], f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1e3, math.nan])
def test_what_one_process_sees_holds_the_gate_of_both(tmp_path, times):
    run(tmp_path, ShakenOnOne(at={17, 18, 19}, times=times), Kept(), **on_two())
    (gates, events), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [gates, events] == other
    expected = [17, 19, 20] if times == 1e3 else [17, 18, 19, 20]
    assert [event["step"] for event in events] == expected
    assert gates[-1] == 0
