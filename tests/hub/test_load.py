"""Pretrained models in: against what transformers itself computes, from real files made here."""

import json
import logging
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import small_models
import torch
import transformers as tf
from families import FAMILIES
from gguf import GGUFWriter, RopeScalingType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from taperlit.checkpoint.assign import assign, build_hollow
from taperlit.data.tokenizer import end_of_text_id, load_tokenizer, parse_tokenizer
from taperlit.errors import TaperlitError
from taperlit.hub import load as hub_load
from taperlit.hub.gguf_check import check_gguf
from taperlit.hub.load import build_pretrained, load_pretrained, read_origin, tokenizer_json_of
from taperlit.hub.origin import CARRIED

TOKENS = torch.arange(3, 27).view(2, 12)
ONES = np.ones(4, np.float32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


@torch.no_grad()
def expected(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


CAUSAL = [name for name, family in FAMILIES.items() if family.build.args[0].endswith(("ForCausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_comes_in_as_transformers_wrote_it(family, tmp_path):
    model = FAMILIES[family].make()
    model.save_pretrained(tmp_path)
    batch = FAMILIES[family].batch()
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(str(tmp_path)).lm(**batch).logits, model(**batch).logits)


def test_weights_that_their_class_changes_are_refused_by_name(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    heads = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    model = tf.YoutuForCausalLM(tf.YoutuConfig(**sizes, **heads, num_key_value_heads=2, pad_token_id=0))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(TaperlitError, match=r"model\.embed_tokens\.weight is not what model\.safetensors has"):
        load_pretrained(str(tmp_path))
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_pretrained(str(tmp_path))), expected(model.eval()))


def test_mpt_and_an_infinite_number_in_a_config(tmp_path):
    sizes = dict(vocab_size=64, d_model=32, n_heads=2, n_layers=1, max_seq_len=32, expansion_ratio=2)
    mpt = tf.MptForCausalLM(tf.MptConfig(**sizes)).eval()
    mpt.save_pretrained(tmp_path / "mpt")
    torch.testing.assert_close(logits(load_pretrained(str(tmp_path / "mpt"))), expected(mpt))
    sizes = dict(vocab_size=64, hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
    mamba = tf.Mamba2ForCausalLM(tf.Mamba2Config(**sizes, num_hidden_layers=1)).eval()
    mamba.save_pretrained(tmp_path / "mamba")
    assert '"Infinity"' in (tmp_path / "mamba" / "config.json").read_text()
    loaded = load_pretrained(str(tmp_path / "mamba"))
    torch.testing.assert_close(logits(loaded), expected(mamba))
    assert tuple(loaded.lm.config.time_step_limit) == mamba.config.time_step_limit
    assert tuple(build_pretrained(loaded.origin).lm.config.time_step_limit) == mamba.config.time_step_limit


@pytest.fixture
def folder(tmp_path):
    """A Llama as the hub would have it."""
    return small_models.saved("llama", tmp_path / "some-llama")


@pytest.fixture
def gguf(tmp_path):
    return small_models.write_gguf(small_models.build("llama_tied"), tmp_path / "files" / "tiny.gguf")


def refused(source, words, **options) -> str:
    """Check that a source is refused in one line that holds the words."""
    with pytest.raises(TaperlitError, match=words) as error:
        load_pretrained(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    words = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in words.items() if value is not None}))


@pytest.mark.parametrize("name", small_models.CONFIGS)
def test_a_model_computes_what_transformers_says_and_is_built_again_without_its_files(name, tmp_path):
    theirs = small_models.build(name)
    folder = small_models.save(theirs, tmp_path / name)
    model = load_pretrained(str(folder))
    assert torch.equal(logits(model), expected(theirs))
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.vocab_size, model.block_size) == (small_models.VOCAB, small_models.CONTEXT)
    shutil.rmtree(folder)
    hollow = build_hollow(lambda: build_pretrained(model.origin))
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assign(hollow, model.state_dict(), "the model")
    assert torch.equal(logits(hollow), expected(theirs))
    assert [name for name, _ in hollow.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert hollow.lm.generation_config.to_dict() == model.lm.generation_config.to_dict()
    built = build_pretrained(model.origin)
    assert not built.training
    assert {p.device.type for p in built.parameters()} == {"cpu"}


def test_shards_and_half_precision_are_read_as_float32(tmp_path):
    theirs = small_models.build("llama")
    folder = small_models.save(theirs, tmp_path / "m", dtype=torch.bfloat16, max_shard_size="30KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    assert load_file(next(folder.glob("model-*.safetensors"))).popitem()[1].dtype == torch.bfloat16
    model = load_pretrained(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = small_models.build("llama")  # anew: a cast rounds the frequencies of the rotation too
    reference.load_state_dict(theirs.state_dict())
    assert torch.equal(logits(model), expected(reference))
    next(folder.glob("model-00002*")).unlink()
    refused(folder, "m has no model-00002-of-.*, which its model.safetensors.index.json names; download")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, r"m/model\.safetensors\.index\.json is damaged .*; download it again\.$")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 3}}')
    refused(folder, r"index\.json: weight_map\.lm_head\.weight is 3, not a text; download it again\.$")


@pytest.mark.parametrize("half", [False, True], ids=["f32", "f16"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_gguf_file_is_the_model_that_it_was_made_from(name, half, tmp_path):
    theirs = small_models.build(name)
    path = small_models.write_gguf(theirs, tmp_path / "tiny.gguf", half)
    if half:
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.half())
    model = load_pretrained(str(path))
    torch.testing.assert_close(logits(model), expected(theirs), rtol=1e-6, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.lm.config, "quantization_config")
    model.train()
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(p.grad.any() for p in model.parameters())
    model.lm.save_pretrained(tmp_path / "again")  # an ordinary model by now
    assert torch.equal(logits(load_pretrained(str(tmp_path / "again"))), logits(model.eval()))


def test_the_origin_of_a_gguf_file_is_enough_to_build_it_and_to_chat(gguf, tmp_path):
    origin = read_origin(str(gguf.parent))  # the only one in its folder
    assert origin == load_pretrained(str(gguf)).origin
    assert origin.name == "tiny.gguf"
    assert origin.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in origin.config
    model = build_pretrained(origin)
    values = load_pretrained(str(gguf)).state_dict()
    model.load_state_dict(values)
    assert torch.equal(logits(model), logits(load_pretrained(str(gguf))))
    assert model.lm.generation_config.eos_token_id == 2
    for name, text in origin.files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json_of(str(gguf)))
    chat = [{"role": "user", "content": "def f(x):"}]
    ours, theirs = tf.AutoTokenizer.from_pretrained(tmp_path), small_models.chat_tokenizer()
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.eos_token, ours.bos_token, ours.pad_token) == ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    small_models.write_gguf(small_models.build("llama"), gguf.parent / "other.gguf")
    refused(gguf.parent, "holds several .gguf files; name one of other.gguf, tiny.gguf")


