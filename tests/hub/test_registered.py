"""Folded models in the Auto classes after ``import taperlit``: both orders, saved and loaded, generating, pickled."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import small_models
import torch
import transformers as tf
from families import close_with_random_maps

from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.export import export_transformers
from taperlit.hub.load import build_pretrained, load_pretrained
from taperlit.hub.registered import PREFIX, fold_config, stock_config
from taperlit.norm import tapered_norms
from taperlit.structure import Structure
from taperlit.surgery import taper

TOKENS = torch.arange(3, 43).view(2, 20)
BLOCKS = {
    "llama": ["*.layers.*layernorm"],
    "gpt2": ["*ln_1", "*ln_2"],
    "gemma2": ["*input_layernorm", "*pre_feedforward_layernorm"],
}


def export(name, folder) -> tuple[CausalLM, torch.Tensor]:
    """A folded model that keeps its final norm, exported; and its logits."""
    model = load_pretrained(str(small_models.saved(name, folder.parent / f"{name}-in")))
    taper(model, BLOCKS[name])
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS))
    export_transformers(model, structure, folder)
    with torch.no_grad():
        return model, model(TOKENS)


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    return lm.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", [*BLOCKS])
def test_saved_and_loaded_again(tmp_path, name):
    model, wanted = export(name, tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == PREFIX + type(model.lm).__name__
    assert isinstance(loaded, type(model.lm))
    assert torch.equal(logits(loaded), wanted)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len([*(tmp_path / "again").glob("*.safetensors")]) > 1
    again, found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(type(again).from_pretrained(tmp_path / "again")), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(again))), wanted)
    assert torch.equal(logits(copy.deepcopy(again)), wanted)
    config = tf.AutoConfig.from_pretrained(tmp_path / "again")
    assert config.to_dict() == again.config.to_dict()
    assert type(stock_config(config)) is type(model.lm.config)
    in_bfloat16 = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in in_bfloat16.parameters()} == {torch.bfloat16}
    fresh = tf.AutoModelForCausalLM.from_config(config)
    assert fresh.state_dict().keys() == again.state_dict().keys()


def test_it_generates_with_a_cache(tmp_path):
    model, _ = export("llama", tmp_path / "out")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = loaded.generate(TOKENS, **options)
    assert torch.equal(tokens, model.lm.generate(TOKENS, **options))
    assert torch.equal(tokens, loaded.generate(TOKENS, use_cache=False, **options))


def test_it_goes_in_and_is_folded_further(tmp_path):
    """The norm that was left is folded too, and what comes out then is the stock class."""
    _, wanted = export("llama", tmp_path / "out")
    model = load_pretrained(str(tmp_path / "out"))
    assert type(model.lm).__name__ == "FoldedLlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(TOKENS), wanted)
    assert type(build_pretrained(model.origin).lm) is type(model.lm)
    taper(model, ["*"])
    assert [*tapered_norms(model)] == ["lm.model.norm"]
    close_with_random_maps(tapered_norms(model))
    structure = fold(model, lambda: model(TOKENS))
    assert export_transformers(model, structure, tmp_path / "stock").reason is None
    stock = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is tf.LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(logits(stock), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_record_that_does_not_fit():
    config = small_models.CONFIGS["llama"]()
    structure = Structure(identities={"model.layers.9.norm": []}, scales={}, biases={}, untied=[], difference=0.0)
    with pytest.raises(TaperlitError, match="structure does not fit"):
        tf.AutoModelForCausalLM.from_config(fold_config(config, structure))


def test_a_model_that_this_version_has_not(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "taperlit", "base_model_type": "of-tomorrow"}))
    with pytest.raises(TaperlitError, match="has no 'of-tomorrow', the kind of model"):
        tf.AutoConfig.from_pretrained(tmp_path)


TAPERLIT_FIRST = """
import sys, taperlit
assert "transformers" not in sys.modules
from importlib.util import find_spec
assert find_spec("transformers.models.auto.configuration_auto")  # which asks, and imports only the packages around it
from transformers import AutoConfig, AutoModelForCausalLM
"""
TRANSFORMERS_FIRST = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "taperlit" in str(error)
else:
    raise AssertionError("transformers knows folded models without us")
import taperlit
"""
LOAD = """
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__ == "FoldedLlamaForCausalLM"
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "FoldedLlamaConfig"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("taperlit")]
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [TAPERLIT_FIRST, TRANSFORMERS_FIRST], ids=["taperlit first", "transformers first"])
def test_both_orders_of_import(tmp_path, order):
    export("llama", tmp_path / "out")
    program = [sys.executable, "-c", order + LOAD, str(tmp_path / "out")]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
