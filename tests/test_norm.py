import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from taperlit import surgery
from taperlit.errors import TaperlitError
from taperlit.norm import (
    AlignmentFit,
    Gate,
    Phase,
    TaperLayerNorm,
    TaperRMSNorm,
    set_alignment_fit,
    share_gate,
    shared_gate,
    update_alignment,
)

KINDS = [(TaperRMSNorm, nn.RMSNorm), (TaperLayerNorm, nn.LayerNorm)]
kinds = pytest.mark.parametrize(("taper", "plain"), KINDS)


def tapered_foreign(width):
    model = nn.Sequential(nn.LayerNorm(width))
    surgery.taper(model)
    return model[0]


def randomize(norm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return norm


def reference(norm, x, g, c):
    """The method page's equations, in float64 and in terms of numpy-like primitives only."""
    x = x.detach().double()
    d = x.shape[-1]
    gamma, gamma_t = norm.weight.detach().double(), norm.taper_weight.detach().double()
    if isinstance(norm, nn.LayerNorm):
        beta, beta_t = norm.bias.detach().double(), norm.taper_bias.detach().double()
        h = x - x.sum(-1, keepdim=True) / d
        s = torch.sqrt((h * h).sum(-1, keepdim=True) / d + norm.eps)
        return g * (h / s * gamma + beta) + (1 - g) * (c * h * gamma_t + beta_t)
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    r = torch.sqrt((x * x).sum(-1, keepdim=True) / d + eps)
    return g * (x / r * gamma) + (1 - g) * c * x * gamma_t


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(2, 40),
    exponent=st.floats(-4, 4),
    g=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.001, 0.999)),
    c=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_phase_is_the_papers_formula(kind, shape, width, exponent, g, c, dtype, seed):
    norm = randomize(kind[0](width, eps=1e-6), seed)
    norm.gate.set(g)
    norm.alignment.fill_(c)
    c = norm.alignment.item()
    x = (torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)) * 10**exponent).to(dtype)
    y = norm(x)
    expected = reference(norm, x, norm.gate.value.item(), c)
    # Where the weights' dtype is another, torch's own RMSNorm has returned either in its time.
    assert y.dtype == dtype or (g == 1.0 and y.dtype == kind[1](width)(x).dtype)
    assert y.shape == x.shape
    # Centring cancels: its error is relative to the token's largest entry, and the two branches may cancel as well.
    size = expected.abs().max() + (1 - g) * c * x.double().abs().max() * 2 + (g * 4 if g else 0)
    error = (y.double() - expected).abs().max() / size
    assert error < (3e-6 if dtype == torch.float32 else 3e-2)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_normalize_is_the_torch_norm_bit_for_bit(taper, plain, dtype, autocast):
    torch.manual_seed(0)
    theirs = randomize(plain(48, dtype=dtype))
    ours = taper(48, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    a = torch.randn(7, 5, 48).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    seed = torch.randn(7, 5, 48).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ya, yb = ours(a), theirs(b)
    assert torch.equal(ya, yb)
    ya.backward(seed)
    yb.backward(seed)
    assert torch.equal(a.grad, b.grad)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name].grad, parameter.grad)


@kinds
def test_takes_torchs_constructor_words_and_state(taper, plain):
    for words in ({}, {"elementwise_affine": False}, {"eps": 1e-3}, {"dtype": torch.float64}):
        theirs, ours = plain((3, 8), **words), taper((3, 8), **words)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 3, 8, dtype=words.get("dtype"))
        assert torch.equal(ours(x), theirs(x))
        for g in (0.5, 0.0):
            ours.gate.set(g)
            assert ours(x).shape == x.shape
    assert TaperLayerNorm(8, bias=False).taper_bias is None


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@kinds
@pytest.mark.parametrize("training", [False, True])
def test_linear_computes_no_statistic(taper, plain, training):
    norm = taper(16).train(training)
    norm.gate.set(0)
    x = torch.randn(2, 16)
    with CountOps() as count:
        norm(x)
    names = {name.rstrip("_") for name in count.names}
    assert names <= {"mul", "add", "sub", "mean", "view", "alias", "_to_copy"}, names
    assert ("mean" in names) == (taper is TaperLayerNorm)  # its linear centring
    assert count.names.count("mean") <= 1
    norm.gate.set(0.5)
    with CountOps() as count:
        norm(torch.randn(2, 16))
    assert {"rsqrt", "native_layer_norm", "_fused_rms_norm"} & {*count.names}  # and the counter does see a statistic


