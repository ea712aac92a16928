"""c follows its statistics while the gate falls, and the linear branch begins with the optimizer's moments."""

import itertools

import lightning as L
import pytest
import torch
from processes import on_two
from sequences import Sequences
from torch import nn
from toy import Moments, Stop, Toy, fit, rows, same, scalars, state_of

from taperlit import AlignmentFreeze, FirstPosition, GateSchedule, ScaleAnchor, taper
from taperlit.callbacks import FiniteGuard
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.schedule import gate_at

WARMUP, END = 4, 9


class Rows(Toy):
    """Its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160], batch_idx)


class Scalars(L.Callback):
    """The c of every norm in every forward pass."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(scalars(pl_module))


def last_tracked(track):
    """The first step at ``track`` or below."""
    return next(k for k in range(1, 99) if gate_at(k, WARMUP, END) <= track)


@pytest.mark.parametrize("track", [0.99, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("order", [False, True])
def test_every_step_uses_the_c_of_the_formula(tmp_path, track, centred, accumulate, order):
    model = Toy(nn.LayerNorm if centred else nn.RMSNorm)
    moments, seen = Moments(), Scalars()
    pair = [GateSchedule(WARMUP, END), AlignmentFreeze(ema_rate=0.3, track=track)]
    fit(tmp_path, model, *(pair[::-1] if order else pair), moments, seen, accumulate_grad_batches=accumulate)
    for k in range(WARMUP + 1, 13):
        count = min(k - 1, last_tracked(track)) if k > WARMUP + 1 else WARMUP
        if gate_at(count, WARMUP, END) == 0.0:
            count -= 1  # nothing is gathered in the linear phase
        expected = moments.scalars(0.3, [range(accumulate * i, accumulate * (i + 1)) for i in range(count)])
        for micro in range(accumulate):
            assert seen.seen[accumulate * (k - 1) + micro] == pytest.approx(expected, rel=1e-5)
    assert not any(norm.tracks for norm in tapered_norms(model).values())
    assert all(norm.frozen for norm in tapered_norms(model).values())


def test_without_it_nothing_is_gathered_in_the_taper(tmp_path):
    counts = []

    class Look(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            counts.append([norm.pending[2].item() for norm in tapered_norms(pl_module).values()])

    fit(tmp_path, Toy(), GateSchedule(WARMUP, END), AlignmentFreeze(), Look())
    assert counts == [[1.0, 1.0]] * WARMUP + [[0.0, 0.0]] * 8


@pytest.mark.parametrize("after", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("options", [{"track": 0.3}, {"track": 0.3, "moments": True}, {"moments": True}])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after, options):
    def callbacks():
        freeze = AlignmentFreeze(ema_rate=0.3, **options)
        return [freeze, GateSchedule(WARMUP, END), ScaleAnchor("head"), FiniteGuard(skip=True)]

    whole, first, second = Rows(), Rows(), Rows()
    fit(tmp_path, whole, *callbacks())
    fit(tmp_path, first, *callbacks(), Stop(after)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *callbacks(), ckpt_path=tmp_path / "mid.ckpt")
    assert first.gates + second.gates == whole.gates
    assert same(state_of(whole), state_of(second))


def test_a_run_that_tracks_does_not_stop_it_unasked(tmp_path):
    def go(model, freeze, *more, **options):
        return fit(tmp_path, model, GateSchedule(WARMUP, END), freeze, *more, **options)

    go(Rows(), AlignmentFreeze(track=0.1), Stop(6)).save_checkpoint(tmp_path / "mid.ckpt")
    with pytest.raises(
        TaperlitError, match="still tracks its alignment scalars; give AlignmentFreeze a track"
    ) as error:
        go(Rows(), AlignmentFreeze(), ckpt_path=tmp_path / "mid.ckpt")
    assert "\n" not in str(error.value)
    model, seen = Rows(), Scalars()
    go(model, AlignmentFreeze(track=0.99), seen, ckpt_path=tmp_path / "mid.ckpt")  # as it says
    assert seen.seen[0] != seen.seen[1]
    assert all(a == b for a, b in itertools.pairwise(seen.seen[1:]))


def test_a_step_that_is_not_finite_does_not_count(tmp_path):
    class Bad(Rows):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx + 1 == 6 else loss

    model, moments = Bad(), Moments()
    fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(ema_rate=0.3, track=0.1), FiniteGuard(skip=True),
        moments)  # fmt: skip
    expected = moments.scalars(0.3, [[i] for i in range(last_tracked(0.1)) if i != 5 and i < END - 1])
    assert scalars(model) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_norm_gathers_in_the_blend_what_it_gathers_at_gate_1(compiled):
    for kind in (nn.RMSNorm, nn.LayerNorm):
        norms = [taper_one(kind) for _ in range(2)]
        called = [torch.compile(norm, backend="aot_eager") if compiled else norm for norm in norms]
        norms[1].gate.set(0.3)
        h = torch.randn(2, 5, 16) * 3
        called[0](h)
        called[1](h)
        assert norms[1].pending[2] == 0
        norms[1].tracks = True
        called[1](h)
        assert norms[1].pending[2] == 1
        torch.testing.assert_close(norms[1].pending, norms[0].pending, rtol=1e-6, atol=0)
        norms[1].gate.set(0.0)
        called[1](h)
        assert norms[1].pending[2] == 1


def taper_one(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(16, eps=1e-5))
    nn.init.normal_(model[0].weight)
    taper(model)
    return model[0]


def test_the_first_positions_scalar_follows_too(tmp_path):
    """Both scalars are those of the tokens that each is for, over all steps of the tracking."""
    model, moments = Sequences(), {name: [] for name in ("layers.0.norm", "layers.1.norm")}

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            for name, norm in tapered_norms(pl_module).items():
                norm.register_forward_pre_hook(lambda norm, args, name=name: self.look(name, norm, args[0]))

        def look(self, name, norm, h):
            if norm.training:
                h = h.detach().double()
                r = (h.square().mean(-1) + (norm.kind.eps or torch.finfo(torch.float32).eps)).sqrt()
                w = (h * norm.weight.detach().double()).square().sum(-1)
                parts = [torch.stack(((w / r)[:, s].mean(), w[:, s].mean())) for s in (slice(0, 1), slice(1, None))]
                moments[name].append(torch.stack(parts))

    fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(ema_rate=0.3, track=0.2), FirstPosition(11), Look())
    for name, norm in tapered_norms(model).items():
        ema = torch.zeros(2, 2, dtype=torch.float64)
        for one in moments[name][: last_tracked(0.2)]:
            ema = ema.lerp(one, 0.3)
        first, rest = (ema[:, 0] / ema[:, 1]).tolist()
        assert norm.first_alignment.item() == pytest.approx(first, rel=1e-5)
        assert norm.alignment.item() == pytest.approx(rest, rel=1e-5)


@pytest.mark.parametrize("track", [1.0, -0.1, 1.5])
def test_a_track_out_of_range_is_refused(track):
    with pytest.raises(TaperlitError, match=r"track is .*at least 0 and below 1"):
        AlignmentFreeze(track=track)


# ---- moments at the boundary


class Peek(L.Callback):
    """The optimizer's state of the gains and of their copies, as step ``at`` begins."""

    def __init__(self, at):
        self.at = at

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step + 1 == self.at:
            state = trainer.optimizers[0].state
            self.pairs = [
                ({k: v.clone() for k, v in state[own].items()}, {k: v.clone() for k, v in state.get(twin, {}).items()})
                for norm in tapered_norms(pl_module).values()
                for own, twin in ((norm.weight, norm.taper_weight), (norm.own("bias"), norm.taper_bias))
                if own is not None
            ]


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_linear_branch_begins_with_the_moments_of_the_norm(tmp_path, norm):
    runs = {}
    for moments in (False, True):
        peek, model = Peek(WARMUP + 1), Toy(norm)
        fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(moments=moments), peek)
        runs[moments] = peek.pairs, state_of(model)
    assert all(twin == {} for _, twin in runs[False][0])
    for own, twin in runs[True][0]:
        assert own.keys() == twin.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(own[key], twin[key]) for key in own)
        assert own["step"] == WARMUP
    # and the first step with them is AdamW's with these moments
    assert not same(runs[False][1], runs[True][1])