def test_small_files_are_carried_as_they_are_and_no_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    origin = read_origin(str(folder))
    assert origin.name == "some-llama"
    names = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names <= origin.files.keys()
    assert origin.files == {name: (folder / name).read_text() for name in CARRIED if (folder / name).exists()}
    assert json.loads(origin.files["generation_config.json"])["temperature"] == 0.7
    (folder / "generation_config.json").unlink()
    assert "generation_config.json" not in read_origin(str(folder)).files
    assert build_pretrained(read_origin(str(folder))).lm.generation_config.eos_token_id == 2


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_there_is_no_dropout(name, tmp_path):
    folder = small_models.saved(name, tmp_path / name)
    model = load_pretrained(str(folder)).train()
    assert torch.equal(logits(model), logits(model.eval()))
    assert torch.equal(logits(model.train()), logits(model))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    # GPT-2's file leaves its 0.1 to the class's default, which is why the file alone does not tell.
    plain = tf.AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(expected(plain), expected(plain))


def test_nothing_is_printed_and_the_settings_are_as_before(folder, gguf, capfd, recwarn):
    log = tf.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load_pretrained(str(folder))
    load_pretrained(str(gguf))
    build_pretrained(read_origin(str(gguf)))
    tokenizer_json_of(str(gguf))
    assert capfd.readouterr() == ("", "")
    assert [*recwarn] == []
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert logging.getLogger("transformers").level == before[0]