@kinds
def test_blend_statistics_are_float32_under_autocast(taper, plain):
    norm = randomize(taper(64))
    norm.gate.set(0.5)
    x = torch.randn(32, 64) + 30  # in bfloat16 the variance of such numbers is lost
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y.double(), reference(norm, x, 0.5, 1.0), rtol=1e-4, atol=1e-4)


@kinds
def test_alignment_is_the_least_squares_fit(taper, plain):
    torch.manual_seed(1)
    norm = randomize(taper(24))
    x = torch.randn(500, 24) * torch.rand(500, 1).mul(3).exp()
    norm(x)
    update_alignment([norm])
    weight, bias = norm.weight.detach().clone(), getattr(norm, "bias", None)
    norm.freeze()
    with torch.no_grad():
        target = nn.Module.__call__(norm, x).double() - (0 if bias is None else bias.double())
        h = x.double() - (x.double().mean(-1, keepdim=True) if norm.centred else 0)
        scaled = h * weight.double()

        def error(c):
            return (target - c * scaled).square().sum().item()

        best = (target * scaled).sum() / scaled.square().sum()
    c = norm.alignment.item()
    assert c == pytest.approx(best.item(), rel=1e-5)
    assert error(c) < min(error(c * 1.01), error(c * 0.99))
    assert torch.equal(norm.taper_weight, norm.weight)
    if bias is not None:
        assert torch.equal(norm.taper_bias, norm.bias)


def test_moments_are_bias_corrected_averages_over_steps_not_micro_batches():
    norm = TaperRMSNorm(8, eps=0.0)
    torch.manual_seed(0)
    numerator = denominator = weight = 0.0
    for step in range(7):
        parts = [torch.randn(5, 8) * (step + 1) for _ in range(3)]
        for part in parts:
            norm(part)
        update_alignment([norm], ema_rate=0.1)
        x = torch.cat(parts).double()
        energy = x.square().sum(-1)
        r = x.square().mean(-1).sqrt()
        numerator = 0.9 * numerator + 0.1 * (energy / r).mean().item()
        denominator = 0.9 * denominator + 0.1 * energy.mean().item()
        weight = 0.9 * weight + 0.1
        assert norm.alignment_moments.tolist() == pytest.approx([numerator / weight, denominator / weight], rel=1e-5)
    before = norm.alignment_ema.clone()
    update_alignment([norm], ema_rate=0.1)  # nothing pending: nothing moves
    assert torch.equal(norm.alignment_ema, before)
    norm.pending.copy_(torch.tensor([float("nan"), 1.0, 1.0]))  # nor does a batch that is not finite move anything
    update_alignment([norm], ema_rate=0.1)
    assert torch.equal(norm.alignment_ema, before)
    assert norm.pending.tolist() == [0, 0, 0]


def test_statistics_come_from_training_at_gate_one_only():
    norm = TaperRMSNorm(8)
    norm.eval()
    norm(torch.randn(2, 8))
    norm.train()
    with torch.no_grad():
        norm(torch.randn(2, 8))
    norm.gate.set(0.5)
    norm(torch.randn(2, 8))
    assert norm.pending.tolist() == [0, 0, 0]
    with pytest.raises(TaperlitError, match="No alignment scalar"):
        norm.freeze()


