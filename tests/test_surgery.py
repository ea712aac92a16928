import copy
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from taperlit.errors import TaperlitError
from taperlit.norm import Phase, TaperLayerNorm, TaperNorm, TaperRMSNorm, shared_gate, tapered_norms, update_alignment
from taperlit.surgery import known_norms, missing_gains, require_tapered, separate_first, taper


class Block(nn.Module):
    def __init__(self, norm: nn.Module, d: int) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(d, d)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


def mixed(d: int = 8, seed: int = 0) -> nn.Sequential:
    """Blocks with norms of torch's and transformers' classes, with gains that are not 1."""
    torch.manual_seed(seed)
    kinds = (nn.LayerNorm(d), nn.RMSNorm(d), LlamaRMSNorm(d), GemmaRMSNorm(d), OlmoLayerNorm(d))
    model = nn.Sequential(*(Block(kind, d) for kind in kinds))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


MIXED = [f"{i}.norm" for i in range(5)]


def inputs(d: int = 8) -> torch.Tensor:
    return torch.randn(4, 3, d, generator=torch.Generator().manual_seed(3))


def align(model: nn.Module) -> None:
    """A warm-up step and the boundary."""
    model.train()(inputs()).sum().backward()
    model.zero_grad()
    update_alignment(tapered_norms(model).values())
    for norm in tapered_norms(model).values():
        norm.freeze()


# Which norms


@pytest.mark.parametrize("norm_first", [True, False])
def test_taper_by_patterns_keeps_the_rest(norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    with torch.enable_grad():
        before, parameters = model(x), dict(model.named_parameters())
    names = taper(model, ["layers.*"])
    assert names == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2"]
    assert list(tapered_norms(model)) == names
    assert type(model.norm) is nn.LayerNorm
    assert torch.equal(model(x), before)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert not any(module.training for module in model.modules())


def test_taper_both_kinds_with_their_options():
    model = nn.Sequential(
        nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)
    )
    taper(model)
    assert [type(m) for m in model[:3]] == [TaperRMSNorm, TaperLayerNorm, TaperLayerNorm]
    assert model[0].eps == 1e-3
    assert model[1].bias is None
    assert model[2].weight is None


def test_one_pattern_may_be_a_string():
    model = mixed()
    assert taper(model, "2.*") == ["2.norm"]


class Home(nn.Module):
    """A norm as people write it."""

    def __init__(self, shape, eps, centred, offset, bias, low, declared):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape)) if bias else None
        self.centred, self.offset, self.low, self.hidden = centred, offset, low, (eps,)
        if declared:
            setattr(self, declared, eps)

    def forward(self, x):
        dtype = x.dtype
        h = x.float() if self.low else x
        dims = tuple(range(-self.weight.ndim, 0))
        if self.centred:
            h = h - h.mean(dims, keepdim=True)
        h = h * torch.rsqrt(h.square().mean(dims, keepdim=True) + self.hidden[0])
        h = h * (self.offset + self.weight)
        return (h if self.bias is None else h + self.bias).to(dtype)


class HomeNorm(Home):
    pass


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(4,), (16,), (96,), (3, 8)]),
    exponent=st.floats(-7.5, -2),
    centred=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    bias=st.booleans(),
    low=st.booleans(),
    declared=st.sampled_from([None, "eps", "variance_epsilon"]),
    g=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_home_made_norm_is_read_right(shape, exponent, centred, offset, bias, low, declared, g, seed):
    torch.manual_seed(seed)
    eps = 10**exponent
    norm = HomeNorm(shape, eps, centred, offset, bias, low, declared).double()
    model = nn.Sequential(norm)
    x = (torch.randn(7, *shape, dtype=torch.float64) + 0.4) * (3 * eps) ** 0.5
    before = model(x)
    assert taper(model) == ["0"]
    assert torch.equal(model(x), before)
    assert (norm.centred, norm.gain_offset) == (centred, offset)
    assert norm.kind.eps == pytest.approx(eps, rel=2e-2)
    align_once = model.train()(x)
    assert torch.equal(align_once, before)
    update_alignment([norm])
    norm.freeze()
    dims = tuple(range(-len(shape), 0))
    h = x - x.mean(dims, keepdim=True) if centred else x
    gain = offset + norm.weight.detach()
    energy = (h * gain).square().sum(dims)
    r = (h.square().mean(dims) + eps).sqrt()
    assert norm.alignment.item() == pytest.approx((energy / r).sum().item() / energy.sum().item(), rel=1e-2)
    with torch.no_grad():
        norm.taper_weight.add_(0.5)
    norm.gate.set(g)
    linear = norm.alignment.double() * h * (gain + 0.5) + (norm.bias.detach() if bias else 0)
    weight = norm.gate.value.double()
    expected = weight * before + (1 - weight) * linear
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