def test_tokenizers_are_those_of_the_source(folder, gguf, tmp_path):
    text = "def function_7(x):\n    return x<|im_end|>  çé"
    ids = small_models.tokenizer().encode(text).ids
    for source in (folder, folder / "tokenizer.json", gguf, gguf.parent):
        tokenizer = load_tokenizer(str(source))
        assert tokenizer.encode(text).ids == ids
        assert end_of_text_id(tokenizer) == 0  # and not <|im_end|>, which ends a turn
    assert tokenizer_json_of(str(folder)) == (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").unlink()
    assert tokenizer_json_of(str(folder)) is None
    with pytest.raises(TaperlitError, match="some-llama has no tokenizer that a tokenizer"):
        load_tokenizer(str(folder))
    # GPT-2's older layout: two files and no tokenizer.json.
    small_models.chat_tokenizer().backend_tokenizer.model.save(str(folder))
    change_config(folder, model_type="gpt2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert Tokenizer.from_str(tokenizer_json_of(str(folder))).encode("return x * 3").ids == (
        small_models.tokenizer().encode("return x * 3").ids
    )


def test_a_tokenizer_that_would_truncate_does_not(tmp_path):
    tokenizer = small_models.tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "def function_7(x):\n    return x * 3 + 4"
    ids = small_models.tokenizer().encode(text).ids
    for loaded in (load_tokenizer(str(tmp_path)), parse_tokenizer(tokenizer.to_str(), "of it")):
        assert loaded.encode(text).ids == ids


def test_the_end_of_text_is_the_sources_eos_where_no_name_is_known():
    text = small_models.tokenizer().to_str().replace("<|endoftext|>", "<stop>")
    tokenizer = Tokenizer.from_str(text)
    assert end_of_text_id(tokenizer, "<stop>") == 0
    assert end_of_text_id(small_models.tokenizer(), "<|im_end|>") == 0
    for eos in (None, "<none>"):
        with pytest.raises(TaperlitError, match="has no end-of-text token"):
            end_of_text_id(tokenizer, eos)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "no folder or .gguf file ./nowhere"),
        ("/no/such/folder", "no folder or .gguf file /no/such/folder"),
        ("a/b/c", "no folder or .gguf file a/b/c"),
        ("models/absent.gguf", "no folder or .gguf file models/absent.gguf"),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    refused(source, words)
    with pytest.raises(TaperlitError, match=words):
        tokenizer_json_of(source)


def hub(monkeypatch, answer, files=None) -> list[dict]:
    """Stand in for the hub at its client's two public functions; returns what was asked of it."""
    asked = []

    def auth_check(self, name):
        if answer is not None:
            raise answer

    def snapshot_download(name, **options):
        asked.append({"name": name, **options})
        if files is None:
            raise LocalEntryNotFoundError("not in the cache")
        return str(files)

    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", auth_check)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def http_error(kind):
    import huggingface_hub.errors as errors

    return getattr(errors, kind)("401 Client Error", response=Mock())


def test_what_the_hub_will_not_give_is_told_in_one_line(monkeypatch):
    hub(monkeypatch, http_error("GatedRepoError"))
    refused("meta/model", "meta/model is gated: accept its terms at https://huggingface.co/meta/model, then log in")
    hub(monkeypatch, http_error("RepositoryNotFoundError"))
    refused("meta/model", "The hub has no model meta/model .* and there is no such folder here")
    asked = hub(monkeypatch, OSError("no route"))
    refused("meta/model", "hub cannot be reached and its cache here has no meta/model; go online, or give")
    assert asked[0]["local_files_only"]  # so that nothing is tried again and again
    with pytest.raises(TaperlitError, match="hub cannot be reached"):
        read_origin("gpt2")


