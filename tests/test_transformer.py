import json
import math
from dataclasses import asdict

import pytest
import torch
from jsonargparse import ArgumentParser

from taperlit.errors import TaperlitError
from taperlit.norm import TaperLayerNorm, TaperRMSNorm, shared_gate, tapered_norms
from taperlit.surgery import taper
from taperlit.transformer import MLP, PRESETS, Rope, Transformer, TransformerConfig, TransformerOverrides

transformers = pytest.importorskip("transformers")

SIZES = {
    "gpt2_124m": 124.4e6, "gpt2_350m": 354.8e6, "gpt2_774m": 774.0e6, "gpt2_1558m": 1557.6e6,
    "llama_350m": 350e6, "llama2_7b": 6.738e9, "llama3_1b": 1.236e9, "llama3_8b": 8.030e9,
    "small_1m": 1e6, "small_3m": 3e6, "small_9m": 9e6, "small_30m": 30e6,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_their_name_says(name):
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_preset(name))
        taper(model, ["blocks.*"])
    assert model.num_parameters() == pytest.approx(SIZES[name], rel=0.08)


def test_matches_transformers_gpt2():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            bos_token_id=0, eos_token_id=0, vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2
        )
    ).eval()
    ours = Transformer(
        TransformerConfig(
            300, 32, 2, 2, d_model=32, norm="layernorm", position="learned", mlp="gelu", bias=True, tied=True
        )
    ).eval()
    state = {}
    for key, value in theirs.state_dict().items():
        if key == "lm_head.weight":
            continue  # tied to wte
        value = value + 0.1 * torch.randn_like(value)
        state[key] = value.T if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value
        theirs.state_dict()[key].copy_(value)
    renamed = {"tok_embed.weight": state["transformer.wte.weight"], "pos_embed.weight": state["transformer.wpe.weight"]}
    for leaf in ("weight", "bias"):
        renamed[f"final_norm.{leaf}"] = state[f"transformer.ln_f.{leaf}"]
        for i in range(2):
            theirs_i = f"transformer.h.{i}"
            for part, value in zip("qkv", state[f"{theirs_i}.attn.c_attn.{leaf}"].chunk(3), strict=True):
                renamed[f"blocks.{i}.attn.{part}_proj.{leaf}"] = value
            for mine, other in (
                ("attn_norm", "ln_1"), ("mlp_norm", "ln_2"), ("attn.o_proj", "attn.c_proj"),
                ("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj"),
            ):  # fmt: skip
                renamed[f"blocks.{i}.{mine}.{leaf}"] = state[f"{theirs_i}.{other}.{leaf}"]
    renamed["head.weight"] = renamed["tok_embed.weight"]
    ours.load_state_dict(renamed)
    tokens = torch.randint(300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_matches_transformers_llama_with_grouped_queries():
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    ours = Transformer(TransformerConfig(300, 64, 2, 4, 2, 32, 64)).eval()
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)

    def rename(key):
        for old, new in (
            ("model.layers.", "blocks."), ("model.embed_tokens", "tok_embed"), ("model.norm", "final_norm"),
            ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm"), ("self_attn", "attn"),
            ("lm_head", "head"),
        ):  # fmt: skip
            key = key.replace(old, new)
        return key

    ours.load_state_dict({rename(key): value for key, value in state.items()})
    tokens = torch.randint(300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, SCALING, {**SCALING, "factor": 32.0, "low_freq_factor": 0.3}])
@pytest.mark.parametrize(("theta", "d_head"), [(1e4, 64), (5e5, 128), (1e6, 10)])
def test_rotary_positions_are_transformers(theta, d_head, scaling):
    """To the bit without scaling; else the last bit of a frequency may differ, and with it the angle far away."""
    config = transformers.LlamaConfig(
        hidden_size=2 * d_head, num_attention_heads=2, max_position_embeddings=4000, rope_theta=theta,
        rope_scaling=scaling and {"rope_type": "llama3", **scaling},
    )  # fmt: skip
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = Rope(
        TransformerConfig(d_model=2 * d_head, n_head=2, block_size=4000, rope_theta=theta, rope_scaling=scaling)
    )
    torch.testing.assert_close(ours.frequencies(), theirs.inv_freq, rtol=0 if scaling is None else 3e-7, atol=0)
    tables = theirs(torch.zeros(1), torch.arange(4000)[None])
    for own, table in zip((ours.cos, ours.sin), tables, strict=True):
        torch.testing.assert_close(own, table[0], rtol=0, atol=0 if scaling is None else 4000 * 3e-7)
    if scaling is not None:
        slowest = ours.frequencies()[-1].item()
        assert slowest == pytest.approx(theta ** (2 / d_head - 1) / scaling["factor"], rel=1e-6)


