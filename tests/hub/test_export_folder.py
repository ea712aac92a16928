"""Folders of transformers: norms that are identities to the last bit, what is measured first, and what is refused."""

import json
import math

import pytest
import small_models
import torch
import transformers as tf
from families import FAMILIES, close_with_random_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from taperlit.compare import largest_difference
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.export import export_transformers
from taperlit.hub.load import load_pretrained
from taperlit.hub.origin import Origin
from taperlit.hub.stock import EPS, GAIN, LARGEST_MEAN_SQUARE, NotStockError, stock_model, structure_of
from taperlit.norm import shared_gate, tapered_norms
from taperlit.surgery import taper

D = 96
TOKENS = torch.arange(3, 43).view(2, 20)


def identities(kind, dtype):
    """A norm of a class as an export writes it: its weight rounded to the dtype."""
    offset = kind in (GemmaRMSNorm, NemotronLayerNorm1P)
    norm = kind(D, eps=EPS)
    nn.init.constant_(norm.weight, GAIN - offset)
    return norm.to(dtype)


def vectors(dtype, root_mean_square, seed=0):
    """Ten vectors whose largest mean square is this one's square, a few features large, of both signs."""
    x = torch.randn(10, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, :3] *= 50
    x *= torch.logspace(-6, 0, 10, dtype=torch.float64)[:, None] / x.square().mean(-1, keepdim=True).sqrt()
    return (x * root_mean_square).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
