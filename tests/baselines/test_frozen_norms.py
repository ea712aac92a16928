"""FakeLN's layer: its formula, its halves in several families' attention, and folding."""

import copy

import pytest
import torch
from families import FAMILIES
from torch import nn

from taperlit import Transformer, TransformerConfig, apply_structure, fold, taper
from taperlit.baselines import FakeLN, apply_fakeln
from taperlit.baselines.fakeln import check_halves, freezing_order, require_fakeln
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate, tapered_norms

SHAPE = dict(vocab_size=50, block_size=8, n_layer=2, n_head=2, d_model=16, d_ff=24)
TOKENS = torch.arange(16).view(2, 8)


def model_of(norm="layernorm", **changes):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SHAPE, "norm": norm, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def with_sigma(norm, sigma):
    norm.alignment.fill_(1 / sigma)
    norm.alignment_ema[2] = 1.0


def freeze_all(model):
    for norm in tapered_norms(model).values():
        norm.freeze()
    shared_gate(model).set(0.0)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_with_the_true_number_of_a_constant_batch_it_is_the_norm(kind):
    torch.manual_seed(1)
    x = torch.randn(16, dtype=torch.float64)
    x = 0.25 * (x - x.mean()) / x.std(correction=0) + 3.0  # the standard deviation is a number that float32 holds
    if kind is nn.RMSNorm:
        x = 0.25 * x / x.square().mean().sqrt()
    plain = kind(16, eps=0.0).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter))
    model = nn.ModuleDict({"ln_f": copy.deepcopy(plain)})
    assert apply_fakeln(model) == ["ln_f"]
    norm = model["ln_f"]
    batch = x.expand(2, 5, 16).contiguous()
    assert torch.equal(norm(batch), plain(batch))
    with pytest.raises(TaperlitError, match="No sigma of ln_f"):
        norm.freeze()
    norm.measure = "together"
    norm(batch)
    norm.take(norm.pending[:2] / norm.pending[2])
    assert norm.sigma == pytest.approx(0.25, rel=2e-5)
    with_sigma(norm, 0.25)
    norm.freeze()
    torch.testing.assert_close(norm(batch), plain(batch), rtol=1e-12, atol=1e-12)
    other = batch * torch.rand(2, 5, 1, dtype=torch.float64)
    h = other - other.mean(-1, keepdim=True) if kind is nn.LayerNorm else other
    expected = h / 0.25 * plain.weight + (plain.bias if kind is nn.LayerNorm else 0.0)
    torch.testing.assert_close(norm(other), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_what_is_measured_leaves_out_position_0_or_is_per_token(kind):
    model = model_of(kind)
    apply_fakeln(model)
    norm = model.final_norm
    torch.manual_seed(2)
    batches = [torch.randn(2, 5, 16) * 3 + 1 for _ in range(3)]
    for batch in batches:
        batch[:, 0] *= 100
    centred = kind == "layernorm"
    norm.measure = "together"
    for batch in batches:
        norm(batch)
    norm.take(norm.pending[:2] / norm.pending[2])
    rest = torch.cat(batches)[:, 1:].double()
    together = rest.std(correction=0) if centred else rest.square().mean().sqrt()
    assert norm.sigma == pytest.approx(together.item(), rel=1e-5)
    assert norm.alignment_estimate.item() == pytest.approx(1 / together.item(), rel=1e-5)
    norm.forget()
    assert not norm.has_sigma
    norm.measure, average = "per token", None
    for batch in batches:
        norm.pending.zero_()
        norm(batch)
        norm.take(norm.pending[:2] / norm.pending[2], momentum=0.9)
        square = batch.double().var(-1, correction=0) if centred else batch.double().square().mean(-1)
        mean = (square + 1e-5).sqrt().mean().item()
        average = mean if average is None else 0.9 * average + 0.1 * mean
    assert norm.sigma == pytest.approx(average, rel=1e-5)
    before = norm.sigma
    norm.take(torch.tensor([float("nan"), 0.0]), momentum=0.9)
    assert norm.sigma == before
    norm.eval()
    norm.pending.zero_()
    norm(batches[0])
    norm.train()
    norm(batches[0][:, :0])
    assert not norm.pending.any()


HALVED = ("GPT-2", "GPT-NeoX", "BLOOM", "Phi-3", "Llama", "OPT", "GPT-J", "Qwen3", "StarCoder2", "Gemma2")


def projections(model, block):
    """The outputs of the attention's projections in a forward pass, by name."""
    seen = {}
    for name, module in model.get_submodule(block).named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("c_attn", "qkv_proj", "query_key_value", "q_proj", "k_proj", "v_proj"):
            module.register_forward_hook(lambda m, a, y, leaf=leaf: seen.update({leaf: y.detach()}))
    return seen


def value_columns(model, run, block, name):
    """Which columns of a fused projection are values: with one token, attention is all on it, whatever q and k are."""
    (module,) = (m for n, m in model.get_submodule(block).named_modules() if n.rpartition(".")[2] == name)
    found = []
    hook = module.register_forward_hook(lambda m, a, y: found.append(y) or y.retain_grad())
    with torch.enable_grad():
        run().square().sum().backward()
    hook.remove()
    grad = found[0].grad.abs().sum((0, 1))
    return grad > 1e-9 * grad.max()


@pytest.mark.parametrize("family", HALVED)
def test_the_first_half_changes_exactly_q_and_k_and_the_second_v(family):
    given = FAMILIES[family]
    model, batch = given.make(torch.float64), given.batch(torch.float64)
    names = [*given.foldable, given.final]
    apply_fakeln(model, names)
    norms = require_fakeln(model, "test")
    name = next(name for name, norm in norms.items() if norm.role == "attention")
    norm, block = norms[name], name.rpartition(".")[0]
    check_halves(model, norm)
    with_sigma(norm, 0.7)
    seen = projections(model, block)
    outputs = {}
    for state in ("open", "half", "frozen"):
        if state != "open":
            norm.freeze(half=state == "half")
        with torch.no_grad():
            given.run(model, batch)
        assert norm._output is None  # nothing is held after a pass
        outputs[state] = dict(seen)
    if fused := next((leaf for leaf in seen if leaf not in ("q_proj", "k_proj", "v_proj")), None):
        one = {key: value[:, :1] for key, value in batch.items()}
        fresh = given.make(torch.float64)
        values = value_columns(fresh, lambda: given.run(fresh, one), block, fused)
        assert 0 < values.sum() < len(values)
        for state in outputs:
            y = outputs[state].pop(fused)
            outputs[state] = {"q_proj": y[..., ~values], "v_proj": y[..., values]}
    for path in outputs["open"]:
        before, half, after = (outputs[state][path] for state in ("open", "half", "frozen"))
        assert not torch.allclose(before, after)
        assert torch.equal(half, before if path == "v_proj" else after)


def test_gains_get_the_gradients_of_both_halves():
    grads, inputs = {}, {}
    for state in ("open", "half", "frozen"):
        model = model_of().double()
        apply_fakeln(model)
        norm = model.blocks[0].attn_norm
        with_sigma(norm, 0.5)
        if state != "open":
            norm.freeze(half=state == "half")
        inputs.clear()
        x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for path in "qkv":
            module = getattr(model.blocks[0].attn, f"{path}_proj")
            module.register_forward_hook(lambda m, a, y, path=path: inputs.update({path: a[0]}))
        model.blocks[0](x, model.rope).square().sum().backward()
        grads[state] = norm.weight.grad
        h = x - x.mean(-1, keepdim=True)
        true = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
        fake = h / 0.5 * norm.weight + norm.bias
        frozen = {"open": "", "half": "qk", "frozen": "qkv"}[state]
        for path, given in inputs.items():
            torch.testing.assert_close(given, fake if path in frozen else true, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(grads["half"], grads["open"])
    assert not torch.allclose(grads["half"], grads["frozen"])


def test_a_checkpointed_or_compiled_block_is_halved_too():
    outputs = []
    for variant in ("plain", "checkpointed", "compiled"):
        model = model_of()
        apply_fakeln(model)
        norm = model.blocks[0].attn_norm
        model.blocks[0].mlp_norm.measure = "together"
        with_sigma(norm, 0.5)
        norm.freeze(half=True)
        model.activation_checkpointing = variant == "checkpointed"
        if variant == "compiled":
            model.blocks[0].compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            norm.require_taken()
        pending = model.blocks[0].mlp_norm.pending
        outputs.append((loss.detach(), norm.weight.grad, pending / pending[2]))
    for found in outputs[1:]:
        for value, expected in zip(found, outputs[0], strict=True):
            torch.testing.assert_close(value, expected)


class Hidden(nn.Module):
    """Attention that its norm's output reaches as another tensor, or whose projections are not called."""

    def __init__(self, how):
        super().__init__()
        self.how, self.ln_1 = how, nn.LayerNorm(4)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.ln_1(x)
        if self.how == "copied":
            return self.q_proj(y.clone()) + self.k_proj(y) + self.v_proj(y)
        if self.how == "half called":
            return self.q_proj(y) + nn.functional.linear(y, self.k_proj.weight) + self.v_proj(y)
        return nn.functional.linear(y, self.q_proj.weight) + self.v_proj(y)


@pytest.mark.parametrize("how", ["copied", "half called", "uncalled"])
def test_a_half_that_would_not_be_seen_is_refused_by_name(how):
    model = nn.ModuleDict({"wte": nn.Embedding(3, 4), "h": nn.ModuleList([Hidden(how)])})
    apply_fakeln(model)
    norm, x = model["h"][0].ln_1, torch.randn(2, 3, 4)
    with_sigma(norm, 1.5)
    norm.freeze(half=True)
    with pytest.raises(TaperlitError, match=r"h\.0\.(q_proj is not called|ln_1 is half frozen).*halves=False"):
        [model["h"][0](x) for _ in range(2)]
    norm.freeze()  # as it advises
    assert [model["h"][0](x) for _ in range(2)]


def test_halves_of_an_unknown_layout_are_refused_by_name():
    given = FAMILIES["Falcon"]
    model = given.make()
    apply_fakeln(model)
    norms = require_fakeln(model, "test")
    norm = next(iter(norms.values()))
    with_sigma(norm, 1.0)
    with pytest.raises(TaperlitError, match=r"input_layernorm cannot be frozen in halves .*FalconAttention"):
        norm.freeze(half=True)
    with pytest.raises(TaperlitError, match=r"FalconAttention\); freeze it at once, halves=False"):
        check_halves(model, norm)
    norm.freeze()
    # something that takes a projection's place later, as adapters do
    model = model_of()
    apply_fakeln(model)
    model.blocks[1].attn.k_proj = nn.Sequential(model.blocks[1].attn.k_proj)
    check_halves(model, model.blocks[0].attn_norm)
    with pytest.raises(TaperlitError, match=r"blocks\.1\.attn\.k_proj took the place"):
        check_halves(model, model.blocks[1].attn_norm)


def test_the_order_of_freezing():
    model = model_of()
    apply_fakeln(model)
    norms = require_fakeln(model, "test")
    attention, mlp = ([f"blocks.{i}.{n}_norm" for i in range(2)] for n in ("attn", "mlp"))
    expected = {
        "mlp": [(n, False) for n in mlp], "qk": [(n, True) for n in attention], "v": [(n, False) for n in attention],
        "final": [("final_norm", False)],
    }  # fmt: skip
    assert freezing_order(norms) == expected
    assert freezing_order(norms, halves=False) == {**expected, "qk": expected["v"], "v": []}


@pytest.mark.parametrize("stage", ["open", "half", "frozen"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_state_dict_has_sigma_and_what_is_frozen_and_no_gain_twice(norm, stage):
    model = model_of(norm)
    plain = set(model.state_dict())
    apply_fakeln(model)
    for fake in tapered_norms(model).values():
        with_sigma(fake, 2.0)
    if stage != "open":
        model.blocks[0].attn_norm.freeze(half=stage == "half")
    state = model.state_dict()
    leaves = ("alignment", "alignment_ema", "frozen")
    names = [*tapered_norms(model)]
    assert set(state) - plain == {*(f"{n}.{leaf}" for n in names for leaf in leaves), f"{names[0]}.gate.value"}
    other = model_of(norm)
    apply_fakeln(other)
    other.load_state_dict(state)
    assert other.blocks[0].attn_norm.is_half_frozen == (stage == "half")
    assert other.blocks[0].attn_norm.is_frozen == (stage == "frozen")
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))
    third = model_of(norm)
    expected = third(TOKENS)
    apply_fakeln(third)
    third.load_state_dict(model_of(norm).state_dict())  # a plain norm's
    assert torch.equal(third(TOKENS), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_frozen_it_folds_as_a_tapered_model_does(norm, tied):
    model = model_of(norm, tied=tied)
    apply_fakeln(model)
    for i, fake in enumerate(tapered_norms(model).values()):
        with_sigma(fake, 0.5 + 0.1 * i)
    with pytest.raises(TaperlitError, match=r"The gate is 1, not 0"):
        fold(model, lambda: model(TOKENS))
    freeze_all(model)
    expected = model(TOKENS)
    structure = fold(model, lambda: model(TOKENS))
    assert len(structure["identities"]) == 5
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    again = apply_structure(model_of(norm, tied=tied), structure)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_it_needs_a_plain_model_and_all_of_it():
    model = model_of()
    taper(model, ["blocks.0.*"])
    with pytest.raises(TaperlitError, match=r"blocks\.0\.attn_norm is tapered already"):
        apply_fakeln(model)
    with pytest.raises(TaperlitError, match="apply_fakeln"):
        require_fakeln(model_of(), "test")
    model = model_of()
    apply_fakeln(model, ["blocks.0.*"])
    taper(model, ["blocks.1.*"])
    with pytest.raises(TaperlitError, match=r"blocks\.1\.attn_norm is tapered"):
        require_fakeln(model, "test")
    with pytest.raises(TaperlitError, match="one sigma for all positions"):
        model.blocks[0].attn_norm.separate_first()


def test_at_gate_0_everything_is_linear_whatever_is_frozen():
    model = model_of()
    apply_fakeln(model)
    norms = tapered_norms(model)
    for fake in norms.values():
        with_sigma(fake, 0.8)
    model.blocks[0].attn_norm.freeze(half=True)
    half, other = model.blocks[0].attn_norm, model.blocks[1].attn_norm
    assert other.own_share == 1.0
    with pytest.raises(TaperlitError, match=r"blocks\.0\.attn_norm is half frozen: q and k get another"):
        _ = half.own_share
    shared_gate(model).set(0.0)
    assert shared_gate(model).phase is Phase.LINEAR
    assert half.own_share == other.own_share == 0.0
    linear = model(TOKENS)
    for fake in norms.values():
        fake.freeze()
    shared_gate(model).set(1.0)
    assert torch.equal(model(TOKENS), linear)
    assert all(isinstance(fake, FakeLN) and [*fake.idle_parameters()] == [] for fake in norms.values())
    model.blocks[0].attn_norm.reset_parameters()
    assert not model.blocks[0].attn_norm.is_frozen