class AbsGainNorm(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class ExpGainNorm(nn.RMSNorm):
    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.exp(), self.eps)


class UnbiasedNorm(nn.LayerNorm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) * self.weight + self.bias


class LengthNorm(nn.RMSNorm):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * self.weight


class OneGainNorm(nn.Module):
    """Nguyen and Salazar's ScaleNorm: of one feature it would be an RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 8.0))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * self.weight


class BroadcastNorm(nn.Module):
    """Its gains have more axes than its statistic."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, d))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class GatedNorm(nn.RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class ResidualNorm(nn.RMSNorm):
    def forward(self, x, residual=None):
        return super().forward(x if residual is None else x + residual)


class PairNorm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x), x


class ScaledNorm(nn.RMSNorm):
    def __init__(self, d):
        super().__init__(d)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


class FirstTokenNorm(nn.RMSNorm):
    """The statistic is the first token's."""

    def forward(self, x):
        return x / (x[:, :1].square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class DroppedNorm(nn.RMSNorm):
    def __init__(self, d):
        super().__init__(d)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(super().forward(x))


class Exponential(nn.Module):
    def forward(self, w):
        return w.exp()


def parametrized() -> nn.Module:
    norm = nn.LayerNorm(8)
    nn.utils.parametrize.register_parametrization(norm, "weight", Exponential())
    return norm


def replaced() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x
    return norm


class UnreadNorm(nn.Module):
    """A buffer of ones that forward does not read, as FalconMamba has."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("weight", torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


STRANGERS = {
    "batch": (lambda: nn.BatchNorm1d(8), "one token's"),
    "group": (lambda: nn.GroupNorm(2, 8), "one token's"),
    "instance": (lambda: nn.InstanceNorm1d(8), "one token's"),
    "replaced": (replaced, "replaced on the instance"),
    "absolute": (lambda: AbsGainNorm(8), "neither"),
    "exponential": (lambda: ExpGainNorm(8), "neither"),
    "unbiased": (lambda: UnbiasedNorm(8), "neither"),
    "length": (lambda: LengthNorm(8), "neither"),
    "one gain": (OneGainNorm, "how many features"),
    "broadcast": (lambda: BroadcastNorm(8), "how many features"),
    "gated": (lambda: GatedNorm(8), "more than one tensor"),
    "residual": (lambda: ResidualNorm(8), "more than one tensor"),
    "pair": (lambda: PairNorm(8), "not one tensor"),
    "scaled": (lambda: ScaledNorm(8), "scale"),
    "first": (lambda: FirstTokenNorm(8), "neither"),
    "dropped": (lambda: DroppedNorm(8), "dropout"),
    "parametrized": (parametrized, "parametrizations"),
    "unread": (lambda: UnreadNorm(8), "neither"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_norm_of_ours_is_listed_by_name(stranger):
    make, reason = STRANGERS[stranger]
    model = nn.ModuleDict({stranger: make(), "ours": nn.LayerNorm(8)})
    kind = type(model[stranger])
    with pytest.warns(UserWarning, match=rf"not tapered: {stranger} \({kind.__name__}.*{reason}") as caught:
        assert taper(model) == ["ours"]
    assert len(caught) == 1
    assert type(model[stranger]) is kind
    alone = nn.ModuleDict({stranger: make()})
    own = type(alone[stranger])
    with pytest.raises(TaperlitError, match=rf"{stranger} \({kind.__name__}.*{reason}"):
        taper(alone)
    assert type(alone[stranger]) is own


def test_strangers_outside_the_patterns_are_not_spoken_of():
    model = nn.ModuleDict({"batch": nn.BatchNorm1d(8), "ours": nn.LayerNorm(8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taper(model, ["ours"]) == ["ours"]


def test_taper_says_when_nothing_matches():
    with pytest.raises(TaperlitError, match=r"\['heads\.\*'\].*2\.norm"):
        taper(mixed(), ["heads.*"])
    with pytest.raises(TaperlitError, match=r"Linear"):
        require_tapered(nn.Linear(2, 2), "a test")


# What stays


def test_a_norm_with_two_names_is_one_norm():
    model = mixed()
    model.twice = model[2].norm
    assert taper(model) == MIXED
    assert model.twice is model[2].norm
    assert isinstance(model.twice, TaperNorm)
    by_second = mixed()
    by_second.twice = by_second[2].norm
    assert len(taper(by_second, ["twice"])) == 1
    assert by_second.twice is by_second[2].norm
    assert isinstance(by_second[2].norm, TaperNorm)
    assert len(tapered_norms(by_second)) == 1


def test_the_instance_and_its_class_stay():
    model = mixed()
    before = [block.norm for block in model]
    classes = [type(norm) for norm in before]
    taper(model)
    assert all(block.norm is norm for block, norm in zip(model, before, strict=True))
    assert all(isinstance(norm, cls) for norm, cls in zip(before, classes, strict=True))
    assert all(isinstance(norm, TaperNorm) for norm in before)
    assert type(nn.LayerNorm(8)) is nn.LayerNorm  # the classes themselves are untouched
    assert LlamaRMSNorm(8)(inputs()).shape == (4, 3, 8)


@pytest.mark.parametrize("g", [1.0, 0.3, 0.0])
def test_hooks_survive_and_do_not_see_the_probing(g):
    model = mixed()
    calls = []
    for i, block in enumerate(model):
        block.norm.register_forward_pre_hook(lambda m, args, i=i: calls.append((i, "before")))
        block.norm.register_forward_hook(lambda m, args, out, i=i: calls.append((i, "after")))
        block.norm.register_full_backward_hook(lambda m, gi, go, i=i: calls.append((i, "backward")))
    model[1].norm.register_forward_hook(lambda m, args, out: 2 * out)
    taper(model)
    assert not calls
    shared_gate(model).set(g)
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert sorted(calls) == sorted((i, when) for i in range(5) for when in ("before", "after", "backward"))
    plain = mixed()
    plain[1].norm.register_forward_hook(lambda m, args, out: 2 * out)
    if g == 1:
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_and_mode_survive(training):
    model = mixed().train(training)
    model[1].norm.requires_grad_(False)
    model[0].norm.bias.requires_grad_(False)
    taper(model)
    assert all(module.training == training for module in model.modules())
    assert not model[1].norm.weight.requires_grad
    assert not model[1].norm.taper_weight.requires_grad
    assert not model[0].norm.taper_bias.requires_grad
    assert model[0].norm.taper_weight.requires_grad


def test_the_state_dict_has_one_gate():
    model = mixed()
    plain = set(model.state_dict())
    taper(model)
    state = model.state_dict()
    assert plain <= set(state)
    assert [key for key in state if "gate" in key] == ["0.norm.gate.value"]
    other = mixed(seed=1)
    taper(other)
    shared_gate(model).set(0.25)
    other.load_state_dict(model.state_dict())
    assert shared_gate(other).value.item() == 0.25
    assert shared_gate(other).phase is Phase.BLEND


# Copies


@pytest.mark.parametrize("g", [1.0, 0.3, 0.0])
def test_deepcopy_is_a_model_of_its_own(g):
    model = mixed()
    taper(model)
    align(model)
    shared_gate(model).set(g)
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    x = inputs()
    assert torch.equal(twin.eval()(x), model.eval()(x))
    assert shared_gate(twin) is not shared_gate(model)
    shared_gate(twin).set(0.6)
    assert shared_gate(model).value.item() == pytest.approx(g)
    with torch.no_grad():
        twin[2].norm.taper_weight.add_(1.0)
        twin[2].norm.weight.add_(1.0)
    assert not torch.equal(twin(x), model(x))


CHILD = """
import sys, torch
loaded = torch.load(sys.argv[1], weights_only=False)
from taperlit.norm import shared_gate, tapered_norms
model = loaded["model"]
out = {"y": model(loaded["x"]), "names": list(tapered_norms(model)), "phase": shared_gate(model).phase.value}
out["classes"] = [cls.__name__ for cls in map(type, tapered_norms(model).values())]
shared_gate(model).set(1.0)
out["open"] = model(loaded["x"])
model.train()(loaded["x"]).sum().backward()
out["pending"] = [norm.pending for norm in tapered_norms(model).values()]
torch.save(out, sys.argv[2])
"""


def test_a_pickled_model_runs_in_a_process_that_never_tapered(tmp_path, monkeypatch):
    monkeypatch.setattr(Block, "__module__", "blocks")  # importable in the child, unlike a test's module
    (tmp_path / "blocks.py").write_text(
        "from torch import nn\n\n\nclass Block(nn.Module):\n"
        "    def forward(self, x):\n        return x + self.linear(self.norm(x)).tanh()\n"
    )
    monkeypatch.setitem(sys.modules, "blocks", sys.modules[__name__])
    model = mixed()
    taper(model)
    align(model)
    model.eval()
    x = inputs()
    expected_open = model(x)
    shared_gate(model).set(0.3)
    torch.save({"model": model, "x": x}, tmp_path / "model.pt")
    subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")], cwd=tmp_path, check=True
    )
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["y"], model(x))
    assert torch.equal(out["open"], expected_open)
    assert out["names"] == MIXED
    assert out["classes"] == [type(norm).__name__ for norm in tapered_norms(model).values()]
    assert out["phase"] == "blend"
    assert all(pending[2] == 1 and pending[0] > 0 for pending in out["pending"])


def followed(model: nn.Module, copied: nn.Module) -> None:
    """The copy computes what its own gate's value says, held against a fresh model with its weights and that value."""
    value = shared_gate(copied).value.item()
    assert shared_gate(copied).phase is {1.0: Phase.NORMALIZE, 0.0: Phase.LINEAR}.get(value, Phase.BLEND)
    fresh = mixed()
    taper(fresh)
    fresh.load_state_dict(copied.state_dict())
    shared_gate(fresh).set(value)
    x = inputs()
    assert torch.equal(copied.eval()(x), fresh.eval()(x))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_the_phase_follows_weight_averaging(use_buffers, kind):
    model = mixed()
    taper(model)
    average = get_ema_multi_avg_fn(0.5) if kind == "ema" else None
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    align(model)
    for g in (1.0, 0.5, 0.0, 0.0):
        shared_gate(model).set(g)
        averaged.update_parameters(model)
        followed(model, averaged.module)
    if not use_buffers:
        assert shared_gate(averaged.module).phase is Phase.LINEAR
        x = inputs()
        assert torch.equal(averaged.module.eval()(x), averaged.module(x))


def test_the_phase_follows_every_way_of_writing_the_value():
    model = mixed()
    taper(model)
    gate = shared_gate(model)
    followers = [copy.deepcopy(model) for _ in range(4)]
    gate.set(0.0)
    followers[0].load_state_dict(model.state_dict())
    followers[1].load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        for mine, theirs in zip(followers[2].buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
    for mine, theirs in zip(followers[3].buffers(), model.buffers(), strict=True):
        mine.data = theirs.data.clone()
    for follower in followers:
        assert shared_gate(follower).phase is Phase.LINEAR
        followed(model, follower)
    with torch.inference_mode():
        gate.value.copy_(torch.tensor(1.0))
    assert gate.phase is Phase.NORMALIZE
    gate.value.mul_(0.5)
    assert gate.phase is Phase.BLEND


# A second taper


def test_a_second_taper_adds_to_the_first_while_the_gate_is_open():
    model = mixed()
    assert taper(model, ["0.*", "2.*"]) == ["0.norm", "2.norm"]
    align(model)
    c = model[2].norm.alignment.item()
    gate = shared_gate(model)
    assert taper(model) == ["1.norm", "3.norm", "4.norm"]
    assert shared_gate(model) is gate
    assert model[2].norm.alignment.item() == c != 1.0
    assert model[2].norm.frozen
    assert taper(model) == []


@pytest.mark.parametrize("g", [0.4, 0.0])
def test_a_second_taper_never_moves_the_gate(g):
    model = mixed()
    taper(model, ["0.*", "2.*"])
    align(model)
    shared_gate(model).set(g)
    x = inputs()
    before = model.eval()(x)
    assert taper(model, ["0.*", "2.*"]) == []
    with pytest.raises(TaperlitError, match=rf"{g:g}.*1\.norm"):
        taper(model)
    assert list(tapered_norms(model)) == ["0.norm", "2.norm"]
    assert shared_gate(model).value.item() == pytest.approx(g)
    assert torch.equal(model(x), before)


# Optimizers that exist


def groups(model: nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}]


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(inputs()).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_new_gains_join_the_group_of_the_norms_own():
    model = mixed()
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    for _ in range(2):
        step(model, optimizer)
        scheduler.step()
    held = [list(group["params"]) for group in optimizer.param_groups]
    state = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    assert len(taper(model, optimizers=optimizer)) == 5
    twins = [p for name, p in model.named_parameters() if "taper_" in name]
    assert len(twins) == 5  # three gains of RMSNorms, gain and bias of a LayerNorm
    now = [group["params"] for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(now[0], held[0], strict=True))
    assert {id(p) for p in now[1]} == {id(p) for p in held[1]} | {id(p) for p in twins}
    assert len(now[1]) == len(held[1]) + len(twins)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in state.items())
    assert missing_gains(model, [optimizer]) == []
    align(model)
    shared_gate(model).set(0.5)
    before = [p.detach().clone() for p in twins]
    step(model, optimizer)
    scheduler.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, twins, strict=True))
    # AdamW's first step moves each entry by the learning rate of its own group
    moved = [(a - b).abs().max().item() for a, b in zip(before, twins, strict=True)]
    assert moved == pytest.approx([0.02 / 3] * len(twins), rel=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 / 4, 0.02 / 4])
    again = torch.optim.AdamW([{"params": list(group["params"])} for group in optimizer.param_groups])
    again.load_state_dict(optimizer.state_dict())
    assert taper(model, optimizers=optimizer) == []
    assert len({id(p) for p in now[1]}) == len(now[1])