def test_a_model_of_the_hub_is_one_commits_small_files_and_then_its_weights(folder, monkeypatch, tmp_path):
    commit = tmp_path / ("f" * 40)
    folder.rename(commit)
    asked = hub(monkeypatch, None, commit)
    model = load_pretrained("someone/llama")
    assert torch.equal(logits(model), expected(small_models.build("llama")))
    assert model.origin.name == "someone/llama"
    first, second = asked
    assert not any("safetensors" in pattern for pattern in first["allow_patterns"])
    assert (second["revision"], "model.safetensors" in second["allow_patterns"]) == (commit.name, True)
    assert not first["local_files_only"]
    asked.clear()
    assert read_origin("someone/llama") == model.origin
    assert asked == [first]
    (commit / "config.json").unlink()
    refused("someone/llama", r"someone/llama has no config\.json, so it is no pretrained model")


def test_the_hub_of_this_machine_answers_at_once_or_says_that_it_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("no-such-owner/no-such-model", "hub cannot be reached and its cache here has no no-such-owner/no-such")


MODELING = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_kind"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(tmp_path / "ran")))
    maps = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(folder, model_type="own_kind", auto_map=maps)
    words = (
        r"some-llama is a own_kind, .* the code that comes with the model; .* `taperlit fit --model.remote_code true`"
    )
    refused(folder, words)
    with pytest.raises(TaperlitError, match=words):
        read_origin(str(folder))
    assert not (tmp_path / "ran").exists()
    origin = read_origin(str(folder), remote_code=True)
    with pytest.raises(TaperlitError, match=r"does not have .own_kind.; a checkpoint of such a model cannot be loaded"):
        build_pretrained(origin)
    assert not (tmp_path / "ran").exists()
    model = load_pretrained(str(folder), remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(model.lm).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(model), expected(small_models.build("llama")))


def test_code_is_not_run_where_transformers_has_the_class(folder, tmp_path):
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(tmp_path / "ran")))
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    model = load_pretrained(str(folder), remote_code=True)
    assert type(model.lm) is tf.LlamaForCausalLM
    assert not (tmp_path / "ran").exists()


def test_what_is_no_causal_language_model_is_refused(folder, tmp_path):
    bert = tf.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    tf.BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "bert .*causal language model|BertLMHeadModel")
    change_config(folder, model_type="vit")
    refused(folder, "no causal language model that transformers knows .model_type 'vit'")
    change_config(folder, model_type="unheard_of")
    refused(folder, "no causal language model that transformers knows .model_type 'unheard_of'")
    change_config(folder, model_type=None)
    refused(folder, "no causal language model that transformers knows .model_type None")
    change_config(folder, model_type="t5", is_encoder_decoder=True)
    refused(folder, "is an encoder-decoder .t5.")
    change_config(folder, format="taperlit-folded-2")
    refused(folder, "is a folded model of taperlit")
    (folder / "config.json").write_text("{")
    refused(folder, "some-llama: config.json is damaged: it is not a JSON object; download it again")
    (folder / "config.json").write_bytes(b"\xff")
    refused(folder, r"some-llama/config\.json is damaged \('utf-8' codec .*\); download it again\.$")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json, so it is no pretrained model's folder")
    refused(folder / "tokenizer.json", "tokenizer.json is a file, but not a .gguf")


def test_a_model_whose_tokens_see_later_ones_is_refused(folder, monkeypatch):
    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.model.embed_tokens(input_ids.flip(1).cumsum(1) % 300)})

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", forward)
    refused(folder, "some-llama is no causal language model: a token's logits change with later tokens")


