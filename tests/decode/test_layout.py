import pytest
import torch

from taperlit.decode.layout import fastest_layouts, in_words, same_layouts, shapes_of
from taperlit.decode.product import layouts_for, make_product
from taperlit.errors import TaperlitError
from taperlit.transformer import TransformerConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # else there is no "split"
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("layout", ["rows", "columns", "split", "packed"])
def test_a_product_is_the_same_in_every_layout(layout, rows, bias, dtype):
    if layout not in layouts_for(40, 24, CPU, dtype, compiled=False):
        pytest.skip("oneDNN is not here")
    torch.manual_seed(0)
    x, weight, residual = torch.randn(rows, 40), torch.randn(24, 40), torch.randn(rows, 24)
    x, weight, residual, b = (t.to(dtype) for t in (x, weight, residual, torch.randn(24)))
    product = make_product(weight, b if bias else None, layout)
    wanted = x.double() @ weight.double().t() + (b.double() if bias else 0)
    close = dict(rtol=4 * torch.finfo(dtype).eps, atol=30 * torch.finfo(dtype).eps)
    torch.testing.assert_close(product(x).double(), wanted, **close)
    torch.testing.assert_close(product.added_to(residual, x).double(), residual.double() + wanted, **close)
    assert product.weight.numel() == weight.numel()


def test_what_is_possible_where():
    assert layouts_for(8, 9, torch.device("cuda"), torch.float32, compiled=False) == ["rows", "columns"]
    assert "split" not in layouts_for(8, 9, CPU, torch.float32, compiled=False)  # nine are not two halves
    assert layouts_for(8, 10, CPU, torch.float32, compiled=True) == ["rows", "columns"]
    config = TransformerConfig.from_preset("small_1m")
    with pytest.raises(TaperlitError, match="qkv matrix cannot be split here; give rows or columns"):
        same_layouts("split", config, 1, CPU, torch.float32, compiled=True)


def test_every_product_is_measured_without_the_random_state():
    state = torch.get_rng_state()
    config = TransformerConfig.from_preset("small_1m")
    layouts = fastest_layouts(config, 1, CPU, torch.float32, compiled=False)
    assert layouts.keys() == shapes_of(config).keys()
    assert same_layouts(layouts, config, 1, CPU, torch.float32, compiled=False) == layouts
    assert torch.equal(torch.get_rng_state(), state)


def test_in_words():
    assert in_words({"qkv": "rows", "o": "rows"}) == "rows"
    assert in_words({"qkv": "rows", "o": "split"}) == "qkv rows, o split"
