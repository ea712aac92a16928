"""Torch's encoder layers have a fused inference path that reads their norms' parameters and calls no norm.

What a model should compute is asked of the slow path: training mode, dropout 0, with gradients.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

from taperlit.folding import fold
from taperlit.norm import TaperLayerNorm, TaperNorm, share_gate, shared_gate, tapered_norms
from taperlit.surgery import taper

D = 16
LENGTHS = (6, 4, 1)
VALID = torch.arange(6)[None, :] < torch.tensor(LENGTHS)[:, None]  # (B, T), padding at the end as nested tensors want

MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def put_by_hand(layer: nn.TransformerEncoderLayer) -> None:
    layer.norm1, layer.norm2 = TaperLayerNorm(D), TaperLayerNorm(D)


def make(stack: str, how: str, norm_first: bool) -> nn.Module:
    """An encoder with four tapered norms, or a layer with two, that have random linear maps."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    if how == "before":
        put_by_hand(layer)
    model = layer if stack == "layer" else nn.TransformerEncoder(layer, 2)
    if how == "after":
        for module in list(model.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                put_by_hand(module)
    if how == "taper":
        taper(model)
    else:
        share_gate(model)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.fill_(0.8)
            for parameter in norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def slow(model: nn.Module, x: torch.Tensor, **masks: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(model).train().requires_grad_(True)
    with torch.enable_grad():
        return model(x, **masks).detach()


def check_every_mode(model: nn.Module, reference: nn.Module, masked: bool) -> None:
    x = torch.randn(len(LENGTHS), 6, D, generator=torch.Generator().manual_seed(1))
    masks = {"src_key_padding_mask": ~VALID} if masked else {}
    expected = slow(reference, x, **masks)
    model.eval()
    for trainable in (True, False):
        model.requires_grad_(trainable)
        for name, mode in MODES.items():
            with mode():
                y = model(x, **masks)
            difference = (y[VALID] - expected[VALID]).abs().max().item()
            assert difference < 2e-5, (name, trainable, difference)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("how", ["before", "after", "taper"])
@pytest.mark.parametrize("stack", ["layer", "encoder"])
def test_no_inference_path_goes_round_the_norms(stack, how, norm_first, masked):
    model = make(stack, how, norm_first)
    for g in (1.0, 0.3, 0.0):
        shared_gate(model).set(g)
        check_every_mode(model, model, masked)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("how", ["before", "taper"])
def test_copies_and_pickles_are_not_bypassed_either(how, tmp_path):
    model = make("encoder", how, norm_first=False)
    shared_gate(model).set(0.0)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        check_every_mode(twin, model, masked=True)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("how", ["before", "after", "taper"])
@pytest.mark.parametrize("stack", ["layer", "encoder"])
def test_a_folded_encoder_computes_the_same_in_every_mode(stack, how, masked):
    model = make(stack, how, norm_first=True).eval()
    shared_gate(model).set(0.0)
    before = copy.deepcopy(model)
    x = torch.randn(2, 5, D)
    fold(model, lambda: model(x))
    assert not any(isinstance(module, TaperNorm) for module in model.modules())
    check_every_mode(model, before, masked)
    check_every_mode(copy.deepcopy(model), before, masked)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("names", [["*.norm1"], ["*.norm2"], ["layers.1.*"]])
def test_a_partly_folded_encoder_too(names):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2)
    taper(model, names)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.taper_weight.add_(0.3 * torch.randn_like(norm.taper_weight))
            norm.taper_bias.add_(0.3 * torch.randn_like(norm.taper_bias))
    shared_gate(model).set(0.0)
    before = copy.deepcopy(model)
    x = torch.randn(2, 5, D)
    fold(model.eval(), lambda: model(x))
    check_every_mode(model, before, masked=True)


def test_a_plain_encoder_keeps_its_fused_path():
    """The mend is the tapered norms' own: it touches no class of torch's and no layer without a TaperNorm."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(copy.deepcopy(layer), 2)
    taper(layer)
    assert plain.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in plain.modules())