def test_freeze_refuses_inputs_that_are_all_zero():
    norm = TaperRMSNorm(8)
    norm(torch.zeros(2, 8))
    update_alignment([norm])
    with pytest.raises(TaperlitError, match="No alignment scalar"):
        norm.freeze()


@kinds
def test_float32_state_survives_a_cast(taper, plain):
    norm = taper(8)
    norm.alignment.fill_(1.2345678)
    norm.gate.set(0.7654321)
    norm.alignment_ema.fill_(1.2345678)
    norm.to(torch.bfloat16)
    assert norm.weight.dtype == torch.bfloat16
    for tensor, value in (
        (norm.alignment, 1.2345678),
        (norm.alignment_ema[0], 1.2345678),
        (norm.gate.value, 0.7654321),
    ):
        assert tensor.dtype == torch.float32
        assert tensor.item() == torch.tensor(value).item()
    assert norm.pending.dtype == torch.float32


@pytest.mark.parametrize("taper", [TaperRMSNorm, TaperLayerNorm, tapered_foreign])
def test_a_started_process_gathers_for_itself(taper):
    """What torch hands to a process that it starts lies in memory that both write to, but for the statistics."""
    norm = taper(8)
    norm.separate_first()
    norm.peak = torch.zeros(3)
    there = pickle.loads(ForkingPickler.dumps(norm))
    for name in ("pending", "first_pending", "peak"):
        getattr(there, name).add_(1)
        assert not getattr(norm, name).any()
    there.weight.data.mul_(3)
    assert (norm.weight == 3).all()  # such is the memory: this test could see it


@kinds
def test_meta_device_then_real(taper, plain):
    with torch.device("meta"):
        norm = taper(8)
    norm.to_empty(device="cpu")
    norm.reset_parameters()
    x = torch.randn(2, 8)
    assert torch.equal(norm(x), plain(8)(x))
    assert norm.pending[2] == 1


@kinds
def test_saved_state_restores_the_phase(taper, plain):
    for g, phase in ((1.0, Phase.NORMALIZE), (0.3, Phase.BLEND), (0.0, Phase.LINEAR)):
        norm = randomize(taper(8))
        norm.gate.set(g)
        other = taper(8)
        other.load_state_dict(norm.state_dict())
        assert other.gate.phase is phase
        x = torch.randn(2, 8)
        assert torch.equal(other(x), norm(x))


def test_a_borrowed_gate_is_shared_saved_once_and_copied_with_its_model():
    model = nn.Module()
    model.norms = nn.ModuleList(TaperRMSNorm(4) for _ in range(3))
    share_gate(model)
    assert [key for key in model.state_dict() if "gate" in key] == ["norms.0.gate.value"]
    assert TaperRMSNorm(4, gate=model.norms[0].gate).gate is model.norms[2].gate
    clone = copy.deepcopy(model).to(torch.float64)
    shared_gate(clone).set(0.0)
    assert all(norm.gate.phase is Phase.LINEAR for norm in clone.norms)
    assert shared_gate(model).phase is Phase.NORMALIZE
    model.norms.append(TaperRMSNorm(4))
    with pytest.raises(TaperlitError, match=r"norms\.2 and norms\.3 have separate gates"):
        shared_gate(model)


@pytest.mark.parametrize("g", [-0.1, 1.1, float("nan")])
def test_gate_refuses_what_is_not_between_0_and_1(g):
    with pytest.raises(TaperlitError, match="between 0 and 1"):
        Gate().set(g)


@pytest.mark.parametrize("g", [1.0, 0.5, 0.0])
@kinds
def test_idle_parameters_get_a_zero_gradient_and_the_others_a_real_one(taper, plain, g):
    norm = randomize(taper(8))
    norm.gate.set(g)
    norm(torch.randn(3, 8)).square().sum().backward()
    idle = set(norm.idle_parameters())
    assert len(idle) == {1.0: 1, 0.5: 0, 0.0: 1}[g] * (2 if taper is TaperLayerNorm else 1)
    for parameter in norm.parameters():
        assert (parameter.grad.abs().sum() == 0) == (parameter in idle)