@given(share=st.floats(1e-9, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_an_rms_norm_is_the_identity_to_the_last_bit(dtype, kind, share, seed):
    x = vectors(dtype, share * math.sqrt(LARGEST_MEAN_SQUARE), seed)
    assert torch.equal(identities(kind, dtype)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [nn.LayerNorm, NemotronLayerNorm1P])
@given(share=st.floats(1e-9, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_layer_norm_only_centres(dtype, kind, share, seed):
    x = vectors(dtype, share * math.sqrt(LARGEST_MEAN_SQUARE), seed)
    wanted = x.double() - x.double().mean(-1, keepdim=True)
    error = (identities(kind, dtype)(x).double() - wanted).abs().amax(-1)
    # Half a last bit of the result, and, in float32, of the mean.
    assert (error <= torch.finfo(dtype).eps * x.double().abs().amax(-1)).all()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
def test_beyond_the_bound_it_is_no_identity_any_more(kind):
    x = vectors(torch.float32, 4 * math.sqrt(LARGEST_MEAN_SQUARE))
    y = identities(kind, torch.float32)(x)
    assert torch.equal(y[:5], x[:5])
    assert not torch.equal(y, x)
    # And far beyond it a norm.
    x = vectors(torch.float32, 1e3 * GAIN)[-1:]
    assert identities(kind, torch.float32)(x).square().mean().sqrt().item() == pytest.approx(GAIN, rel=1e-5)


def test_why_not_in_float16():
    assert torch.tensor(GAIN, dtype=torch.float16).isinf()
    assert torch.tensor(2.0**20, dtype=torch.float16).isinf()


def test_smaller_powers_leave_no_room_for_massive_activations():
    """2^40 as epsilon: SmolLM2-135M's first token, whose mean square is 1.2 million, comes out changed."""
    x = torch.ones(1, 576)
    x[0, 444] = math.sqrt(1.2e6 * 576)
    small, large = nn.RMSNorm(576, eps=2.0**40), nn.RMSNorm(576, eps=EPS)
    nn.init.constant_(small.weight, 2.0**20)
    nn.init.constant_(large.weight, GAIN)
    assert not torch.equal(small(x), x)
    assert torch.equal(large(x), x)


def folded(name, policy=("*",), tied="untie", model=None):
    """A folded model of ``small_models``, and its structure."""
    if model is None:
        lm = small_models.build(name)
        model = CausalLM(lm, Origin(f"someone/{name}", {"config.json": json.dumps(lm.config.to_dict(), default=str)}))
    taper(model, policy)
    close_with_random_maps(tapered_norms(model))
    return model, fold(model, lambda: model(TOKENS), tied=tied)


def compared(model, exported) -> float:
    with torch.no_grad():
        return largest_difference(model(TOKENS), exported(input_ids=TOKENS, use_cache=False).logits.float())


@pytest.mark.parametrize(
    ("name", "tied"), [("gpt2", "scale"), ("gemma", "scale"), ("gpt2", "untie"), ("llama", "untie")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stock_folder(tmp_path, name, tied, dtype):
    model, structure = folded(name, tied=tied)
    lines = []
    done = export_transformers(model, structure, tmp_path / "out", dtype=dtype, report=lines.append)
    assert done.reason is None
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert read.dtype == dtype
    assert type(read).__module__.startswith("transformers.models.")
    difference = compared(model, read)
    assert difference < (2e-6 if dtype == torch.float32 else 3e-2)
    assert done.agreement.relative < (2e-6 if dtype == torch.float32 else 3e-2)
    final = read.get_submodule(model.names.final_norm).weight
    if tied == "scale":
        kept = model.final_norm.weight
        assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
        torch.testing.assert_close((final.double() + (name == "gemma")) / GAIN, kept.double(), rtol=4e-3, atol=0)
    else:
        assert read.config.tie_word_embeddings is False
        assert (final == GAIN).all()
    assert lines[0] == "loads with transformers alone"
    assert f"largest logit difference {done.agreement.logits:.2e}" in lines[1]


@torch.no_grad()
def test_what_is_measured(tmp_path):
    """The largest mean square, logit difference and divergence, against a loop over the same tokens."""
    model, structure = folded("llama")
    done = export_transformers(model, structure, tmp_path / "out", dtype=torch.bfloat16).agreement
    tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    largest = []
    for place in structure["identities"]:
        module = model.get_submodule(place)
        module.register_forward_pre_hook(lambda m, args: largest.append(args[0].square().mean(-1).max().item()))
    wanted = model(tokens)
    got = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits.float()
    assert done.mean_square == pytest.approx(max(largest), rel=1e-6)
    assert done.logits == pytest.approx((wanted - got).abs().max().item(), rel=1e-4)
    divergence = nn.functional.kl_div(
        got.double().log_softmax(-1), wanted.double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert done.divergence == pytest.approx(divergence.sum(-1).mean().item(), rel=1e-4)
    assert done.tokens == 128


@pytest.mark.parametrize("name", ["GPT-J", "Falcon"])
def test_biases_that_the_stock_class_has_not_move_into_its_norms(name):
    """Both lack biases in what their LayerNorms feed; no config could add GPT-J's."""
    family = FAMILIES[name]
    model = CausalLM(family.make(), Origin("x", {"config.json": "{}"}))
    taper(model, [f"lm.{pattern}" for pattern in (*family.foldable, family.final)])
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS % 64))
    assert structure["biases"]
    assert all(model.get_parameter(bias).abs().max() > 0.1 for bias in structure["biases"])
    stock = stock_model(model.lm, structure_of(model.lm, structure), torch.float32)
    assert stock.state_dict().keys() == family.make().state_dict().keys() | {"lm_head.weight"}
    with torch.no_grad():
        wanted, got = model(TOKENS % 64), stock(TOKENS % 64).logits
    assert largest_difference(wanted, got) < 2e-6


@pytest.mark.parametrize(
    ("name", "policy", "reason"),
    [
        ("llama", ["lm.model.layers.*"], "model.norm stays, and all norms share one epsilon"),
        ("gpt2", ["*ln_1", "*ln_2"], "transformer.ln_f stays, and all norms share one epsilon"),
        ("gpt2", ["*ln_1", "*ln_f"], r"transformer.h.\*.ln_2 stay, and all norms share one epsilon"),
        ("opt", ["*"], "takes no epsilon from the config"),
    ],
)
def test_why_the_stock_class_cannot_hold_it(name, policy, reason, tmp_path):
    model, structure = folded(name, policy)
    with pytest.raises(NotStockError, match=reason):
        stock_model(model.lm, structure_of(model.lm, structure), torch.float32)
    done = export_transformers(model, structure, tmp_path / "out")
    assert done.agreement.logits == 0.0
    assert "import taperlit" in (tmp_path / "out" / "README.md").read_text()
    assert done.reason in (tmp_path / "out" / "README.md").read_text()


def test_a_model_of_ours(tmp_path, tiny):
    """It becomes the family that has its shape; its final map may stay."""
    for tied in ("untie", "scale"):
        model = tiny(["*"], norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True).eval()
        close_with_random_maps(tapered_norms(model))
        structure = fold(model, lambda model=model: model(TOKENS), tied=tied)
        done = export_transformers(model, structure, tmp_path / tied)
        assert done.reason is None
        read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / tied).eval()
        assert isinstance(read, tf.GPT2LMHeadModel)
        assert compared(model, read) < 2e-6


@pytest.mark.parametrize(
    ("changes", "kind", "activation"),
    [
        ({"mlp": "glu"}, tf.LlamaForCausalLM, nn.Sigmoid),
        ({"mlp": "relu", "norm": "layernorm", "bias": True}, tf.Starcoder2ForCausalLM, nn.ReLU),
    ],
)
def test_an_mlp_of_ours_is_one_of_the_stock_class(tmp_path, tiny, changes, kind, activation):
    model = tiny(["*"], **changes).eval()
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS))
    assert export_transformers(model, structure, tmp_path / "out").reason is None
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(read) is kind
    assert any(type(module) is activation for module in read.modules())
    assert compared(model, read) < 2e-6


def test_the_anchor_may_stay_in_a_model_of_ours(tmp_path, tiny):
    model = tiny(["blocks.*"]).eval()
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS))
    assert export_transformers(model, structure, tmp_path / "out").reason.startswith("model.norm stays")
    assert compared(model, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()) < 2e-6