def test_each_of_several_optimizers_gets_its_own_norms_gains():
    model = mixed()
    first = torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(model[3:].parameters(), lr=0.1)
    step(model, first, second)
    taper(model, optimizers=[first, second])
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (first, second)]
    for i, block in enumerate(model):
        for twin in (block.norm.taper_weight, block.norm.taper_bias):
            assert twin is None or [id(twin) in ids for ids in held] == [i < 3, i >= 3]
    assert missing_gains(model, [first, second]) == []
    step(model, first, second)


def test_missing_gains_are_named():
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taper(model)
    expected = ["0.norm.taper_weight", "0.norm.taper_bias", *(f"{i}.norm.taper_weight" for i in (1, 2, 3))]
    assert sorted(missing_gains(model, [optimizer])) == sorted(expected)
    assert missing_gains(model, [torch.optim.SGD(model.parameters(), lr=0.1)]) == []
    only_heads = torch.optim.SGD(model[4].linear.parameters(), lr=0.1)
    assert missing_gains(model, [only_heads]) == []


def test_the_advice_for_missing_gains_works():
    """An optimizer that was built before taper is given to a second call."""
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taper(model)
    assert taper(model, optimizers=optimizer) == []
    assert missing_gains(model, [optimizer]) == []
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    taper(model, optimizers=optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held


def test_frozen_norms_miss_nothing():
    model = mixed()
    for block in model:
        block.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taper(model, optimizers=optimizer)
    assert missing_gains(model, [optimizer]) == []
    assert len(optimizer.param_groups[0]["params"]) == len(list(mixed().parameters()))


class Rms(nn.Module):
    """A norm whose class is not called one."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def test_a_norm_by_what_it_computes_and_not_by_its_name():
    class OwnRMSNorm(nn.RMSNorm):
        pass

    model = nn.Sequential(Rms(8), nn.PReLU(8), OwnRMSNorm(8), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nn.PReLU has gains too, and is nobody's norm
        assert taper(model) == ["0", "2"]
    assert model[0].kind.eps == 1e-5
    assert model[2].kind.eps is None  # the input's dtype decides, as in torch


# A first position apart


def test_a_separate_first_position_in_norms_of_every_class():
    model, plain = mixed(), mixed()
    taper(model)
    separate_first(model)
    separate_first(model)  # nothing more
    align(model)
    taper(plain)
    align(plain)
    norms, gate = tapered_norms(model), shared_gate(model)
    for name, norm in norms.items():
        assert norm.label == name
        assert norm.first_alignment != norm.alignment
        assert not torch.equal(norm.alignment, tapered_norms(plain)[name].alignment)
    gate.set(0.0)
    gate.set_first(0.25)
    model.eval()
    h = inputs()
    with torch.no_grad():
        for i, norm in enumerate(norms.values()):
            gain, bias = norm.linear_map()
            x = h.double() - (h.double().mean(-1, keepdim=True) if norm.centred else 0)
            first = (norm.first_alignment.double() / norm.alignment.double()) ** 0.25
            scale = torch.tensor([first, 1, 1]).view(3, 1)
            expected = x * gain * scale + (0 if bias is None else bias)
            torch.testing.assert_close(norm(h).double(), expected, rtol=1e-5, atol=1e-6)
            h = model[i](h)


def test_a_first_position_is_separated_while_the_gate_is_open():
    model = mixed()
    taper(model, ["0.norm"])
    separate_first(model)
    taper(model)  # joins
    assert all(norm.first_alignment is not None for norm in tapered_norms(model).values())
    late = mixed()
    taper(late)
    align(late)
    shared_gate(late).set(0.5)
    with pytest.raises(TaperlitError, match=r"The gate is 0\.5 and 0\.norm has one scalar for all positions already"):
        separate_first(late)
    late.load_state_dict(model.state_dict())  # its gate is open
    separate_first(late)
    with pytest.raises(TaperlitError, match="call taperlit"):
        separate_first(mixed())


def test_known_norms_are_what_taper_takes():
    model = mixed()
    kinds = known_norms(model)
    assert taper(model) == list(kinds) == MIXED
    assert known_norms(model) == kinds == {name: norm.kind for name, norm in tapered_norms(model).items()}