@kinds
def test_one_graph_a_phase_while_the_gate_moves(taper, plain):
    torch._dynamo.reset()
    counter = CompileCounter()
    norm = taper(8)
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for g in (1.0, 1.0, 1.0, 0.9, 0.6, 0.31, 0.05, 0.0, 0.0, 0.0):
        norm.gate.set(g)
        compiled(torch.randn(4, 8)).sum().backward()
    assert counter.frame_count == 3


@pytest.mark.parametrize("stage", [None, (1.0, 0.5)])
def test_compiled_code_follows_a_state_dict(stage):
    torch._dynamo.reset()
    counter = CompileCounter()
    states, x = [], torch.randn(4, 8)
    for g in (0.0, 0.9, 0.8, 1.0):
        norm = randomize(TaperRMSNorm(8), seed=1)
        norm.set_stage(stage)
        norm.gate.set(g)
        states.append((norm, copy.deepcopy(norm.state_dict())))
    loaded = TaperRMSNorm(8)
    loaded.set_stage(stage)
    compiled = torch.compile(loaded, backend=counter, fullgraph=True)
    for norm, state in states * 2:
        loaded.load_state_dict(state)
        torch.testing.assert_close(compiled(x), norm(x))
    assert counter.frame_count == 3  # a graph a phase, and none for a state


def test_no_host_sync_in_forward():
    # On the meta device any .item() raises, and a value-dependent branch as well.
    with torch.device("meta"):
        for taper, _ in KINDS:
            for norm, separate in ((taper(8), False), (taper(8), True)):
                if separate:
                    norm.separate_first()
                for phase in Phase:
                    norm.gate._phase = phase
                    assert norm(torch.empty(2, 3, 8)).is_meta


def test_proposition_4_1_a_final_norm_leaves_no_radial_gradient():
    torch.manual_seed(0)
    norm, head = nn.RMSNorm(16, eps=0.0, dtype=torch.float64), nn.Linear(16, 50, bias=False, dtype=torch.float64)
    h = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(head(norm(h)), torch.arange(20), reduction="sum").backward()
    assert (h.grad * h).sum(-1).abs().max() < 1e-12
    assert h.grad.norm(dim=-1).min() > 1e-3


def test_proposition_4_2_without_it_a_leading_class_grows_the_residual():
    torch.manual_seed(0)
    norm, head = TaperRMSNorm(16, dtype=torch.float64), nn.Linear(16, 50, bias=False, dtype=torch.float64)
    norm.gate.set(0.0)
    h = torch.randn(200, 16, dtype=torch.float64, requires_grad=True)
    logits = head(norm(h))
    target = logits.argmax(-1)
    nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    top = logits.topk(2).values
    margin = top[:, 0] - top[:, 1]
    p = logits.softmax(-1).gather(1, target[:, None]).squeeze(1)
    assert ((h.grad * h).sum(-1) <= -(1 - p) * margin + 1e-12).all()
    assert (margin > 0).all()


