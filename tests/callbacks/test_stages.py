"""Norms with a gate of their own on a part of the global gate's way: layer, schedule, boundary, saving, folding."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from processes import on_two
from torch import nn
from toy import Moments, Stop, Toy, fit, rows, same, scalars, state_of

from taperlit import AlignmentFreeze, FirstPosition, FoldOnEnd, GateHold, GateSchedule, load_folded, taper
from taperlit.callbacks.stages import stages_of
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate, tapered_norms
from taperlit.schedule import gate_at
from taperlit.training.policy import apply_policy
from taperlit.transformer import Transformer, TransformerConfig

FIRST, SECOND = "layers.0.norm", "layers.1.norm"
WARMUP, END = 4, 10


class Rows(Toy):
    """Its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def training_step(self, batch, batch_idx):
        return super().training_step(rows()[torch.arange(4 * batch_idx, 4 * batch_idx + 4) % 160], batch_idx)


def one(kind=nn.RMSNorm, stage=None):
    torch.manual_seed(0)
    model = nn.Sequential(kind(16, eps=1e-5))
    nn.init.normal_(model[0].weight)
    taper(model)
    norm = model[0]
    norm.set_stage(stage)
    with torch.no_grad():
        norm.alignment.fill_(0.4)
        norm.taper_weight.add_(torch.randn(16) * 0.1)
    return norm


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("g", [1.0, 0.8, 0.75, 0.6, 0.5, 0.25, 0.1, 0.0])
def test_a_staged_norm_is_one_whose_gate_is_the_rescaled_one(kind, training, g):
    staged, plain = one(kind, (0.75, 0.25)).train(training), one(kind).train(training)
    own = min(1.0, max(0.0, (g - 0.25) / 0.5))
    staged.gate.set(g)
    plain.gate.set(own)
    x = torch.randn(3, 5, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(staged(a), plain(b), rtol=1e-5, atol=1e-6)
    for norm, h in ((staged, a), (plain, b)):
        norm(h).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert staged.phase is plain.phase
    assert [p.shape for p in staged.idle_parameters()] == [p.shape for p in plain.idle_parameters()]
    assert staged.own_gate.item() == pytest.approx(own, abs=1e-6)
    assert staged.own_gate_at(g) == pytest.approx(own, abs=1e-6)


def test_a_gate_that_others_write_is_followed():
    norm = one(stage=(0.75, 0.25))
    for g, phase in ((0.9, Phase.NORMALIZE), (0.5, Phase.BLEND), (0.2, Phase.LINEAR)):
        norm.gate.value.fill_(g)
        assert norm.phase is phase
    norm.separate_first()
    assert norm.phase is Phase.LINEAR_FIRST


@pytest.mark.slow
def test_compiled_code_follows_the_stage():
    norm, twin = one(stage=(0.75, 0.25)), one(stage=(0.75, 0.25))
    compiled = torch.compile(norm, backend="aot_eager")
    x = torch.randn(3, 5, 16)
    for g in (1.0, 0.8, 0.7, 0.6, 0.3, 0.2, 0.0, 0.6):
        norm.gate.set(g)
        twin.gate.set(g)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_follow_every_pair_of_phases():
    """Two stages in one graph, also where the gate goes back, to a pair of phases that was not compiled before."""
    compiled = language_model("internal").train()
    for name, norm in tapered_norms(compiled).items():
        norm.set_stage((1.0, 0.5) if "mlp" in name else (0.5, 0.0))
    eager = copy.deepcopy(compiled)
    for block in compiled.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    tokens = torch.randint(0, 50, (2, 16))
    # the phases of the norms before attention and the MLP: NN NB NL NB BL LL BL NB, tracked or not
    for g, tracks in zip((1, 0.9, 0.5, 0.7, 0.3, 0, 0.2, 0.6), (0, 1, 0, 0, 1, 0, 0, 0), strict=True):
        for model in (compiled, eager):
            shared_gate(model).set(g)
            for norm in tapered_norms(model).values():
                norm.tracks = bool(tracks)
            model.zero_grad()
            model(tokens).square().mean().backward()
        for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(
                a.grad, b.grad, rtol=1e-3, atol=1e-7, msg=lambda m, n=name, g=g: f"{n} at {g}: {m}"
            )


def test_the_stage_is_saved_copied_and_cast_with_the_norm():
    norm = one(stage=(0.7, 0.3))
    norm.gate.set(0.4)
    x = torch.randn(3, 5, 16)
    fresh = one()
    fresh.load_state_dict(norm.state_dict())
    for other in (fresh, copy.deepcopy(norm)):
        assert torch.equal(other(x), norm(x))
        other.gate.set(0.3)
        assert other.phase is Phase.LINEAR
    assert norm.phase is Phase.BLEND
    assert norm.to(torch.bfloat16).stage.dtype == torch.float32
    with torch.device("meta"):
        empty = nn.Sequential(nn.RMSNorm(16, eps=1e-5))
        taper(empty)
    empty[0].load_state_dict(norm.state_dict(), assign=True)
    assert empty[0].phase is Phase.BLEND
    norm.set_stage(None)
    assert "stage" not in norm.state_dict()


def test_without_stages_nothing_of_them_is_saved():
    assert not [key for key in Toy().state_dict() if "stage" in key]


@pytest.mark.parametrize("stage", [(0.5, 0.5), (0.2, 0.4), (1.1, 0.0), (1.0, -0.1)])
def test_a_stage_that_is_none_is_refused(stage):
    with pytest.raises(TaperlitError, match=r"must be 0 <= low < high <= 1"):
        one().set_stage(stage)


# ---- who falls when


def language_model(policy="all"):
    config = TransformerConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, d_model=16, d_ff=32)
    model = Transformer(config)
    apply_policy(model, policy)
    return model