def test_heads_may_be_of_any_width_and_their_maps_have_biases_of_their_own():
    config = TransformerConfig(d_model=32, n_head=4, n_kv_head=2, d_head=10, qkv_bias=True)
    attention = Transformer(config).blocks[0].attn
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {
        "q_proj.weight": (40, 32), "q_proj.bias": (40,), "k_proj.weight": (20, 32), "k_proj.bias": (20,),
        "v_proj.weight": (20, 32), "v_proj.bias": (20,), "o_proj.weight": (32, 40),
    }  # fmt: skip
    plain = TransformerConfig(d_model=32, n_head=4)
    assert (plain.d_head, plain.qkv_bias) == (8, False)
    assert TransformerConfig(d_model=32, n_head=4, bias=True).qkv_bias
    assert not TransformerConfig(d_model=32, n_head=4, bias=True, qkv_bias=False).qkv_bias


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


FORMULAS = {
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "glu": lambda gate, up: 1 / (1 + torch.exp(-gate)) * up,
    "gelu": lambda gate, up: tanh_gelu(up),
    "relu": lambda gate, up: up * (up > 0),
}


def mlp_of(kind, bias=False, d_ff=48):
    torch.manual_seed(0)
    mlp = MLP(TransformerConfig(d_model=32, n_head=2, d_ff=d_ff, mlp=kind, bias=bias)).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FORMULAS)
@torch.no_grad()
def test_every_mlp_is_its_formula(kind, bias):
    mlp, x = mlp_of(kind, bias), torch.randn(2, 5, 32, dtype=torch.float64)

    def linear(module, x):
        return x @ module.weight.T + (module.bias if bias else 0)

    assert (mlp.gate_proj is not None) == (kind in ("swiglu", "glu"))
    gate = None if mlp.gate_proj is None else linear(mlp.gate_proj, x)
    wanted = linear(mlp.down_proj, FORMULAS[kind](gate, linear(mlp.up_proj, x)))
    torch.testing.assert_close(mlp(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "power"), [("swiglu", 2), ("glu", 1), ("gelu", 1), ("relu", 1)])
@torch.no_grad()
def test_which_mlp_squares_a_large_token(kind, power):
    mlp, x = mlp_of(kind), torch.randn(200, 32, dtype=torch.float64)
    growth = (mlp(1e4 * x) / mlp(1e3 * x)).log10().nan_to_num()
    assert growth.median().item() == pytest.approx(power, abs=1e-3)


def test_inner_widths_give_every_mlp_about_as_many_parameters():
    def config(kind, d_model=96):
        return TransformerConfig(d_model=d_model, n_head=2, mlp=kind)

    assert {kind: config(kind).d_ff for kind in FORMULAS} == {"swiglu": 256, "glu": 256, "gelu": 384, "relu": 384}
    assert config("glu", 100).d_ff == 320  # 266.7, rounded up to 64
    assert len({sum(p.numel() for p in MLP(config(kind)).parameters()) for kind in FORMULAS}) == 1


def test_configs_come_back_from_json_and_old_ones_have_no_new_fields():
    config = TransformerConfig(d_model=30, n_head=4, d_head=10, rope_scaling=SCALING)
    assert TransformerConfig(**json.loads(json.dumps(asdict(config)))) == config
    plain = TransformerConfig(d_model=32, n_head=4, bias=True)
    old = {key: value for key, value in asdict(plain).items() if key not in ("d_head", "qkv_bias", "rope_scaling")}
    assert TransformerConfig(**old) == plain


def test_every_field_can_be_given_on_the_command_line():
    def run(overrides: TransformerOverrides | None = None) -> None:
        """Nothing."""

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(run)
    options = ["--overrides.d_head=10", "--overrides.qkv_bias=true", f"--overrides.rope_scaling={json.dumps(SCALING)}"]
    overrides = parser.parse_args(options).overrides
    config = TransformerConfig.from_preset("small_1m", **overrides)
    assert (config.d_head, config.qkv_bias, config.rope_scaling) == (10, True, SCALING)
    again = parser.parse_string(parser.dump(parser.parse_args(options))).overrides
    assert TransformerConfig.from_preset("small_1m", **again) == config