@kinds
@pytest.mark.parametrize("words", [{}, {"elementwise_affine": False}, {"shape": (3, 8)}, {"frozen": True}])
@pytest.mark.parametrize("watched", [False, True])
def test_the_blends_gradients_are_the_formulas(taper, plain, words, watched):
    """In the one step of torch's own norms, and in the plain operations that a mode sees."""
    torch.manual_seed(0)
    shape = words.get("shape", (24,))
    norm = randomize(taper(shape, eps=1e-3, elementwise_affine=words.get("elementwise_affine", True)))
    norm.requires_grad_("frozen" not in words)
    norm.gate.set(0.3)
    norm.alignment.fill_(1.7)
    x = torch.randn(5, *shape[::-1], 4).transpose(-1, 1).reshape(4, 5, *shape)[1:].requires_grad_()
    seed = torch.randn(3, 5, *shape)
    with CountOps() if watched else torch.enable_grad():
        y = norm(x)
    named = {name: p for name, p in norm.named_parameters() if p.requires_grad}
    assert ("BlendBackward" in str(y.grad_fn.next_functions)) is not watched
    grads = torch.autograd.grad(y, [x, *named.values()], seed)

    wide = {name: p.detach().double().requires_grad_() for name, p in norm.named_parameters()}
    xd = x.detach().double().requires_grad_()
    dims = tuple(range(-len(shape), 0))
    h = xd - xd.mean(dims, keepdim=True) if norm.centred else xd
    one, zero = torch.ones(shape).double(), torch.zeros(shape).double()
    normed = h / (h.square().mean(dims, keepdim=True) + 1e-3).sqrt() * wide.get("weight", one) + wide.get("bias", zero)
    linear = norm.alignment.double() * h * wide.get("taper_weight", one) + wide.get("taper_bias", zero)
    g = norm.gate.value.double()
    expected = g * normed + (1 - g) * linear
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    others = torch.autograd.grad(expected, [xd, *(wide[name] for name in named)], seed.double())
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=1e-4, atol=1e-5)