def test_depth_is_block_by_block_and_the_final_norm_last():
    model = language_model()
    found = stages_of(model, tapered_norms(model), "depth")
    assert found == {
        "blocks.0.attn_norm": (1.0, pytest.approx(2 / 3)), "blocks.0.mlp_norm": (1.0, pytest.approx(2 / 3)),
        "blocks.1.attn_norm": (pytest.approx(2 / 3), pytest.approx(1 / 3)),
        "blocks.1.mlp_norm": (pytest.approx(2 / 3), pytest.approx(1 / 3)),
        "final_norm": (pytest.approx(1 / 3), 0.0),
    }  # fmt: skip


def test_kind_is_mlp_then_attention_then_final():
    for policy, parts in (("all", {"mlp": 3, "attn": 2, "final": 1}), ("internal", {"mlp": 2, "attn": 1})):
        model = language_model(policy)
        count = len(parts)
        for name, (high, low) in stages_of(model, tapered_norms(model), "kind").items():
            place = next(value for key, value in parts.items() if key in name)
            assert (high, low) == (pytest.approx(place / count), pytest.approx((place - 1) / count))


def test_patterns_count_in_their_order():
    model = language_model()
    found = stages_of(model, tapered_norms(model), {"*.0.mlp_norm": (0.9, 0.5), "*mlp_norm": [1.0, 0.4]})
    assert found["blocks.0.mlp_norm"] == (0.9, 0.5)
    assert found["blocks.1.mlp_norm"] == (1.0, 0.4)
    assert found["final_norm"] is None


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("kind", r"layers\.0\.norm is none of the attention, MLP and final norms"),
        ({"*attn*": (1.0, 0.5)}, r"'\*attn\*', which matches no tapered norm; they are layers\.0\.norm, "),
        ({"*": (0.5, 0.7)}, r"must be 0 <= low < high <= 1"),
    ],
)
def test_what_cannot_be_told_is_refused_before_the_first_step(tmp_path, stages, words):
    model = Toy()
    with pytest.raises(TaperlitError, match=words):
        fit(tmp_path, model, GateSchedule(WARMUP, END, stages=stages), AlignmentFreeze())
    assert model.gates == []


