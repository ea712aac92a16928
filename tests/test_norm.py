import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from taperlit.errors import TaperlitError
from taperlit.norm import Gate, Phase, TaperLayerNorm, TaperRMSNorm, share_gate, shared_gate, update_alignment

KINDS = [(TaperRMSNorm, nn.RMSNorm), (TaperLayerNorm, nn.LayerNorm)]
kinds = pytest.mark.parametrize(("taper", "plain"), KINDS)


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


def test_no_host_sync_in_forward():
    # On the meta device any .item() raises, and a value-dependent branch as well.
    with torch.device("meta"):
        for taper, _ in KINDS:
            norm = taper(8)
            for phase in Phase:
                norm.gate._phase = phase
                assert norm(torch.empty(2, 8)).is_meta


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