def test_no_token_sees_a_later_one(tiny):
    model = tiny().eval()
    tokens = torch.randint(300, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 300
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :12], model(changed)[:, :12])
        assert not torch.equal(model(tokens)[:, 12:], model(changed)[:, 12:])


@pytest.mark.parametrize(("names", "count"), [([], 0), (["blocks.*"], 4), (["*"], 5)])
@pytest.mark.parametrize(("norm", "kind"), [("rmsnorm", TaperRMSNorm), ("layernorm", TaperLayerNorm)])
def test_which_norms_taper(tiny, names, count, norm, kind):
    model = tiny(names, norm=norm)
    norms = tapered_norms(model)
    assert len(norms) == count
    assert all(type(n) is kind and n.gate is shared_gate(model) for n in norms.values())
    assert [k for k in model.state_dict() if "gate.value" in k] == ["blocks.0.attn_norm.gate.value"] * bool(count)


def test_initialization_is_depth_scaled_and_survives_the_meta_device():
    config = TransformerConfig(1000, 64, 8, 4, d_model=128, tied=True)
    with torch.device("meta"):
        model = Transformer(config)
        taper(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = Transformer(config)
    taper(fresh)
    assert model.head.weight is model.tok_embed.weight
    assert torch.equal(model.rope.cos, fresh.rope.cos)
    for name, parameter in model.named_parameters():
        other = dict(fresh.named_parameters())[name]
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.1, abs=1e-9), name
    assert model.blocks[3].attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert model.blocks[3].attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_fan_in_keeps_the_size_of_features():
    torch.manual_seed(0)
    config = TransformerConfig(512, 64, 4, 4, d_model=128, d_ff=384, init="fan_in", embed_norm=True)
    model = Transformer(config)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: inputs.update({name: (args[0], out)}))
    model(torch.randint(512, (4, 64)))
    assert model.tok_embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    del inputs["head"]
    for name, (x, y) in inputs.items():
        expected = x.square().mean().sqrt().item()
        if name.endswith(("o_proj", "down_proj")):
            expected /= math.sqrt(8)  # the stream gets a part of it from each of 2 * 4 writers
        assert y.square().mean().sqrt().item() == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_embed_norm_is_of_the_token_alone(tied, position):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, d_model=32, d_ff=48, tied=tied, position=position)
    model = Transformer(TransformerConfig(**shape, embed_norm=True)).double()
    tokens, seen = torch.arange(15).view(1, 15), []
    with torch.no_grad():
        model.tok_embed.weight.mul_(torch.logspace(-3, 1, 50)[:, None])
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(tokens)
    rows = model.tok_embed.weight[tokens]
    given = seen[0] if position == "rope" else seen[0] - model.pos_embed.weight[:15]
    torch.testing.assert_close(given, rows / rows.square().mean(-1, keepdim=True).sqrt(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(given, model.token_table()[tokens])
    # Without it, on the table, the same: and the head has the matrix as it is.
    plain = Transformer(TransformerConfig(**{**shape, "tied": False})).double()
    plain.load_state_dict({**model.state_dict(), "tok_embed.weight": model.token_table()})
    torch.testing.assert_close(plain(tokens), logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 5}, "d_model 32 is not a multiple of n_head 5; change one, or give d_head"),
        ({"n_head": 5, "d_head": 0}, "d_head must be at least 1"),
        ({"d_head": 7}, "even head width, not 7"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor; give factor, low_freq_factor"),
        ({"rope_scaling": {**SCALING, "low_freq_factor": 4.0}}, "0 < low_freq_factor < high_freq_factor"),
        ({"rope_scaling": SCALING, "position": "learned"}, "rope_scaling is for position 'rope', not 'learned'"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_head": 32}, "even head width"),
        ({"mlp": "relu2"}, "mlp is 'relu2'; choose from swiglu, glu, gelu, relu"),
        ({"norm": "rms"}, "norm is 'rms'; choose from rmsnorm, layernorm"),
        ({"position": "alibi"}, "position is 'alibi'; choose from rope, learned"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(TaperlitError, match=message):
        TransformerConfig(**{"d_model": 32, "n_head": 2, **fields})


def test_unknown_names_are_refused(tiny):
    with pytest.raises(TaperlitError, match="No preset 'gpt5'"):
        TransformerConfig.from_preset("gpt5")
    with pytest.raises(TaperlitError, match="No model option 'n_layers'"):
        TransformerConfig.from_preset("small_1m", n_layers=3)
    with pytest.raises(TaperlitError, match="33 tokens are more than the model's context of 32"):
        tiny()(torch.zeros(1, 33, dtype=torch.int64))