def test_the_first_step_is_that_of_adamw_with_these_moments(tmp_path):
    model, peek, steps = Toy(), Peek(WARMUP + 1), {}

    class Grab(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == WARMUP:
                twin = pl_module.layers[0].norm.taper_weight
                steps["before"], steps["grad"] = twin.detach().double().clone(), twin.grad.double().clone()

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == WARMUP + 1:
                steps["after"] = pl_module.layers[0].norm.taper_weight.detach().double().clone()

    fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(moments=True), peek, Grab())
    state, grad, k = peek.pairs[0][1], steps["grad"], WARMUP + 1
    m = 0.9 * state["exp_avg"].double() + 0.1 * grad
    v = 0.999 * state["exp_avg_sq"].double() + 0.001 * grad.square()
    step = m / (1 - 0.9**k) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    expected = steps["before"] * (1 - 1e-2 * 0.1) - 1e-2 * step
    torch.testing.assert_close(steps["after"], expected, rtol=1e-5, atol=1e-6)


def test_optimizers_without_such_moments_are_refused_before_the_first_step(tmp_path):
    class Plain(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model = Plain()
    with pytest.raises(TaperlitError, match="knows the moments of torch's Adam and AdamW, not those of SGD") as error:
        fit(tmp_path, model, GateSchedule(WARMUP, END), AlignmentFreeze(moments=True))
    assert "\n" not in str(error.value)
    assert model.gates == []


def test_a_gain_without_moments_is_named(tmp_path):
    class Skips(Toy):
        def on_before_optimizer_step(self, optimizer):
            self.layers[1].norm.weight.grad = None

    with pytest.raises(TaperlitError, match=r"AdamW has no moments of layers\.1\.norm\.weight that"):
        fit(tmp_path, Skips(), GateSchedule(WARMUP, END), AlignmentFreeze(moments=True))


def test_a_gain_that_is_not_trained_needs_no_moments(tmp_path):
    class Fixed(Toy):
        def __init__(self):
            super().__init__(tapered=False)
            for layer in self.layers:
                layer.norm.weight.requires_grad_(False)
            taper(self)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    fit(tmp_path, Fixed(), GateSchedule(WARMUP, END), AlignmentFreeze(moments=True))


class Dealt(Toy):
    """Every process has its share of each batch of 8."""

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_track_as_one(tmp_path, accumulate):
    one, two = Dealt(), Dealt()

    def callbacks():
        return [GateSchedule(WARMUP, END), AlignmentFreeze(ema_rate=0.3, track=0.1, moments=True)]

    options = {"accumulate_grad_batches": accumulate}
    fit(tmp_path, one, *callbacks(), **options)
    fit(tmp_path, two, *callbacks(), **options, **on_two())
    assert scalars(two) == pytest.approx(scalars(one), rel=1e-5)
    for name, value in state_of(one).items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
