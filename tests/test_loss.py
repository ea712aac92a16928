import pytest
import torch
from torch import nn

from taperlit.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_value_and_gradients_are_those_of_the_whole(chunk):
    torch.manual_seed(0)
    head = nn.Linear(16, 101, dtype=torch.float32)
    x = torch.randn(3, 17, 16, requires_grad=True)
    targets = torch.randint(101, (3, 17))
    targets[1, 5:] = -100
    loss = chunked_cross_entropy(head, x, targets, chunk)
    grads = torch.autograd.grad(loss, [x, *head.parameters()])
    whole = nn.functional.cross_entropy(head(x).double().flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(whole, [x, *head.parameters()])
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert chunked_cross_entropy(head, x, targets, chunk).item() == pytest.approx(whole.item(), rel=1e-6)


def test_no_counted_target_gives_zero():
    loss = chunked_cross_entropy(nn.Linear(4, 9), torch.randn(1, 5, 4), torch.full((1, 5), -100))
    assert loss.item() == 0


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
    assert watch.largest == 64 * vocab


def test_float32_under_autocast():
    head = nn.Linear(8, 50)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(head, torch.randn(10, 8), torch.randint(50, (10,)))
    assert loss.dtype == torch.float32
