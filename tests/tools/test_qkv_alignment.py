"""What docs/experiments.md says of separate scalars for q, k and v: the fits, and what folding makes of them."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from qkv_alignment import MAPS, compare

from taperlit import fold, taper
from taperlit.norm import shared_gate


def test_each_scalar_is_the_least_squares_fit_to_what_its_map_makes_of_the_norm(tiny):
    model, tokens = tiny().eval(), torch.randint(300, (2, 16))
    with torch.no_grad():
        model.tok_embed.weight.mul_(torch.logspace(-1, 1, 300)[:, None])  # tokens of very different scales
        model.blocks[0].attn_norm.weight.uniform_(0.2, 3.0)
        h = model.tok_embed(tokens).double().flatten(0, 1)
    gain = model.blocks[0].attn_norm.weight.detach().double()
    normed = h / (h.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * gain

    def fitted(a, b):
        return torch.linalg.lstsq(a.reshape(-1, 1), b.reshape(-1, 1)).solution.item()

    first, *_ = compare(model, tokens)
    c, *own = [float(number) for number in re.findall(r"[-+]?\d+\.\d+(?=%? [(|])", first)]
    common = fitted(h * gain, normed)
    assert c == pytest.approx(common, abs=6e-4)
    for name, percent in zip(MAPS, own, strict=True):
        weight = model.blocks[0].attn.get_submodule(name).weight.detach().double().t()
        assert percent == pytest.approx(100 * (fitted(h * gain @ weight, normed @ weight) / common - 1), abs=0.06)


def test_at_gate_0_scalars_and_gains_of_their_own_are_other_matrices(tiny):
    """A model with ``c_p h D_p W_p`` per map, written out, is one of a single ``c h D W'_p``, and so it folds."""
    model, tokens = tiny().double().eval(), torch.randint(300, (2, 16))
    taper(model, ["blocks.*"])
    for norm in (block.attn_norm for block in model.blocks):
        norm.alignment.fill_(0.5)
    shared_gate(model).set(0.0)
    apart, single = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for one, other in zip(apart.blocks, single.blocks, strict=True):
            for i, name in enumerate(MAPS):
                own = (0.5 + torch.rand(32, dtype=torch.float64)) * (1 + i)  # c_p D_p over c D
                one.attn.get_submodule(name).register_forward_pre_hook(lambda _, args, own=own: (args[0] * own,))
                other.attn.get_submodule(name).weight.mul_(own)
        wanted = apart(tokens)
        torch.testing.assert_close(single(tokens), wanted, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(model(tokens), wanted, rtol=1e-2)
        fold(single, lambda: single(tokens))
        torch.testing.assert_close(single(tokens), wanted, rtol=1e-10, atol=1e-10)
