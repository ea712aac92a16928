"""LoRA adapters against the same model without them."""

import copy
import subprocess
import sys

import peft
import pytest
import small_models
import torch

from taperlit.checkpoint.assign import assign, build_hollow, tied_names
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.load import build_pretrained, load_pretrained
from taperlit.hub.lora import Lora, add_lora, merge_lora
from taperlit.norm import shared_gate, tapered_norms, update_alignment
from taperlit.surgery import taper

TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module", params=["gpt2", "llama", "phi3"])
def folder(request, tmp_path_factory):
    return small_models.saved(request.param, tmp_path_factory.mktemp(request.param))


def load(folder):
    return load_pretrained(str(folder)).double()


def train_adapters(model) -> None:
    """Give the adapters values that they would have after some training: at first they do nothing."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_adapters_begin_as_nothing_and_merge_into_what_they_computed(folder):
    plain = load(folder)
    model = copy.deepcopy(plain)
    add_lora(model, Lora(rank=4))
    assert torch.equal(model(TOKENS), plain(TOKENS))
    train_adapters(model)
    before = model(TOKENS)
    assert (before - plain(TOKENS)).abs().max() > 0.01
    merge_lora(model)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-10, atol=1e-10)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert tied_names(model) == tied_names(plain)
    assert not hasattr(model.lm, "peft_config")
    merge_lora(model)  # nothing is left to merge


def test_every_map_of_the_blocks_is_adapted_and_names_of_the_rest_stay(folder):
    plain = load(folder)
    names = set(plain.state_dict())
    model = copy.deepcopy(plain)
    add_lora(model, Lora(rank=2, alpha=4.0))
    kept = {name.replace(".base_layer.", ".") for name in model.state_dict() if ".lora_" not in name}
    assert kept == names
    adapted = {name.split(".base_layer.")[0] for name in model.state_dict() if ".base_layer." in name}
    matrices = {n.removesuffix(".weight") for n, p in plain.blocks.named_parameters(prefix="") if p.ndim == 2}
    assert {name.rpartition(".")[2] for name in adapted} == {name.rpartition(".")[2] for name in matrices}
    assert len(adapted) == len(matrices)


def test_adapters_norms_and_the_tapers_gains_train_and_nothing_else(folder):
    model = load(folder)
    add_lora(model, Lora(rank=2, dropout=0.1))
    taper(model)
    model.train()
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {f"{name}.{p}" for name, norm in tapered_norms(model).items() for p, _ in norm.named_parameters()}
    assert any("taper_weight" in name for name in norms)
    assert trained == norms | {name for name, _ in model.named_parameters() if ".lora_" in name}
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in trained if ".taper_" not in name and ".lora_A." not in name}  # B is 0 at first


def test_a_tapered_model_folds_after_its_adapters_are_merged(folder):
    model = load(folder)
    add_lora(model, Lora(rank=4))
    taper(model)
    train_adapters(model)
    model.train()
    model(TOKENS)
    update_alignment(tapered_norms(model).values())
    for norm in tapered_norms(model).values():
        norm.freeze()
    shared_gate(model).set(0.0)
    model.eval()
    before = model(TOKENS)
    merge_lora(model)
    structure = fold(model, lambda: model(TOKENS))
    assert len(structure["identities"]) == 5
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-9, atol=1e-9)


def test_a_hollow_model_takes_adapters_and_their_values(folder):
    model = load(folder).float()
    add_lora(model, Lora(rank=4, alpha=3.0))
    train_adapters(model)

    def build():
        made = build_pretrained(model.origin)
        add_lora(made, Lora(rank=4, alpha=3.0))
        return made

    hollow = build_hollow(build)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assign(hollow, model.state_dict(), "the model")
    assert torch.equal(hollow(TOKENS), model(TOKENS))


def test_an_adapter_is_alpha_by_rank_times_its_two_matrices(folder):
    model = load(folder)
    add_lora(model, Lora(rank=4, alpha=6.0))
    train_adapters(model)
    values = model.state_dict()
    merge_lora(model)
    checked = 0
    for name, merged in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if (base := values.get(f"{stem}.base_layer.weight")) is not None:
            delta = values[f"{stem}.lora_B.default.weight"] @ values[f"{stem}.lora_A.default.weight"] * 6.0 / 4
            transposed = type(model.get_submodule(stem)).__name__ == "Conv1D"
            torch.testing.assert_close(merged, base + (delta.T if transposed else delta), rtol=1e-12, atol=1e-12)
            checked += 1
    assert checked >= 8


def test_our_own_transformer_takes_adapters_too(tiny):
    model = tiny().double()
    plain = copy.deepcopy(model)
    add_lora(model, Lora(rank=2, targets=["q_proj", "mlp.up_proj"]))
    train_adapters(model)
    before = model(TOKENS)
    assert (before - plain(TOKENS)).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-10, atol=1e-10)
    assert [*model.state_dict()] == [*plain.state_dict()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"targets": []}, "targets names no linear map"),
    ],
)
def test_values_out_of_range_are_refused(changes, words):
    with pytest.raises(TaperlitError, match=f"lora.{words}"):
        Lora(**changes)


def test_targets_that_cannot_be_adapted_are_refused(tmp_path, tiny):
    model = load_pretrained(str(small_models.saved("llama_tied", tmp_path)))
    with pytest.raises(TaperlitError, match="no linear map is called c_attn; choose of down_proj, gate_proj"):
        add_lora(model, Lora(targets=["c_attn"]))
    with pytest.raises(TaperlitError, match=r"weight of lm\.lm_head is another module's too"):
        add_lora(model, Lora(targets=["lm_head"]))
    add_lora(model, Lora(targets=["q_proj"]))
    with pytest.raises(TaperlitError, match="has LoRA adapters already; merge"):
        add_lora(model, Lora())
    merge_lora(model)  # the advice
    add_lora(model, Lora())
    with pytest.raises(TaperlitError, match="Linear has no blocks; name its linear maps"):
        add_lora(torch.nn.Linear(2, 2), Lora())


def test_adapters_that_are_not_finite_are_not_merged(tmp_path):
    model = load_pretrained(str(small_models.saved("llama", tmp_path)))
    add_lora(model, Lora(targets=["q_proj"]))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(TaperlitError, match=r"LoRA adapter of lm\.model\.layers\.0\.self_attn\.q_proj .* not finite"):
        merge_lora(model)


def test_merging_where_there_is_nothing_imports_no_peft():
    program = (
        "import sys, torch; from taperlit.hub.lora import merge_lora; merge_lora(torch.nn.Linear(2, 2)); "
        "print('peft' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@torch.no_grad()
def test_a_bias_that_merging_would_lose_is_refused_by_name():
    torch.manual_seed(0)
    model = small_models.build("gpt2")
    peft_model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
    taper(peft_model, ["*.ln_1"])
    shared_gate(peft_model).set(0.0)
    for norm in tapered_norms(peft_model).values():
        norm.taper_bias.normal_()

    def run():
        return peft_model(input_ids=TOKENS).logits

    before = run()
    with pytest.raises(TaperlitError, match=r"lora_A\.default\.bias would hold a norm's bias.* merge it first"):
        fold(peft_model, run)
    assert torch.equal(run(), before)
    merged = peft_model.merge_and_unload()
    fold(merged, lambda: merged(input_ids=TOKENS).logits)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, before, rtol=1e-4, atol=1e-4)