@kinds
def test_the_blend_can_be_differentiated_twice_and_by_torch_func(taper, plain):
    norm = randomize(taper(6, eps=1e-3, dtype=torch.float64))
    norm.gate.set(0.4)
    norm.alignment.fill_(0.7)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    named = dict(norm.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(named, values, strict=True)), x)

    inputs = (x, *(p.detach().clone().requires_grad_() for p in named.values()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    theirs = torch.func.grad(lambda x: call(x, *inputs[1:]).square().sum())(x.detach())
    torch.testing.assert_close(theirs, torch.autograd.grad(norm(x).square().sum(), x)[0])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_are_the_formulas(taper, plain, dtype, affine):
    torch.manual_seed(0)
    norm = taper((2, 12), eps=1e-2, elementwise_affine=affine, dtype=dtype)
    if affine:
        randomize(norm)
    x = (torch.randn(7, 5, 2, 12) * torch.rand(7, 5, 1, 1).mul(3).exp() * 0.2).to(dtype)
    norm(x)
    h = x.double()
    h = h - h.mean((-2, -1), keepdim=True) if norm.centred else h
    scaled = h * norm.weight.detach().double() if affine else h
    energy = scaled.square().sum((-2, -1))
    r = (h.square().mean((-2, -1)) + 1e-2).sqrt()
    assert norm.pending.tolist() == pytest.approx([(energy / r).mean().item(), energy.mean().item(), 1], rel=1e-5)


# Fits, and a first position apart


def sequences(shape=(12,), huge=200.0):
    """(7, 5, *shape) tokens of many sizes; the first of each sequence is huge, and one other is all zeros."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 5, *shape, generator=generator)
    x *= torch.rand(7, 5, *(1 for _ in shape), generator=generator).mul(2).exp() * 0.3
    x[:, 0] *= huge
    x[3, 2] = 0
    return x


def tokens_of(norm, x):
    """Each token's ``h D``, (B, T, d) float64, and its norm's denominator, (B, T)."""
    h = x.double().flatten(2)
    h = h - h.mean(-1, keepdim=True) if norm.centred else h
    return h * norm.weight.detach().double().flatten(), (h.square().mean(-1) + norm.eps).sqrt()


@kinds
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("weight", ["energy", "token"])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_every_fit_is_the_least_squares_solution_it_says(taper, plain, shape, weight, skip, first):
    norm, x = randomize(taper(shape, eps=1e-3)), sequences(shape)
    norm.alignment_fit = AlignmentFit(weight, skip)
    if first:
        norm.separate_first()
    norm(x)
    update_alignment([norm])
    norm.freeze()
    scaled, r = tokens_of(norm, x)
    normed = scaled / r[..., None]

    def best(positions):
        """Solve ``n_i = c m_i`` over all entries, by torch; divide both by ``||h D||`` where tokens count alike."""
        m, n = scaled[:, positions].flatten(0, 1), normed[:, positions].flatten(0, 1)
        m, n = m[m.norm(dim=-1) > 0], n[m.norm(dim=-1) > 0]
        size = m.norm(dim=-1, keepdim=True) if weight == "token" else 1.0
        return torch.linalg.lstsq((m / size).reshape(-1, 1), (n / size).reshape(-1, 1)).solution.item()

    assert norm.alignment.item() == pytest.approx(best(slice(max(skip, int(first)), None)), rel=1e-5)
    if first:
        assert norm.first_alignment.item() == pytest.approx(best(slice(0, 1)), rel=1e-5)


def test_a_huge_first_token_takes_the_energy_fit_but_not_the_others():
    def fitted(weight, skip, x):
        norm = TaperRMSNorm(12, eps=1e-6)
        norm.alignment_fit = AlignmentFit(weight, skip)
        norm(x)
        update_alignment([norm])
        norm.freeze()
        return norm.alignment.item()

    x = torch.randn(4, 100, 12)
    x /= x.square().mean(-1, keepdim=True).sqrt()
    x[:, 0] *= 100
    assert fitted("energy", 0, x) == pytest.approx((99 + 100) / (99 + 100**2), rel=1e-4)
    assert fitted("energy", 1, x) == pytest.approx(1, rel=1e-4)
    assert fitted("token", 0, x) == pytest.approx((99 + 1 / 100) / 100, rel=1e-4)
    assert fitted("token", 1, x) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("weight", ["energy", "token"])
def test_two_halves_of_a_batch_are_the_whole(weight, first):
    x = sequences()[:6]

    def norm_after(part, reduce=lambda value: value):
        norm = TaperLayerNorm(12, eps=1e-3)
        norm.alignment_fit = AlignmentFit(weight, skip=2)
        if first:
            norm.separate_first()
        norm(part)
        update_alignment([norm], reduce)
        return norm

    rows = []
    for half in (x[:3], x[3:]):
        norm_after(half, lambda value: rows.append(value) or value)
    two = norm_after(x[:3], lambda value: (rows[0] + rows[1]) / 2)
    one = norm_after(x)
    assert rows[0].shape == (1 + first, 3)
    torch.testing.assert_close(two.alignment_ema, one.alignment_ema)
    if first:
        torch.testing.assert_close(two.first_alignment_ema, one.first_alignment_ema)


def test_sequences_that_are_shorter_than_what_is_left_out_add_nothing():
    norm = TaperRMSNorm(8)
    norm.alignment_fit = AlignmentFit(skip=3)
    norm(torch.randn(2, 3, 8))
    update_alignment([norm])
    assert norm.alignment_ema.tolist() == [0, 0, 0]
    with pytest.raises(TaperlitError, match=r"No alignment scalar: .* longer than what the fit leaves out"):
        norm.freeze()
    norm(torch.randn(2, 4, 8))
    update_alignment([norm])
    norm.freeze()


@pytest.mark.parametrize("shape", [(8,), (6, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("way", ["skip", "first"])
def test_where_positions_cannot_be_told_the_norm_is_named(shape, way):
    model = nn.ModuleDict({"inner": TaperRMSNorm(8)})
    if way == "skip":
        set_alignment_fit(model, AlignmentFit(skip=1))
    else:
        set_alignment_fit(model, AlignmentFit())
        model["inner"].separate_first()
    with pytest.raises(TaperlitError, match=r"inner is given \(.*and not \(B, T, 8\), so its positions cannot be told"):
        model["inner"](torch.randn(shape))
    set_alignment_fit(model, AlignmentFit("token"))  # needs none
    if way == "skip":
        model["inner"](torch.randn(shape))


@pytest.mark.parametrize("arguments", [("median", 0), ("energy", -1)])
def test_a_fit_that_there_is_not_is_refused(arguments):
    with pytest.raises(TaperlitError, match=r"The alignment's"):
        AlignmentFit(*arguments)


def apart(norm, c=0.7, first=0.02):
    norm.separate_first()
    norm.alignment.fill_(c)
    norm.first_alignment.fill_(first)
    return norm


@kinds
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("g", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("s", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("grad", [True, False])  # without gradients the blend takes the plain operations
def test_a_first_position_apart_is_the_formula_and_its_gradients(taper, plain, shape, g, s, grad):
    norm, x = apart(randomize(taper(shape, eps=1e-3))), sequences(shape, huge=20.0).requires_grad_()
    norm.gate.set(g)
    norm.gate.set_first(s)
    with torch.set_grad_enabled(grad):
        y = norm(x)
    wide = {name: p.detach().double().requires_grad_() for name, p in norm.named_parameters()}
    xd = x.detach().double().requires_grad_()
    dims = tuple(range(-len(shape), 0))
    h = xd - xd.mean(dims, keepdim=True) if norm.centred else xd
    c = torch.tensor([0.02**s * 0.7 ** (1 - s), *[0.7] * 4]).double().view(5, *(1 for _ in shape))
    zero = torch.zeros(()).double()
    normed = h / (h.square().mean(dims, keepdim=True) + 1e-3).sqrt() * wide["weight"] + wide.get("bias", zero)
    expected = g * normed + (1 - g) * (c * h * wide["taper_weight"] + wide.get("taper_bias", zero))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if grad:
        seed = torch.randn(y.shape)
        mine = torch.autograd.grad(y, [x, *norm.parameters()], seed)
        theirs = torch.autograd.grad(expected, [xd, *wide.values()], seed.double(), allow_unused=True)
        for a, b in zip(mine, theirs, strict=True):
            expected = torch.zeros_like(a).double() if b is None else b
            torch.testing.assert_close(a.double(), expected, rtol=1e-4, atol=2e-4)
        idle = {id(parameter) for parameter in norm.idle_parameters()}
        used = {1.0: ("weight", "bias"), 0.3: tuple(wide), 0.0: ("taper_weight", "taper_bias")}[g]
        assert {name for name, p in norm.named_parameters() if id(p) not in idle} == {*used} & {*wide}


def test_the_fast_blend_with_a_first_position_can_be_differentiated_twice():
    norm = apart(randomize(TaperLayerNorm(4, eps=1e-3, dtype=torch.float64)))
    norm.gate.set(0.4)
    norm.gate.set_first(0.8)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    named = dict(norm.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(named, values, strict=True)), x)

    assert "BlendBackward" in str(norm(x).grad_fn.next_functions)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in named.values()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_share_it_is_the_common_map_bit_for_bit_and_costs_nothing(taper, plain, dtype):
    one = randomize(taper(12)).to(dtype)
    two = apart(copy.deepcopy(one))
    one.alignment.fill_(0.7)
    for norm in (one, two):
        norm.gate.set(0.0)
    x = sequences().to(dtype)
    assert two.gate.phase is Phase.LINEAR_FIRST
    torch.testing.assert_close(two(x)[:, 1:], one(x)[:, 1:])
    assert not torch.equal(two(x)[:, 0], one(x)[:, 0])
    two.gate.set_first(0.0)
    assert two.gate.phase is Phase.LINEAR
    with CountOps() as one_ops:
        expected = one(x)
    with CountOps() as two_ops:
        y = two(x)
    assert torch.equal(y, expected)
    assert two_ops.names == one_ops.names
    assert two(x[0, 0]).shape == (12,)  # nor need positions be told any more


@pytest.mark.parametrize("g", [0.5, 0.0])
def test_one_token_outside_training_need_not_be_the_first(g):
    norm = apart(TaperRMSNorm(8))
    norm.gate.set(g)
    norm(torch.randn(2, 1, 8))
    norm.eval()
    with pytest.raises(TaperlitError, match=r"TaperRMSNorm is given one token, .*use_cache=False"):
        norm(torch.randn(2, 1, 8))
    norm(torch.randn(2, 2, 8))


def test_a_nested_batch_is_sequences():
    norm = apart(TaperRMSNorm(8))
    norm.gate.set(0.0)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    for y, x in zip(norm(torch.nested.nested_tensor(parts)).unbind(), parts, strict=True):
        torch.testing.assert_close(y, norm(x[None])[0])
    norm.gate.set(1.0)
    norm(torch.nested.nested_tensor(parts))
    assert norm.first_pending[2] == norm.pending[2] == 2


def test_the_share_is_saved_where_there_is_one_and_makes_itself_room():
    def model():
        norms = nn.ModuleList(TaperRMSNorm(4) for _ in range(3))
        share_gate(norms)
        return norms

    plain, mine = model(), model()
    keys = set(plain.state_dict())
    for norm in mine:
        apart(norm, first=0.25)
        norm.first_alignment_ema.fill_(3.0)
    mine[0].gate.set(0.0)
    mine[0].gate.set_first(0.125)
    state = copy.deepcopy(mine.state_dict())
    new = {f"{i}.first_alignment{end}" for i in range(3) for end in ("", "_ema")}
    assert set(state) - keys == {*new, "0.gate.first"}
    plain.load_state_dict(state)
    with torch.device("meta"):
        hollow = model()
    hollow.load_state_dict(copy.deepcopy(state), assign=True)
    x = torch.randn(2, 3, 4)
    for other in (plain, hollow, copy.deepcopy(mine)):
        assert shared_gate(other).phase is Phase.LINEAR_FIRST
        loaded = other.state_dict()
        assert loaded.keys() == state.keys()
        assert [name for name in state if not torch.equal(loaded[name], state[name])] == []
        assert all(torch.equal(a(x), b(x)) for a, b in zip(other, mine, strict=True))
        shared_gate(other).set(1.0)
        other.train()[2](x)
        assert other[2].first_pending[2] == 1
    mine.append(TaperRMSNorm(4, gate=mine[0].gate))
    assert mine[3].first_alignment is not None
    mine.append(TaperRMSNorm(4))
    share_gate(mine)
    assert mine[4].first_alignment is not None
    mine.to(torch.bfloat16)
    assert mine[4].first_alignment.dtype == mine[4].first_pending.dtype == mine[0].gate.first.dtype == torch.float32
    mine[0].reset_parameters()
    assert (mine[0].gate.value, mine[0].gate.first, mine[0].first_alignment) == (1, 1, 1)
    assert not mine[0].first_alignment_ema.any()


def test_the_phase_follows_whoever_writes_the_share():
    norm = apart(TaperRMSNorm(4))
    gate = norm.gate
    gate.set(0.0)
    gate.first.fill_(0.0)
    assert gate.phase is Phase.LINEAR
    gate.first.add_(0.5)
    assert gate.phase is Phase.LINEAR_FIRST
    gate.first.data = torch.zeros(())
    assert gate.phase is Phase.LINEAR
    gate.set(0.5)
    assert gate.phase is Phase.BLEND


def test_a_share_that_cannot_be_is_refused():
    gate = Gate()
    gate.set_first(0.0)
    with pytest.raises(TaperlitError, match="separate_first"):
        gate.set_first(0.5)
    gate.separate_first()
    with pytest.raises(TaperlitError, match="between 0 and 1"):
        gate.set_first(1.5)


def test_one_graph_a_phase_while_the_share_moves():
    torch._dynamo.reset()
    counter = CompileCounter()
    norm = apart(randomize(TaperLayerNorm(8)))
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 8)
    for g, s in ((1.0, 1.0), (0.9, 1.0), (0.2, 1.0), (0.0, 1.0), (0.0, 0.7), (0.0, 0.1), (0.0, 0.0), (0.0, 0.0)):
        norm.gate.set(g)
        norm.gate.set_first(s)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, norm(x))
    assert counter.frame_count == 4