def test_weights_that_are_not_the_configs_are_refused_and_never_made_up(folder):
    path = folder / "model.safetensors"
    whole = load_file(path)

    def write(values):
        save_file(values, path, {"format": "pt"})

    name = "model.layers.1.mlp.up_proj.weight"
    write({key: value for key, value in whole.items() if key != name})
    refused(folder, rf"some-llama: {name} is in its class, but not in its weights")
    write({**whole, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32), "value_head.weight": torch.zeros(1)})
    refused(folder, r"q_proj\.bias \(and 1 more\) is in its weights, but not in its class")
    write({**whole, name: torch.zeros(3, 3)})
    refused(folder, rf"some-llama: {name} has another shape in its weights than in its class")
    write({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # as Llama's first files had it
    assert torch.equal(logits(load_pretrained(str(folder))), expected(small_models.build("llama")))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_truncated_files_are_refused(folder, gguf, share):
    for path, source in ((folder / "model.safetensors", folder), (gguf, gguf)):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        refused(source, f"{source.name} cannot be .*truncated")
    gguf.write_bytes(b"GG")
    refused(gguf, "tiny.gguf is not a GGUF file")


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path, monkeypatch):
    import gguf as library

    add = library.GGUFWriter.add_tensor
    monkeypatch.setattr(
        library.GGUFWriter, "add_tensor", lambda self, name, data: "ffn_up" in name or add(self, name, data)
    )
    path = small_models.write_gguf(small_models.build("llama"), tmp_path / "part.gguf")
    refused(path, r"part.gguf: model\.layers\.0\.mlp\.up_proj\.weight .* is in its class, but not in its weights")


# What transformers passes over in silence, and would load another model.
PASSED_OVER = {
    "llama 3.1": (lambda w: w.add_tensor("rope_freqs.weight", ONES), r"rope_freqs\.weight has no place in the model"),
    "biases": (
        lambda w: [w.add_tensor(f"blk.1.attn_{part}.bias", np.repeat(ONES, 8)) for part in ("q", "output")],
        r"blk\.1\.attn_output\.bias \(and 1 more\) has no place in the model that transformers makes of it; give the",
    ),
    "linear": (
        lambda w: (w.add_rope_scaling_type(RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0)),
        r"llama\.rope\.scaling\.type is linear, but not in the model that transformers makes of it; give the model's",
    ),
    "yarn": (lambda w: w.add_rope_scaling_type(RopeScalingType.YARN), r"llama\.rope\.scaling\.type is yarn, but"),
    "factor": (lambda w: w.add_rope_scaling_factor(4.0), r"llama\.rope\.scaling\.factor is 4\.0, but"),
    "old factor": (lambda w: w.add_float32("llama.rope.scale_linear", 2.0), r"llama\.rope\.scale_linear is 2\.0, but"),
    "window": (lambda w: w.add_sliding_window(64), r"llama\.attention\.sliding_window is 64, but"),
    "width": (lambda w: w.add_key_length(16), r"llama\.attention\.key_length is 16, but"),
    "epsilon": (lambda w: w.add_layer_norm_eps(1e-3), r"llama\.attention\.layer_norm_epsilon is 0\.001\d*, but"),
    "scale": (lambda w: w.add_attention_scale(0.5), r"llama\.attention\.scale is 0\.5, but"),
    "clamp": (lambda w: w.add_clamp_kqv(8.0), r"llama\.attention\.clamp_kqv is 8\.0, but"),
    "alibi": (lambda w: w.add_max_alibi_bias(8.0), r"llama\.attention\.max_alibi_bias is 8\.0, but"),
    "cap": (lambda w: w.add_final_logit_softcapping(30.0), r"llama\.final_logit_softcapping is 30\.0, but"),
    "logits": (lambda w: w.add_logit_scale(0.5), r"llama\.logit_scale is 0\.5, but"),
    "both ways": (lambda w: w.add_causal_attention(False), r"llama\.attention\.causal is False, but"),
    "layers": (
        lambda w: w.add_array("llama.swiglu_clamp_exp", [0.0, 7.0]),
        r"llama\.swiglu_clamp_exp is \[0\.0, 7\.0\]",
    ),
    "unheard of": (lambda w: w.add_string("llama.curvature", "hyperbolic"), r"llama\.curvature is hyperbolic, but"),
}


@pytest.mark.parametrize("what", PASSED_OVER)
def test_a_gguf_file_that_says_more_than_the_model_is_refused(what, tmp_path):
    add, words = PASSED_OVER[what]
    path = small_models.write_gguf(small_models.build("llama"), tmp_path / "tiny.gguf", add=add)
    refused(path, rf"tiny\.gguf: {words}")


def test_a_gguf_file_may_say_what_the_model_has(tmp_path):
    def add(writer):
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.add_rope_scaling_factor(4.0)  # of no scaling
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_sliding_window(0)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_attention_scale(8**-0.5)
        writer.add_causal_attention(True)
        writer.add_logit_scale(1.0)
        writer.add_array("llama.swiglu_clamp_exp", [0.0, 0.0])
        writer.add_tensor_data_layout("Meta AI original pth")

    theirs = small_models.build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = small_models.write_gguf(theirs, tmp_path / "tiny.gguf", add=add)
    torch.testing.assert_close(logits(load_pretrained(str(path))), expected(theirs), rtol=1e-6, atol=1e-6)


def test_a_tied_head_may_be_in_a_gguf_file_too(tmp_path):
    tied = small_models.build("llama_tied")
    table = tied.lm_head.weight.detach()

    def check(head):
        path = small_models.write_gguf(tied, tmp_path / "x", add=lambda w: w.add_tensor("output.weight", head.numpy()))
        check_gguf(path, "x", tied)

    check(table)
    with pytest.raises(TaperlitError, match=r"x: output\.weight has no place in the model"):
        check(table + 1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "add", "words"),
    [
        ("gemma2", {}, lambda w: (w.add_sliding_window(64), w.add_attn_logit_softcapping(50.0)), None),
        ("gemma2", {}, lambda w: w.add_sliding_window(0), r"gemma2\.attention\.sliding_window is 0, but"),
        # Its file does not say how attention is scaled, and transformers takes 256 for every model.
        ("gemma2", {"query_pre_attn_scalar": 16}, lambda w: None, r"gemma2\.attention\.scale is 0\.353"),
        ("phi3", {}, lambda w: (w.add_rope_scaling_orig_ctx_len(64), w.add_rope_dimension_count(8)), None),
        ("phi3", {}, lambda w: w.add_rope_dimension_count(6), r"phi3\.rope\.dimension_count is 6, but"),
        ("starcoder2", {}, lambda w: (w.add_rope_freq_base(1e4), w.add_layer_norm_eps(1e-5)), None),
        ("starcoder2", {}, lambda w: w.add_rope_freq_base(1e6), r"starcoder2\.rope\.freq_base is 1000000\.0, but"),
        ("falcon", {}, lambda w: (w.add_head_count_kv(1), w.add_tensor_data_layout("jploski")), None),
        ("mixtral", {}, lambda w: w.add_expert_used_count(3), r"mixtral\.expert_used_count is 3, but"),
    ],
)
def test_other_headers(name, changes, add, words, tmp_path):
    """Of files that hold all values in one tensor: the header is all that is looked at by name."""
    lm = small_models.build(name, **changes)
    writer = GGUFWriter(str(tmp_path / "x"), name)
    add(writer)
    count = sum(parameter.numel() for parameter in lm.parameters())
    writer.add_tensor("all", np.zeros(count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if words is None:
        check_gguf(tmp_path / "x", "x", lm)
    else:
        with pytest.raises(TaperlitError, match=rf"x: {words}"):
            check_gguf(tmp_path / "x", "x", lm)


def test_pickled_weights_are_refused_until_they_are_converted(folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    words = refused(folder, "some-llama has no model.safetensors; pickled weights .* can run code")
    advice = words[words.index("transformers.AutoModelForCausalLM") : words.index(", and AutoTokenizer likewise")]
    exec(advice.replace("FOLDER", repr(str(tmp_path / "converted"))), {"transformers": tf})
    assert torch.equal(logits(load_pretrained(str(tmp_path / "converted"))), expected(small_models.build("llama")))


def test_quantized_models_and_adapters_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"some-llama is quantized \(gptq\), and tapering trains float weights; give the model it was made")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "some-llama holds an adapter; merge it into its base model")


def test_a_missing_package_is_told_with_its_extra(folder, gguf, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    refused(folder, r"need transformers: pip install 'taperlit\[hub\]'")
    monkeypatch.undo()
    monkeypatch.setattr(hub_load, "find_spec", lambda name: None if name == "gguf" else name)
    refused(gguf, r"GGUF files need the package gguf: pip install 'taperlit\[hub\]'")
