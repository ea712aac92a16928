import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.profiler import ProfilerActivity, profile

from taperlit import loss as losses
from taperlit.errors import TaperlitError
from taperlit.loss import chunked_cross_entropy, token_losses

WAYS = ("linear_cross_entropy", "gradients in forward", "module")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the ways to make the loss, for however few logits."""
    monkeypatch.setattr(losses, "FEW_LOGITS", 0)
    if request.param == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has none")
    if request.param != "linear_cross_entropy":
        monkeypatch.setattr(losses, "_torch_has_it", lambda head, x: False)
    if request.param == "module":
        monkeypatch.setattr(losses, "_is_plain", lambda head, x: False)
    return request.param


def expected_of(head, x, targets):
    """Value and gradients of the whole in float64."""
    tensors = [p.detach().double().requires_grad_() for p in (x, *head.parameters())]
    logits = nn.functional.linear(tensors[0], *tensors[1:]).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, targets.flatten())
    return loss, torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_whole(way, chunk, bias):
    torch.manual_seed(0)
    head = nn.Linear(16, 101, bias)
    x = torch.randn(3, 17, 16, requires_grad=True)
    targets = torch.randint(101, (3, 17))
    targets[1, 5:] = -100
    loss = chunked_cross_entropy(head, x, targets, chunk)
    whole, expected = expected_of(head, x, targets)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    grads = torch.autograd.grad(3 * loss, [x, *head.parameters()])
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), 3 * other, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert chunked_cross_entropy(head, x, targets, chunk).item() == pytest.approx(whole.item(), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 9),
    vocab=st.integers(2, 60),
    chunk=st.integers(1, 50),
    scale=st.floats(0.01, 300),
    ignored=st.floats(0, 1),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_size_of_logits(tokens, width, vocab, chunk, scale, ignored, frozen, seed):
    torch.manual_seed(seed)
    head = nn.Linear(width, vocab).requires_grad_(not frozen)
    x = (torch.randn(tokens, width) * scale).requires_grad_()
    targets = torch.randint(vocab, (tokens,)).where(torch.rand(tokens) >= ignored, -100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "FEW_LOGITS", 0)
        loss = chunked_cross_entropy(head, x, targets, chunk)
    loss.backward()
    if (targets == -100).all():
        assert loss.item() == 0
        assert not x.grad.any()
        return
    whole, expected = expected_of(head, x, targets)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-5)
    for p, other in zip((x, *head.parameters()), expected, strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), other, rtol=1e-4, atol=1e-6 * (1 + scale))
        else:
            assert p.grad is None


def test_a_tied_matrix_gets_both_gradients(way):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    tokens, targets = torch.randint(50, (40,)), torch.randint(50, (40,))
    chunked_cross_entropy(head, embedding(tokens), targets, 16).backward()
    weight = embedding.weight.detach().double().requires_grad_()
    nn.functional.cross_entropy(weight[tokens] @ weight.T, targets).backward()
    torch.testing.assert_close(embedding.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-7)


def test_no_counted_target_gives_zero(way):
    x = torch.randn(1, 5, 4, requires_grad=True)
    loss = chunked_cross_entropy(nn.Linear(4, 9), x, torch.full((1, 5), -100), 2)
    assert loss.item() == 0
    loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("target", [9, -1])
def test_a_target_outside_the_vocabulary_is_refused(way, target):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(nn.Linear(4, 9), torch.randn(5, 4, requires_grad=True), torch.full((5,), target), 2)


def test_a_second_backward_pass_is_right_or_refused(way):
    torch.manual_seed(0)
    head, x, targets = nn.Linear(4, 9), torch.randn(5, 4, requires_grad=True), torch.randint(9, (5,))
    loss = chunked_cross_entropy(head, x, targets, 2)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    if way == "linear_cross_entropy":
        with pytest.raises(RuntimeError, match="called twice"):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * first)


def test_differentiating_twice_is_right_or_refused(way):
    torch.manual_seed(0)
    head, targets = nn.Linear(4, 9, dtype=torch.float64), torch.randint(9, (5,))
    x = torch.randn(5, 4, requires_grad=True, dtype=torch.float64)

    def penalty(loss):
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    loss = chunked_cross_entropy(head, x, targets, 2)
    if way != "module":
        with pytest.raises(TaperlitError, match="cannot be differentiated again"):
            penalty(loss)
        return
    grad = torch.autograd.grad(penalty(loss), x)[0]
    whole = nn.functional.cross_entropy(head(x), targets)
    torch.testing.assert_close(grad, torch.autograd.grad(penalty(whole), x)[0], rtol=1e-4, atol=1e-6)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(head):
    head.register_forward_hook(lambda module, args, output: 2 * output)


def _pre_hooked(head):
    head.register_forward_pre_hook(lambda module, args: 2 * args[0])


def _wrapped(head):
    forward = head.forward
    head.forward = lambda x: 2 * forward(x)


def _parametrized(head):
    weight_norm(head)
    with torch.no_grad():
        head.parametrizations.weight.original0.mul_(2)


@pytest.mark.parametrize("change", [_hooked, _pre_hooked, _wrapped, _parametrized, Scaled])
@pytest.mark.parametrize("chunk", [3, 100])
def test_what_is_put_on_the_head_is_obeyed(change, chunk, monkeypatch):
    monkeypatch.setattr(losses, "FEW_LOGITS", 0)
    torch.manual_seed(0)
    head = (Scaled if change is Scaled else nn.Linear)(8, 20, bias=False)
    weight = head.weight.detach().double().requires_grad_()
    if change is not Scaled:
        change(head)
    x, targets = torch.randn(10, 8, requires_grad=True), torch.randint(20, (10,))
    loss = chunked_cross_entropy(head, x, targets, chunk)
    expected = nn.functional.cross_entropy(2 * x.double() @ weight.T, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    grad, other = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0]
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_never_holds_all_the_logits():
    head, tokens, vocab = nn.Linear(8, 5000), 512, 5000
    x = torch.randn(tokens, 8, requires_grad=True)
    with LargestTensor() as watch:
        chunked_cross_entropy(head, x, torch.randint(vocab, (tokens,)), 64).backward()
    assert watch.largest == 64 * vocab  # a mode that watches has the head called as a module


def test_never_holds_all_the_logits_unwatched(way):
    """By what is allocated in all: gradients of the logits and their probabilities as well."""
    head, tokens, vocab = nn.Linear(8, 5000, bias=False), 1024, 5000
    x, targets = torch.randn(tokens, 8, requires_grad=True), torch.randint(vocab, (tokens,))

    def largest(chunk):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            chunked_cross_entropy(head, x, targets, chunk).backward()
        return max(event.self_cpu_memory_usage for event in seen.events())

    assert largest(64) <= 4 * 64 * vocab * 4
    assert largest(tokens) >= min(tokens, losses.CACHED_TOKENS) * vocab * 4  # and the measure sees logits


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(chunk, dtype, monkeypatch):
    monkeypatch.setattr(losses, "FEW_LOGITS", 0)
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 50), torch.randn(40, 8, requires_grad=True), torch.randint(50, (40,))
    with torch.autocast("cpu", dtype):
        loss = chunked_cross_entropy(head, x, targets, chunk)
        logits = head(x).float()  # rounded by autocast; all that follows is not
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    loss.backward()
    _, expected = expected_of(head, x, targets)
    for p, other in zip((x, *head.parameters()), expected, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad.double(), other, rtol=0.1, atol=2e-3 * other.abs().max().item() + 1e-4)


def test_compiled_as_a_whole():
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 50), torch.randn(40, 8, requires_grad=True), torch.randint(50, (40,))
    compiled = torch.compile(lambda x: chunked_cross_entropy(head, x, targets, 16), backend="aot_eager")
    grads = torch.autograd.grad(compiled(x), [x, *head.parameters()])
    for grad, other in zip(grads, expected_of(head, x, targets)[1], strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 4),
    tokens=st.integers(1, 30),
    vocab=st.integers(2, 60),
    chunk=st.integers(1, 50),
    scale=st.floats(0.01, 300),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_loss_of_each_token(rows, tokens, vocab, chunk, scale, ignored, seed):
    torch.manual_seed(seed)
    head, x = nn.Linear(5, vocab), torch.randn(rows, tokens, 5) * scale
    targets = torch.randint(vocab, (rows, tokens)).where(torch.rand(rows, tokens) >= ignored, -100)
    loss = token_losses(head, x.requires_grad_(), targets, chunk)
    assert loss.shape == targets.shape
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    assert not loss[targets == -100].any()
    logits = nn.functional.linear(x.double(), head.weight.double(), head.bias.double())
    whole = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-5 * (1 + scale))
    if (targets != -100).any():
        mean = chunked_cross_entropy(head, x, targets, chunk)
        torch.testing.assert_close(loss.sum() / (targets != -100).sum(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [_hooked, _pre_hooked, _wrapped, _parametrized, Scaled])
def test_what_is_put_on_the_head_is_obeyed_per_token(change):
    torch.manual_seed(0)
    head = (Scaled if change is Scaled else nn.Linear)(8, 20, bias=False)
    weight = head.weight.detach().double()
    if change is not Scaled:
        change(head)
    x, targets = torch.randn(10, 8), torch.randint(20, (10,))
    expected = nn.functional.cross_entropy(2 * x.double() @ weight.T, targets, reduction="none")
    torch.testing.assert_close(token_losses(head, x, targets, 3).double(), expected, rtol=1e-5, atol=1e-5)


def test_token_losses_hold_no_more_logits_than_asked_for():
    head, vocab = nn.Linear(8, 500), 500
    for tokens, chunk, rows in ((512, 64, 64), (1100, 4096, losses.CACHED_TOKENS)):
        with LargestTensor() as watch:
            token_losses(head, torch.randn(tokens, 8), torch.randint(vocab, (tokens,)), chunk)
        assert watch.largest == rows * vocab


def test_token_losses_are_float32_under_autocast():
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 50), torch.randn(40, 8), torch.randint(50, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = token_losses(head, x, targets, 16), head(x).float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_what_is_not_finite_stays_in_its_own_token():
    head, x = nn.Linear(4, 9), torch.randn(2, 3, 4)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    targets = torch.randint(9, (2, 3))
    targets[1, 2] = -100
    loss = token_losses(head, x, targets, 2)
    assert loss.isfinite().tolist() == [[True, False, True], [True, True, True]]
    assert loss[1, 2] == 0
