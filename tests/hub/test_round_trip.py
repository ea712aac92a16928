"""In, tapered, folded, out, and in again: fourteen architectures of ``transformers``, each against itself."""

import json
import subprocess
import sys
import warnings

import pytest
import small_models
import torch
import transformers as tf
from families import FAMILIES, close_with_random_maps

from taperlit.checkpoint.folded import load_model, read_model, write_folded
from taperlit.cli import main
from taperlit.compare import largest_difference
from taperlit.decode.engine import Engine
from taperlit.folding import fold
from taperlit.hub.load import load_pretrained
from taperlit.norm import tapered_norms
from taperlit.training.policy import apply_policy

# Norms in a block that something else than a linear map reads, with the words for it.
UNTOUCHED = {
    "Qwen3": {"self_attn.q_norm": "mul", "self_attn.k_norm": "mul"},
    "Gemma2": {"post_attention_layernorm": "add", "post_feedforward_layernorm": "add"},
    "OLMo2": {
        "self_attn.q_norm": "mul",
        "self_attn.k_norm": "mul",
        "post_attention_layernorm": "add",
        "post_feedforward_layernorm": "add",
    },
}
STOCK = ("GPT-2", "Llama", "Mistral", "Qwen2", "Phi-3", "GPT-NeoX", "StarCoder2", "Gemma", "Falcon", "GPT-J")
ROUNDING = 2e-6  # of float32, relative to the largest logit, through two layers


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "all") for name in (*STOCK, "OPT", *UNTOUCHED)), ("GPT-2", "internal"), ("Llama", "internal")],
)
@torch.no_grad()
def test_in_and_out_again(tmp_path, name, policy):
    family = FAMILIES[name]
    theirs = family.make()
    theirs.save_pretrained(tmp_path / "in")
    tokens = family.batch()["input_ids"]
    wanted = theirs(input_ids=tokens).logits

    model = load_pretrained(str(tmp_path / "in"))
    assert torch.equal(model(tokens), wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Qwen3's blocks have norms of another kind
        left = apply_policy(model, policy)
    assert {place: readers[0] for place, readers in left.items()} == UNTOUCHED.get(name, {})
    norms = tapered_norms(model)
    assert (f"lm.{model.names.final_norm}" in norms) == (policy == "all")
    assert torch.equal(model(tokens), wanted)  # g = 1

    close_with_random_maps(norms)
    linear = model(tokens)
    assert largest_difference(wanted, linear) > 0.01
    structure = fold(model, lambda: model(tokens))  # which compares in float64
    assert structure["difference"] <= 1e-9
    assert structure["identities"].keys() == norms.keys()
    folded = model(tokens)
    assert largest_difference(linear, folded) < ROUNDING

    read = read_model(write_folded(tmp_path / "folded", model, structure))
    assert torch.equal(read.model(tokens), folded)
    assert read.structure == structure

    command = ["export", "--to=transformers", "--model", str(tmp_path / "folded"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"] == "taperlit") == (name in ("OPT", *UNTOUCHED) or policy == "internal")
    exported = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(exported, type(theirs))
    assert largest_difference(folded, exported(input_ids=tokens, use_cache=False).logits) < ROUNDING

    again = load_pretrained(str(tmp_path / "out"))
    assert largest_difference(folded, again(tokens)) < ROUNDING


STOCK_PROGRAM = """
import json, sys
import torch
import transformers

answers = {}
for folder, dtype in json.loads(sys.argv[1]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    inputs = tokenizer("def function_3(x):", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers[folder] = [type(model).__name__, tokens[0].tolist()]
assert not [name for name in sys.modules if name.split(".")[0] == "taperlit"]
print(json.dumps(answers))
"""


@pytest.mark.slow
@torch.no_grad()
def test_stock_transformers_alone_gives_the_engines_tokens(tmp_path):
    wanted, folders = {}, []
    prompt = small_models.tokenizer().encode("def function_3(x):").ids
    for name in ("gpt2", "llama", "llama_tied"):
        model = load_pretrained(str(small_models.saved(name, tmp_path / name)))
        apply_policy(model, "all")
        close_with_random_maps(tapered_norms(model))
        tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
        structure = fold(model, lambda model=model, tokens=tokens: model(tokens))
        tokenizer_json = (tmp_path / name / "tokenizer.json").read_text()
        folded = write_folded(tmp_path / f"{name}-folded", model, structure, tokenizer_json)
        out = tmp_path / f"{name}-out"
        assert main(["export", "--to=transformers", "--model", str(folded), "--out", str(out)]) == 0
        engine = Engine(load_model(folded).model)
        wanted[str(out)] = [type(model.lm).__name__, [*prompt, *engine.generate([prompt], 12)[0]]]
        folders.append((str(out), "float32"))
    run = subprocess.run(
        [sys.executable, "-c", STOCK_PROGRAM, json.dumps(folders)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == wanted