@torch.no_grad()
def test_the_small_files_come_along(tmp_path):
    source = small_models.saved("llama", tmp_path / "some-llama", max_shard_size="60KB")
    model, structure = folded("", model=load_pretrained(str(source)))
    tokenizer_json = (source / "tokenizer.json").read_text()
    out = tmp_path / "out"
    done = export_transformers(model, structure, out, tokenizer_json, results={"loss before": 2.5, "loss after": 2.625})
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == (source / name).read_text()
    assert done.agreement.tokens > 128  # the text as well
    tokenizer = tf.AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "def"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", add_generation_prompt=True, return_dict=True)
    read = tf.AutoModelForCausalLM.from_pretrained(out)
    assert read.generation_config.temperature == 0.7
    assert read.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 3
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1
    card = (out / "README.md").read_text()
    assert "| loss before | 2.5 |" in card
    assert "| loss after | 2.625 |" in card
    assert "not measured" not in card
    assert "license:" not in card


def test_the_card_says_what_was_removed_and_from_what(tmp_path):
    model, structure = folded("gpt2", tied="scale")
    done = export_transformers(model, structure, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "someone/gpt2"' in card
    assert "- `transformer.h.*.ln_1` (2)\n- `transformer.h.*.ln_2` (2)\n" in card
    assert "4 norms of someone/gpt2" in card
    assert "`transformer.ln_f`" in card
    assert "arxiv.org/abs/2602.10408" in card
    assert "was not measured" in card
    assert f"{done.agreement.logits:.2e}" in card
    assert "import taperlit" not in card


def test_a_model_of_ours_gets_what_auto_tokenizer_and_generate_need(tmp_path, tiny):
    model = tiny(["*"]).eval()
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS))
    text = small_models.tokenizer().to_str()
    export_transformers(model, structure, tmp_path / "out", text, end_of_text="<|endoftext|>")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, read.generation_config.eos_token_id) == (0, 0)
    ids = tokenizer("def f(x):", return_tensors="pt")
    assert ids["input_ids"][0].tolist() == small_models.tokenizer().encode("def f(x):").ids
    read.generate(**ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("spoil", "dtype", "reason"),
    [
        (None, torch.float16, "has float32 and bfloat16, not float16: .* float16 ends at 65504"),
        (None, torch.float64, "has float32 and bfloat16, not float64"),
        ("hook", torch.float32, "differ from the folded model's by .* a forward hook say; remove it"),
        ("hook", torch.bfloat16, "more than bfloat16 rounds .* export in float32"),
        ("huge", torch.float32, "reaches a mean square of .* Train with a scale anchor"),
        ("nan", torch.float32, "logits are not finite"),
    ],
)
def test_what_is_refused_is_not_written(tmp_path, spoil, dtype, reason):
    model, structure = folded("gpt2", tied="scale")
    if spoil == "hook":
        model.blocks[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        if spoil == "huge":
            model.lm.transformer.wpe.weight.mul_(2.0**30)
        if spoil == "nan":
            model.lm.transformer.wpe.weight[5] = math.nan
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(TaperlitError, match=reason):
        export_transformers(model, structure, tmp_path / "out", dtype=dtype, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_only_folded_models():
    model = CausalLM(small_models.build("llama"), Origin("x", {"config.json": "{}"}))
    with pytest.raises(TaperlitError, match="not folded; fold it first"):
        export_transformers(model, None, "anywhere")


def test_no_family_has_the_shape(tmp_path, tiny):
    model = tiny(["*"], norm="rmsnorm", position="learned").eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(TOKENS))
    with pytest.raises(TaperlitError, match="transformers has no model of this shape"):
        export_transformers(model, structure, tmp_path / "out")


def test_a_class_that_came_with_its_own_code(tmp_path):
    class OwnLlama(tf.LlamaForCausalLM):
        pass

    lm = OwnLlama(small_models.CONFIGS["llama"]())
    model, structure = folded("", model=CausalLM(lm.eval(), Origin("someone/own", {"config.json": "{}"})))
    with pytest.raises(TaperlitError, match="someone/own is a OwnLlama, which is no class of transformers' own"):
        export_transformers(model, structure, tmp_path / "out")
