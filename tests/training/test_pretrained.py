"""Pretrained models trained as ours are: tapered, interrupted, saved, folded, loaded again."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import saved, tokenizer

from taperlit import AlignmentFreeze, FoldOnEnd, GateSchedule, TaperlitError, TextDataModule, Trainer
from taperlit.checkpoint.folded import load_any, load_checkpoint, read_model
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.lora import Lora
from taperlit.norm import Phase, shared_gate, tapered_norms
from taperlit.training.module import LanguageModel

TOKENS = torch.arange(48).view(3, 16) * 11 % 300


@pytest.fixture
def data(tmp_path):
    text = "def f(x):\n    return x * 3 + the_other(value, 2)\n" * 40
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"{i} {text}")
    return dict(
        files=str(tmp_path / "*.txt"), block_size=16, batch_size=4, val_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def fit(folder, root, data, callbacks=(), ckpt_path=None, **options):
    module = LanguageModel(pretrained=str(folder), **{"lr": 1e-3, "warmup": 2, **options})
    trainer = Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=root,
        callbacks=list(callbacks),
        limit_val_batches=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, TextDataModule(tokenizer=str(folder), **data), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def tapering():
    return [GateSchedule(3, 8), AlignmentFreeze(ema_rate=0.3)]


@pytest.mark.parametrize(("name", "policy"), [("gpt2", "all"), ("llama_tied", "internal"), ("qwen3", "all")])
def test_a_pretrained_model_is_tapered_saved_folded_and_loaded(name, policy, tmp_path, data):
    folder = saved(name, tmp_path / name)
    fold = FoldOnEnd(str(tmp_path / "folded"), module="model")
    trainer, module = fit(folder, tmp_path, data, callbacks=[*tapering(), fold], taper=policy)
    assert shared_gate(module).phase is Phase.LINEAR
    count = len(tapered_norms(module))
    assert count == (4 if policy == "internal" else 5)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = module.eval()(TOKENS)
    folder.rename(tmp_path / "gone")  # neither fold nor checkpoint needs what it came from
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(loaded.model, CausalLM)
    assert loaded.structure is None
    assert torch.equal(loaded.model(TOKENS), expected)
    folded = read_model(tmp_path / "folded")
    assert not tapered_norms(folded.model)
    assert len(folded.structure["identities"]) == count
    torch.testing.assert_close(folded.model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert folded.tokenizer_json == loaded.tokenizer_json == trainer.datamodule.tokenizer_json
    assert folded.model.origin == loaded.model.origin == module.model.origin
    assert folded.model.origin.files.keys() >= {"config.json", "generation_config.json", "chat_template.jinja"}


def test_a_run_starts_from_the_weights_in_the_folder(tmp_path, data):
    folder = saved("llama", tmp_path / "llama")
    own = load_any(folder).model
    module = LanguageModel(pretrained=str(folder), taper="all")
    module.configure_model()
    assert module.model.training
    assert torch.equal(module.loss(TOKENS)[0], own(TOKENS[:, :-1], TOKENS[:, 1:]))


def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, data):
    folder = saved("gpt2", tmp_path / "gpt2")
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=5, save_top_k=-1)
    _, whole = fit(folder, tmp_path, data, taper="internal", callbacks=[*tapering(), saving])
    path = tmp_path / "saved/step=5.ckpt"
    _, resumed = fit(folder, tmp_path, data, taper="internal", callbacks=tapering(), ckpt_path=path)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_adapters_train_with_the_norms_and_are_merged_on_loading(tmp_path, data):
    folder = saved("llama", tmp_path / "llama")
    before = load_any(folder).model.state_dict()
    fold = FoldOnEnd(str(tmp_path / "folded"), module="model")
    trainer, module = fit(
        folder, tmp_path, data, taper="internal", lora=Lora(rank=2), callbacks=[*tapering(), fold], lr=1e-2
    )
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or "norm" in n for n in trained)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt").model
    assert not [n for n in loaded.state_dict() if "lora" in n or "base_layer" in n]
    torch.testing.assert_close(loaded(TOKENS), module.eval()(TOKENS), rtol=1e-4, atol=1e-4)
    name = "lm.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(loaded.state_dict()[name], before[name])
    folded = read_model(tmp_path / "folded").model
    torch.testing.assert_close(folded(TOKENS), module(TOKENS), rtol=1e-4, atol=1e-4)


def test_other_tokens_than_the_models_own_are_refused(tmp_path, data):
    folder = saved("gpt2", tmp_path / "gpt2")
    other = tokenizer()
    other.add_tokens(["another"])
    other.save(str(tmp_path / "other.json"))
    module = LanguageModel(pretrained=str(folder))
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(TaperlitError, match=r"data.tokenizer is not the tokenizer of .*gpt2.*; set data.tokenizer to"):
        trainer.fit(module, TextDataModule(tokenizer=str(tmp_path / "other.json"), **data))


def test_a_token_that_the_weights_have_not_is_refused_where_the_data_has_it(tmp_path, data):
    folder = saved("gpt2", tmp_path / "gpt2")
    more = tokenizer()
    more.add_tokens(["another"])  # 300, as one for padding that was added to the tokenizer alone
    more.save(str(folder / "tokenizer.json"))
    fit(folder, tmp_path, data)  # no text has it
    (tmp_path / "0.txt").write_text("another " * 200)
    with pytest.raises(
        TaperlitError, match=r"has the token id 300, and the weights of .*gpt2 are for the ids up to 299"
    ):
        fit(folder, tmp_path, data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"model.preset is None and model.pretrained is None; give one of them"),
        ({"preset": "small_1m", "pretrained": "x"}, r"give one of them"),
        ({"preset": "small_1m", "lora": Lora()}, "model.lora adapts pretrained models"),
        ({"pretrained": "x", "overrides": {"d_model": 8}}, "model.overrides changes a preset"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(TaperlitError, match=words):
        LanguageModel(**options)


def test_a_context_beyond_the_models_is_refused_with_the_mend(tmp_path, data):
    folder = saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(TaperlitError, match=r"block_size 129 is more than the model's context 128; lower .* to 128"):
        fit(folder, tmp_path, {**data, "block_size": 129, "batch_size": 1})


def test_a_mixture_of_experts_goes_the_whole_way(tmp_path, data):
    folder = saved("mixtral", tmp_path / "mixtral")
    fold = FoldOnEnd(str(tmp_path / "folded"), module="model")
    _, module = fit(folder, tmp_path, data, callbacks=[*tapering(), fold], taper="all")
    folded = read_model(tmp_path / "folded")
    assert len(folded.structure["identities"]) == 5
    torch.testing.assert_close(folded.model(TOKENS), module.eval()(TOKENS), rtol=1e-4, atol=1e-4)
