"""What :func:`load_checkpoint` makes of a checkpoint, against the model that was written."""

import os
import warnings

import pytest
import torch
from conftest import TINY
from test_assign import Ledger
from torch.distributed.checkpoint import save

from taperlit.checkpoint.folded import load_checkpoint, load_model, write_folded
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.checkpoint.sharded import DIGEST, digest
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, shared_gate, tapered_norms
from taperlit.training.policy import apply_policy


def checkpoint_of(model, taper, **changes):
    """A checkpoint's content as this version writes it, as far as its readers look."""
    config = {name: getattr(model.config, name) for name in (*TINY, "norm", "tied")}
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}
        | {"val_loss": torch.ones(2)},
        "optimizer_states": [{"state": {"x": {"exp_avg": torch.zeros(1000)}}, "param_groups": []}],
        "hyper_parameters": {"preset": "small_1m", "taper": taper, "overrides": config, "lr": 0.1},
        "TextDataModule": {"tokenizer": "{}", "sample": torch.arange(12).view(3, 4)},
        "taperlit": {"format": CHECKPOINT_FORMAT},
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    """Writes a checkpoint's content as a file, or as shards, where a tied matrix comes twice."""

    def write(content, form):
        path = tmp_path / "last.ckpt"
        if form == "file":
            torch.save(content, path)
            return path
        content = dict(content)
        state = {"state_dict": {key: value.clone() for key, value in content.pop("state_dict").items()}}
        state["optimizer_0"] = content.pop("optimizer_states")[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(state, checkpoint_id=path)
        torch.save(content, path / "meta.pt")
        (path / DIGEST).write_text(digest(path))
        return path

    return write


def tapered(tiny, policy, dtype=torch.float32, g=0.25, **changes):
    model = tiny(**changes)
    apply_policy(model, policy)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.fill_(0.7)
            norm.alignment_ema.copy_(torch.tensor([7.0, 10.0, 0.5]))
            norm.frozen.fill_(True)
            norm.taper_weight.normal_(1, 0.3)
        if gate := shared_gate(model):
            gate.set(g)
    return model.to(dtype).eval()


@pytest.mark.parametrize("form", ["file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("policy", "tied"), [("none", False), ("internal", True), ("all", True)])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_it_is_the_model_that_was_written_in_float32(tiny, write, form, dtype, policy, tied, norm):
    model = tapered(tiny, policy, dtype, tied=tied, norm=norm)
    loaded = load_checkpoint(write(checkpoint_of(model, policy), form))
    expected = model.float()
    assert loaded.model.config == expected.config
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype, name
    assert (loaded.model.head.weight is loaded.model.tok_embed.weight) == tied
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(loaded.model(tokens), expected(tokens))
    assert tapered_norms(loaded.model).keys() == tapered_norms(expected).keys()
    for module in tapered_norms(loaded.model).values():
        assert module.gate is shared_gate(loaded.model)
        assert module.gate.phase is Phase.BLEND
        assert torch.equal(module.pending, torch.zeros(3))
    assert loaded.tokenizer_json == "{}"
    assert torch.equal(loaded.sample, torch.arange(12).view(3, 4))


@pytest.mark.parametrize("form", ["file", "shards", "folded"])
def test_loading_fills_no_parameter_and_copies_each_value_once(tiny, write, tmp_path, form):
    model = tapered(tiny, "internal" if form != "folded" else "none", tied=True)
    if form == "folded":
        path = write_folded(tmp_path / "out", model, {"identities": {}, "scales": {}, "biases": {}, "untied": []})
    else:
        path = write(checkpoint_of(model, "internal"), form)
    weights = sum(parameter.numel() for parameter in model.parameters())
    rest = sum(buffer.numel() for buffer in model.buffers()) + 3 * len(tapered_norms(model))
    with Ledger() as ledger:
        load_model(path)
    # Of a sharded checkpoint torch fills the tensors itself, a tied matrix twice.
    twice = model.head.weight.numel() if form == "shards" else 0
    assert ledger.filled <= rest + (weights + twice + 2 if form == "shards" else 0)
    assert ledger.copied <= weights + rest + twice


def test_a_folded_model_in_bfloat16_is_loaded_in_float32(tiny, tmp_path):
    model = tiny(tied=True).bfloat16().eval()
    write_folded(tmp_path / "out", model, {"identities": {}, "scales": {}, "biases": {}, "untied": []})
    loaded = load_model(tmp_path / "out").model
    assert {value.dtype for value in (*loaded.parameters(), *loaded.buffers())} == {torch.float32}
    tokens = torch.randint(300, (2, 9))
    assert torch.equal(loaded(tokens), model.float()(tokens))


def test_nothing_stays_mapped(tiny, write):
    path = write(checkpoint_of(tapered(tiny, "none"), "none"), "file")
    loaded = load_checkpoint(path)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with open(path, "r+b") as file:  # the same inode
        file.write(os.urandom(path.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.sample.sum() == 66


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tiny, write, monkeypatch):
    path = write(checkpoint_of(tapered(tiny, "none"), "none"), "file")
    load = torch.load

    def replaced(*args, **kwargs):
        other = path.with_name("other")
        torch.save(checkpoint_of(tapered(tiny, "none"), "none"), other)
        other.replace(path)
        return load(*args, **kwargs)

    monkeypatch.setattr("taperlit.checkpoint.reader.torch.load", replaced)
    with pytest.raises(TaperlitError, match=r"last\.ckpt was replaced while it was read; load it again"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["state_dict"].pop("model.blocks.0.mlp.up_proj.weight"), r"has no blocks\.0\.mlp\.up_proj\.weight"),
        (lambda c: c["state_dict"].update({"model.more": torch.ones(1)}), "has more, which Transformer has not"),
        (lambda c: c["state_dict"].update({"model.more": 3}), r"holds no tensor for model\.more"),
        (lambda c: c["state_dict"].update({"model.head.weight": torch.ones(300, 8)}), r"mismatch for head\.weight"),
        (lambda c: c["hyper_parameters"].pop("taper"), "does not say which model"),
        (lambda c: c["hyper_parameters"].pop("preset"), "does not say which model"),
        (lambda c: c["hyper_parameters"].update(preset="gpt9"), "No preset 'gpt9'"),
        (lambda c: c["hyper_parameters"].update(taper="some"), "model.taper is 'some'"),
        (lambda c: c["hyper_parameters"].update(taper="none"), r"has blocks\.0\.attn_norm\.taper_weight"),
        (
            lambda c: c["hyper_parameters"]["overrides"].update(tied=True),
            r"model\.head\.weight differ",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tiny, write, change, words):
    content = checkpoint_of(tapered(tiny, "internal"), "internal")
    change(content)
    with pytest.raises(TaperlitError, match=words) as error:
        load_checkpoint(write(content, "file"))
    assert "\n" not in str(error.value)