def test_a_word_that_is_none_and_names_without_numbers_are_refused():
    with pytest.raises(TaperlitError, match="stages is 'width'; choose depth or kind"):
        GateSchedule(stages="width")
    model = nn.Sequential()
    model.add_module("norm", nn.RMSNorm(8))
    taper(model)
    with pytest.raises(TaperlitError, match="no name of a norm has a block's number, such as norm;"):
        stages_of(model, tapered_norms(model), "depth")


# ---- in a run


class Watch(L.Callback):
    """Phase, gate, scalar and gain of every norm in every forward pass."""

    def __init__(self):
        self.seen = {FIRST: [], SECOND: []}

    def on_before_backward(self, trainer, pl_module, loss):
        for name, norm in tapered_norms(pl_module).items():
            one = norm.phase, norm.own_gate.item(), norm.alignment.item(), norm.taper_weight.detach().clone()
            self.seen[name].append((*one, norm.weight.detach().clone()))


def own(name, k):
    g = gate_at(k, WARMUP, END)
    high, low = {FIRST: (1.0, 0.5), SECOND: (0.5, 0.0)}[name]
    return min(1.0, max(0.0, (g - low) / (high - low)))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("track", [None, 0.4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_norm_has_its_boundary_where_its_own_gate_begins_to_fall(tmp_path, order, track, accumulate):
    model, watch, moments = Rows(), Watch(), Moments()
    pair = [AlignmentFreeze(ema_rate=0.3, track=track), GateSchedule(WARMUP, END, stages="depth")]
    fit(tmp_path, model, *pair[::order], watch, moments, accumulate_grad_batches=accumulate)
    for name in (FIRST, SECOND):
        last = max(k for k in range(1, 13) if own(name, k) == 1)  # of this norm's warm-up
        assert last == {FIRST: WARMUP, SECOND: 7}[name]
        for k in range(1, 13):
            for micro in range(accumulate):
                phase, g, c, twin, weight = watch.seen[name][accumulate * (k - 1) + micro]
                assert g == pytest.approx(own(name, k), abs=1e-6)
                expected = Phase.NORMALIZE if k <= last else Phase.BLEND if own(name, k) > 0 else Phase.LINEAR
                assert phase is expected
                if k == last + 1:
                    assert torch.equal(twin, weight)
                if k <= last:
                    assert c == 1
                    continue
                count = last
                if track is not None:
                    ends = next(i for i in range(last + 1, 13) if own(name, i) <= track)
                    count = max(last, min(k - 1, ends - (own(name, ends) == 0)))
                steps = [range(accumulate * i, accumulate * (i + 1)) for i in range(count)]
                assert c == pytest.approx(moments.scalars(0.3, steps)[name], rel=1e-5)
    assert shared_gate(model).phase is Phase.LINEAR


@pytest.mark.parametrize("after", [3, 5, 6, 7, 8, 9, 11])
@pytest.mark.parametrize("track", [None, 0.3])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, after, track):
    def callbacks():
        return [GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze(ema_rate=0.3, track=track, moments=True)]

    whole, first, second = Rows(), Rows(), Rows()
    fit(tmp_path, whole, *callbacks())
    fit(tmp_path, first, *callbacks(), Stop(after)).save_checkpoint(tmp_path / "mid.ckpt")
    fit(tmp_path, second, *callbacks(), ckpt_path=tmp_path / "mid.ckpt")
    assert first.gates + second.gates == whole.gates
    assert same(state_of(whole), state_of(second))


@pytest.mark.parametrize(("began", "goes_on"), [("depth", None), (None, "depth"), ("depth", {"*": (1.0, 0.5)})])
def test_a_run_goes_on_with_the_stages_it_began_with(tmp_path, began, goes_on):
    callbacks = [GateSchedule(WARMUP, END, stages=began), AlignmentFreeze()]
    fit(tmp_path, Rows(), *callbacks, Stop(6)).save_checkpoint(tmp_path / "mid.ckpt")
    with pytest.raises(TaperlitError, match=r"The run to resume has the stage .* for layers\.[01]\.norm") as error:
        fit(tmp_path, Rows(), GateSchedule(WARMUP, END, stages=goes_on), AlignmentFreeze(),
            ckpt_path=tmp_path / "mid.ckpt")  # fmt: skip
    assert "\n" not in str(error.value)


def test_a_staged_run_folds(tmp_path):
    model = Toy()
    fit(tmp_path, model, GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze(), FoldOnEnd(str(tmp_path / "out")))
    folded = load_folded(tmp_path / "out", build=lambda: Toy(tapered=False))
    with torch.no_grad():
        torch.testing.assert_close(folded(rows()), model.eval()(rows()), rtol=1e-5, atol=1e-6)


def test_one_stage_for_all_is_the_global_gate(tmp_path):
    plain, staged = Rows(), Rows()
    fit(tmp_path, plain, GateSchedule(WARMUP, END), AlignmentFreeze())
    fit(tmp_path, staged, GateSchedule(WARMUP, END, stages={"*": (1.0, 0.0)}), AlignmentFreeze())
    for name, value in state_of(plain).items():
        torch.testing.assert_close(staged.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_idle_parameters_of_each_norm_stay_as_they_are(tmp_path):
    watch = Watch()
    fit(tmp_path, Rows(), GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze(), watch)
    second = [weights for *_, weights, _ in watch.seen[SECOND]]
    assert all(torch.equal(value, second[0]) for value in second[:7])  # gamma~ at its own gate of 1
    first = [weight for *_, weight in watch.seen[FIRST]]
    assert all(torch.equal(value, first[6]) for value in first[6:])  # gamma at its own gate of 0
    assert not torch.equal(second[8], second[0])
    assert not torch.equal(first[5], first[6])


def test_what_does_not_go_together_is_refused(tmp_path):
    staged = GateSchedule(WARMUP, END, stages="depth")
    with pytest.raises(TaperlitError, match=r"layers\.0\.norm has a gate of its own and freezes where"):
        fit(tmp_path, Toy(), staged, AlignmentFreeze(at=3))
    with pytest.raises(
        TaperlitError, match=r"could set the stage of layers\.0\.norm; call set_stage\(\(1\.0, 0\.5\)\)"
    ):
        fit(tmp_path, Toy(), staged, AlignmentFreeze(), EMAWeightAveraging(decay=0.5))
    model = Toy()
    for name, stage in ((FIRST, (1.0, 0.5)), (SECOND, (0.5, 0.0))):  # as it says
        tapered_norms(model)[name].set_stage(stage)
    fit(tmp_path, model, GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze(), EMAWeightAveraging(decay=0.5))


def test_it_works_beside_the_first_position_a_hold_and_an_auto_warm_up(tmp_path):
    from sequences import Sequences

    class Shaken(Sequences):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx + 1 == 20 else 1)

    from taperlit.callbacks import FiniteGuard

    model, hold = Shaken(), GateHold(window=8, band=1e9, far=1e9, back=3, latest=30)
    schedule = GateSchedule("auto", 24, least=6, latest=10, stages="depth")
    fit(
        tmp_path, model, schedule, AlignmentFreeze(track=0.5), FirstPosition(34), hold, FiniteGuard(skip=True), steps=38
    )
    assert [event["step"] for event in hold.events] == [20, 21]
    assert all(norm.phase is Phase.LINEAR for norm in tapered_norms(model).values())
    assert all(math.isfinite(c) and c > 0 for c in scalars(model).values())


class Dealt(Toy):
    """Every process has its share of each batch of 8."""

    def train_dataloader(self):
        share = rows()[self.global_rank :: self.trainer.world_size]
        return torch.utils.data.DataLoader(share, batch_size=8 // self.trainer.world_size)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, two = Dealt(), Dealt()

    def callbacks():
        return [GateSchedule(WARMUP, END, stages="depth"), AlignmentFreeze(ema_rate=0.3)]

    fit(tmp_path, one, *callbacks())
    fit(tmp_path, two, *callbacks(), **on_two())
    assert scalars(two) == pytest.approx(scalars(one), rel=1e-5)
    state = {key: value for key, value in state_of(one).items() if not key.endswith(".stage")}
    for name, value in state.items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-4, atol=1e-5)
