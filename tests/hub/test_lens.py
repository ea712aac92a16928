"""TransformerLens: the same logits, and direct logit attribution whose parts are all there is."""

import json
import sys
from types import ModuleType

import pytest
import small_models
import torch
from families import close_with_random_maps

from taperlit.checkpoint.checksum import checksum_of
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.families import as_transformer
from taperlit.hub.lens import check_no_norms, export_lens, hooked_config, load_hooked
from taperlit.hub.load import load_pretrained
from taperlit.norm import tapered_norms
from taperlit.surgery import taper

TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "rotary, gated, grouped": dict(n_kv_head=1),
    "rotary, gated, stretched": dict(rope_theta=500.0, rope_scaling=LLAMA3, d_head=8, qkv_bias=True),
    "gpt2, untied": dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True),
    "relu": dict(mlp="relu", d_ff=48),
    "embed_norm": dict(tied=True, embed_norm=True),
    "embed_norm, its final map kept": dict(tied=True, embed_norm=True),
    "gpt2, its final map kept": dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True),
}


def folded(model, names=("*",), tied="untie"):
    """A model without those norms."""
    if not tapered_norms(model):
        taper(model, names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    close_with_random_maps(tapered_norms(model))
    fold(model, lambda: model(TOKENS), tied=tied)
    return model.eval()


def contributions(hooked, cache):
    """What every component writes into the residual stream, by name, each (..., d_model); biases are their own."""
    yield "embed", cache["hook_embed"]
    if "hook_pos_embed" in cache:
        yield "pos_embed", cache["hook_pos_embed"]
    for i, block in enumerate(hooked.blocks):
        for head, written in enumerate(cache[f"blocks.{i}.attn.hook_result"].unbind(2)):
            yield f"L{i}H{head}", written
        yield f"L{i} b_O", block.attn.b_O
        yield f"L{i} mlp", cache[f"blocks.{i}.hook_mlp_out"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_same_logits_and_parts_that_sum_to_them(tiny, tmp_path, shape):
    model = folded(tiny(["*"], **SHAPES[shape]), tied="scale" if "kept" in shape else "untie")
    export_lens(model, tmp_path / "out")
    hooked = load_hooked(tmp_path / "out")
    wanted = model(TOKENS)
    hooked.cfg.use_attn_result = True
    logits, cache = hooked.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    parts = dict(contributions(hooked, cache))
    assert len(parts) == 1 + (model.pos_embed is not None) + 2 * (2 + 2)
    attributed = sum(part @ hooked.W_U for part in parts.values()) + hooked.b_U
    torch.testing.assert_close(attributed, wanted, rtol=0, atol=1e-4)
    largest = {name: (part @ hooked.W_U).abs().max().item() for name, part in parts.items()}
    assert all(value > 1e-3 for name, value in largest.items() if "b_O" not in name)
    # TransformerLens' own decomposition, which knows of no norm to apply either.
    whole = cache.get_full_resid_decomposition(expand_neurons=False).sum(0) @ hooked.W_U + hooked.b_U
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_long_contexts_have_the_models_own_rotary_positions(tiny, tmp_path):
    model = folded(tiny(["*"], block_size=3000, d_head=64))
    hooked = load_hooked(export_lens(model, tmp_path / "out"))
    tokens = torch.randint(300, (1, 3000), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hooked(tokens), model(tokens), rtol=0, atol=1e-5)
    angles = 2999 * model.rope.frequencies()
    torch.testing.assert_close(hooked.blocks[1].attn.rotary_sin[2999, :32], angles.sin(), rtol=0, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_a_pretrained_model_with_its_tokenizer(tmp_path):
    source = small_models.saved("gpt2", tmp_path / "in")
    model = load_pretrained(str(source))
    taper(model, ["*"])
    folded(model)
    files = {name: (source / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    hooked = load_hooked(export_lens(as_transformer(model), tmp_path / "out", files))
    ids = small_models.tokenizer().encode("def function_3(x):").ids
    assert hooked.to_tokens("def function_3(x):", prepend_bos=False)[0].tolist() == ids
    torch.testing.assert_close(
        hooked("def function_3(x):", prepend_bos=False), model(torch.tensor([ids])), rtol=0, atol=1e-4
    )


def test_a_norm_that_is_left_is_named(tiny):
    model = folded(tiny(["blocks.*"]))
    with pytest.raises(TaperlitError, match=r"a norm, final_norm \(RMSNorm\).*--model.taper all, which removes every"):
        check_no_norms(model)
    model = folded(tiny(["*attn_norm", "final_norm"]))
    with pytest.raises(TaperlitError, match=r"a norm, blocks.0.mlp_norm \("):
        check_no_norms(model)
    check_no_norms(folded(tiny(["*"])))


def test_an_mlp_that_it_has_not_is_refused(tiny):
    with pytest.raises(TaperlitError, match=r"no MLP of the kind glu, only swiglu, gelu, relu; export --to transf"):
        hooked_config(tiny(mlp="glu").config)


@pytest.mark.slow
def test_biases_that_its_gated_mlp_has_not(tiny, tmp_path):
    model = folded(tiny(["*"], norm="layernorm"))
    with pytest.raises(TaperlitError, match=r"blocks.0.mlp.gate_proj has a bias.* export --to transformers"):
        export_lens(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_what_is_not_the_models_own_is_refused(tiny, tmp_path):
    model = folded(tiny(["*"]))
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TaperlitError, match="a forward hook say; remove it"):
        export_lens(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_unreadable_directories(tiny, tmp_path):
    with pytest.raises(TaperlitError, match=r"config\.json is missing; export it again"):
        load_hooked(tmp_path)
    out = export_lens(folded(tiny(["*"])), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    deeper = {**config["hooked"], "n_layers": 3}
    for damage, words in (
        ({"hooked": None}, r"config\.json: hooked is None, not a dictionary; export it again"),
        ({"format": "x"}, "was not written by"),
        ({"hooked": {"n_layers": 2, "colour": 1}}, r"config\.json is damaged \(.*colour.*\); export it again"),
        ({"hooked": deeper}, r"is not what its config says \(blocks.2"),
    ):
        changed = {**config, **damage}
        changed["checksums"] = {**config["checksums"], "config.json": checksum_of(changed)}
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(TaperlitError, match=words):
            load_hooked(out)
    (out / "config.json").write_text('{"format": "another"}')
    with pytest.raises(TaperlitError, match="was not written by"):
        load_hooked(out)


@pytest.fixture
def out(tiny, tmp_path):
    """A folder with a tokenizer."""
    return export_lens(folded(tiny(["*"])), tmp_path / "out", {"tokenizer.json": small_models.tokenizer().to_str()})


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_flipped_bit_is_refused_by_name(name, out):
    data = bytearray((out / name).read_bytes())
    data[-5] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(TaperlitError, match=rf"out/{name} is damaged \(its checksum differs\); export it again"):
        load_hooked(out)


def test_checksums_are_all_there_and_of_the_files(out):
    load_hooked(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    sums = config["checksums"]
    assert sums.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    without = {key: value for key, value in config.items() if key != "checksums"}  # as it was written before
    for changed, words in (
        (without, r"config\.json: checksums\.config\.json is missing; export it again"),
        ({**config, "checksums": None}, r"checksums is None, not a dictionary"),
        ({**config, "checksums": {"config.json": sums["config.json"]}}, r"checksums\.model\.safetensors is missing"),
        ({**config, "checksums": {**sums, "../x": 1}}, r"checksums\.\.\./x is of no file beside it"),
        ({**config, "checksums": {**sums, "x": 1}}, r"out/x is missing"),
        ({**config, "hooked": {**config["hooked"], "d_mlp": 8}}, r"config\.json is damaged \(its checksum differs\)"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(TaperlitError, match=words):
            load_hooked(out)
    path.write_text(json.dumps(config))
    (out / "tokenizer.json").unlink()
    with pytest.raises(TaperlitError, match=r"tokenizer\.json is missing; export it again"):
        load_hooked(out)


def test_without_transformer_lens_and_with_4(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(TaperlitError, match=r"not installed: pip install 'taperlit\[transformer-lens\]'"):
        load_hooked("anywhere")
    without = ModuleType("transformer_lens")  # 4.3 raises an ImportError there, as its __getattr__ does here
    monkeypatch.setitem(sys.modules, "transformer_lens", without)
    with pytest.raises(TaperlitError, match=r"4.0 took it out.*--to transformers.*TransformerBridge.boot_transformers"):
        load_hooked("anywhere")

    def refuse(name):
        raise ImportError(f"{name} was removed")

    without.__getattr__ = refuse
    with pytest.raises(TaperlitError, match=r"4\.0 took it out"):
        load_hooked("anywhere")


def test_the_config_in_their_words(tiny):
    config = hooked_config(tiny(n_kv_head=1).config)
    assert (config["act_fn"], config["gated_mlp"], config["normalization_type"]) == ("silu", True, None)
    assert (config["n_key_value_heads"], config["positional_embedding_type"]) == (1, "rotary")
    assert (config["rotary_dim"], config["rotary_adjacent_pairs"]) == (16, False)
    config = hooked_config(tiny(position="learned", mlp="gelu").config)
    assert (config["act_fn"], config["n_key_value_heads"]) == ("gelu_new", None)
    assert config["positional_embedding_type"] == "standard"
