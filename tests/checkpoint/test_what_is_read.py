"""Files of ours that say what they should not: refused in one line that names file, field and mend."""

import json
import math
import os
import re
import shutil
import zipfile
from types import SimpleNamespace
from typing import Any, Literal, TypedDict

import pytest
import torch
from conftest import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from taperlit.checkpoint import folded as folded_module
from taperlit.checkpoint.archive import check_zip
from taperlit.checkpoint.assign import check_finite
from taperlit.checkpoint.atomic import write_file
from taperlit.checkpoint.checksum import TENSORS, checksum, checksum_of
from taperlit.checkpoint.folded import load_checkpoint, load_folded, load_model, write_folded
from taperlit.checkpoint.plain import read_json
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT, open_checkpoint
from taperlit.checkpoint.sizes import check_counts
from taperlit.errors import TaperlitError
from taperlit.fields import mismatch
from taperlit.transformer import Transformer, TransformerConfig

EMPTY = {"identities": {}, "scales": {}, "biases": {}, "untied": []}
BUILT = "a model was built"


class Part(TypedDict):
    sizes: list[int]
    name: str | None


class Whole(TypedDict, total=False):
    part: Part
    kind: Literal["a", "b"]
    share: float
    on: bool
    anything: Any
    parts: dict[str, Part]


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({}, None),
        ({"share": 3, "on": False, "kind": "b", "anything": [{}], "part": {"sizes": [1], "name": None}}, None),
        ([], r"it is \[\], not a dictionary"),
        ({"share": True}, "it.share is True, not a finite number"),
        ({"share": math.nan}, "it.share is nan, not a finite number"),
        ({"share": 10**400}, "it.share is an integer of 1329 bits, not a finite number"),
        ({"on": 1}, "it.on is 1, not true or false"),
        ({"kind": "c"}, "it.kind is 'c', not 'a' or 'b'"),
        ({"kind": ["a"]}, "it.kind is a list of 1, not 'a' or 'b'"),
        ({"more": 1}, "it.more is no field of it"),
        ({"part": {"sizes": []}}, "it.part.name is missing"),
        ({"part": {"sizes": [1, 2.0], "name": "x"}}, r"it.part.sizes\[1\] is 2.0, not an integer"),
        ({"part": {"sizes": [], "name": 3}}, "it.part.name is 3, not a text or null"),
        ({"parts": {"x": {"sizes": [True], "name": "x"}}}, r"it.parts.x.sizes\[0\] is True, not an integer"),
    ],
)
def test_what_a_hint_does_not_say_is_named(value, wrong):
    told = mismatch(value, Whole, "it")
    if wrong is None:
        assert told is None
    else:
        assert told is not None
        assert re.fullmatch(wrong, told), told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "caf\xe9"}', "utf-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b"", "is damaged"),
        (None, "is missing; make it again"),
        ("folder", "is no file; make it again"),
        ("pipe", "is no file; make it again"),
    ],
)
def test_a_json_file_is_strict_and_never_waited_for(tmp_path, content, words):
    path = tmp_path / "meta.json"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TaperlitError, match=words) as error:
        read_json(path, "make it again")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_system_refuses_is_not_called_damaged(tiny, tmp_path, monkeypatch):
    write_folded(tmp_path / "out", tiny(), EMPTY, "{}")

    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(folded_module, "checksum", denied)
        with pytest.raises(TaperlitError, match=r"model\.safetensors cannot be read: Permission denied\.$"):
            load_model(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", denied)
        with pytest.raises(TaperlitError, match=r"config\.json cannot be read: Permission denied\.$"):
            load_model(tmp_path / "out")
    torch.save({}, tmp_path / "last.ckpt")
    monkeypatch.setattr("taperlit.checkpoint.reader.check_zip", denied)
    with pytest.raises(TaperlitError, match=r"last\.ckpt cannot be read: Permission denied\.$"):
        open_checkpoint(tmp_path / "last.ckpt")


def archives(tmp_path, value):
    """An archive, and the same with one bit of its tensor another."""
    path = tmp_path / "x.ckpt"
    torch.save({"x": torch.full((1000,), value)}, path)
    good = path.read_bytes()
    place = good.index(torch.full((100,), value).numpy().tobytes())
    bad = bytearray(good)
    bad[place + 99] ^= 1
    return path, good, bytes(bad)


def test_a_damaged_archive_before_a_whole_one_is_refused(tmp_path):
    path, good, bad = archives(tmp_path, 3.0)
    check_zip(path)
    path.write_bytes(bad + good)
    assert zipfile.ZipFile(path).testzip() is None  # Python's reader finds the whole one
    assert torch.load(path, mmap=True)["x"].unique().numel() == 2  # and torch the damaged one
    for content in (bad + good, good + good, good + bad, b"x" + good, good + b"x", good[:-22] + good):
        path.write_bytes(content)
        with pytest.raises(Exception, match=r"archive|directory|damaged|zip"):
            check_zip(path)
        with pytest.raises(TaperlitError, match=r"x\.ckpt is truncated, damaged or not a checkpoint"):
            open_checkpoint(path)


def test_a_compressed_part_which_torch_would_map_is_refused(tmp_path):
    path, _, _ = archives(tmp_path, 3.0)
    other = tmp_path / "y.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="in it is compressed"):
        check_zip(other)


@pytest.mark.parametrize(
    "content",
    [{}, {"a": torch.zeros(0)}, [torch.ones(3), "x" * 1000, torch.ones(70, 70, dtype=torch.bfloat16)]],
)
def test_what_torch_writes_is_whole(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    check_zip(tmp_path / "x.ckpt")


def mend(directory):
    """Make all checksums in a folder those of its files."""
    config = json.loads((directory / "config.json").read_text())
    for name in config["checksums"]:
        config["checksums"][name] = checksum(directory / name) if name != "config.json" else checksum_of(config)
    (directory / "config.json").write_text(json.dumps(config))


def refusal(directory, monkeypatch):
    """The one line that a folder is refused in, before anything of its size is built."""

    def build(self, config):
        raise AssertionError(BUILT)

    monkeypatch.setattr(Transformer, "__init__", build)
    with pytest.raises(TaperlitError) as error:
        load_model(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_layer", 10**9, "n_layer must be at most 4096, not 1000000000"),
        ("n_layer", 3, "n_layer is 3, and its weights are of 2 blocks"),
        ("n_layer", True, "it.model.n_layer is True, not an integer"),
        ("n_layer", 2.0, "it.model.n_layer is 2.0, not an integer"),
        ("n_layer", None, "it.model.n_layer is None, not an integer"),
        ("n_layer", -2, "n_layer must be at least 1"),
        ("d_model", 10**9, "d_model must be at most"),
        ("d_model", 64, "d_model is 64, and tok_embed.weight has 32"),
        ("vocab_size", 301, "vocab_size is 301, and tok_embed.weight has 300"),
        ("d_ff", 65, "d_ff is 65, and blocks.0.mlp.up_proj.weight has 64"),
        ("n_head", 4, "n_head times d_head is 64, and blocks.0.attn.q_proj.weight has 32"),
        ("n_kv_head", 1, "n_kv_head times d_head is 16, and blocks.0.attn.k_proj.weight has 32"),
        ("position", "x", "it.model.position is 'x', not 'rope' or 'learned'"),
        ("norm_eps", "1e-5", "it.model.norm_eps is '1e-5', not a finite number"),
        ("norm_eps", -1, "norm_eps must be at least 0"),
        ("rope_theta", 0, "rope_theta must be between 1"),
        ("rope_scaling", {"factor": 2.0}, "it.model.rope_scaling.low_freq_factor is missing"),
        ("colour", 1, "it.model.colour is no field of it"),
    ],
)
def test_a_shape_that_is_not_the_weights_is_refused_before_it_is_built(
    tiny, tmp_path, monkeypatch, field, value, words
):
    write_folded(tmp_path / "out", tiny(), EMPTY, "{}")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    config["model"][field] = value
    path.write_text(json.dumps(config))
    mend(tmp_path / "out")
    told = refusal(tmp_path / "out", monkeypatch)
    assert words in told
    assert str(path) in told
    assert told.endswith("fold the checkpoint again.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("structure"), "it.structure is missing"),
        (lambda c: c.update(structure=[]), r"it.structure is \[\], not a dictionary"),
        (lambda c: c["structure"].update(untied="x"), "it.structure.untied is 'x', not a list"),
        (lambda c: c["structure"].update(more={}), "it.structure.more is no field of it"),
        (lambda c: c["structure"].update(biases={"head.bias": [True]}), r"biases.head.bias\[0\] is True"),
        (lambda c: c.update(tied={"head.weight": 3}), "it.tied.head.weight is 3, not a text"),
        (lambda c: c.update(model_class=None), "it.model_class is None, not a text"),
        (lambda c: c.update(colour=1), "it.colour is no field of it"),
        (lambda c: c["checksums"].pop("model.safetensors"), "checksums.model.safetensors is missing"),
        (lambda c: c["checksums"].pop("tokenizer.json"), "checksums.tokenizer.json is missing"),
        (lambda c: c.update(checksums={}), "checksums.config.json is missing"),
        (lambda c: c.update(checksums={"config.json": 0}), r"config.json is damaged \(its checksum differs"),
        (lambda c: c["checksums"].update({"../../secret": 1}), r"checksums.\.\./\.\./secret is of no file of ours"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_field(tiny, tmp_path, monkeypatch, change, words):
    write_folded(tmp_path / "out", tiny(), EMPTY, "{}")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    told = refusal(tmp_path / "out", monkeypatch)
    assert re.search(words, told), told
    assert str(path) in told


def rewrite(directory, change, keep_metadata=False):
    """Change the tensors of a folder and mend its checksums."""
    path = directory / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata if keep_metadata else None)
    mend(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["head.weight"].view(-1)[7:8].fill_(math.nan), "head.weight has values that are not finite"),
        (lambda t: t["final_norm.weight"].fill_(-math.inf), "final_norm.weight has values that are not finite"),
        (lambda t: t.update({"head.weight": t["head.weight"].long()}), "head.weight is of int64, and Transformer has"),
        (lambda t: t.update({"head.weight": t["head.weight"] > 0}), "head.weight is of bool, and Transformer has it"),
        (lambda t: t.update({"head.weight": t["head.weight"][:, :8].clone()}), "mismatch for head.weight"),
        (lambda t: t.update({"tok_embed.weight": t["head.weight"][None].clone()}), "tok_embed.weight has the shape"),
        (lambda t: t.pop("head.weight"), "has no head.weight"),
        (lambda t: t.update(more=torch.ones(1)), "has more, which Transformer has not"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(tiny, tmp_path, change, words):
    write_folded(tmp_path / "out", tiny(), EMPTY)
    rewrite(tmp_path / "out", change)
    for load in (load_model, lambda path: load_folded(path, lambda: Transformer(TransformerConfig(**TINY)))):
        with pytest.raises(TaperlitError) as error:
            load(tmp_path / "out")
        assert words in str(error.value) or (load is not load_model and "mismatch for tok_embed" in str(error.value))
        assert "\n" not in str(error.value)


def test_the_tensors_carry_their_own_checksum(tiny, tmp_path):
    model = tiny(tied=True).bfloat16()
    write_folded(tmp_path / "out", model, EMPTY)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert len(file.metadata()[TENSORS]) == 8
    # Every checksum of a file is right, and the values are others.
    rewrite(tmp_path / "out", lambda t: t["tok_embed.weight"].view(-1)[3:4].add_(1), keep_metadata=True)
    with pytest.raises(
        TaperlitError, match=r"model\.safetensors is damaged \(its tensors are not those that its check"
    ):
        load_model(tmp_path / "out")


def test_a_folder_of_before_loads_without_it(tiny, tmp_path):
    model = tiny().eval()
    write_folded(tmp_path / "out", model, EMPTY)
    rewrite(tmp_path / "out", lambda t: None)  # as it was, without metadata
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(load_model(tmp_path / "out").model(tokens), model(tokens))


def test_a_model_that_is_not_finite_is_not_written(tiny, tmp_path):
    model = tiny()
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = math.nan
    with pytest.raises(TaperlitError, match=r"blocks\.1\.mlp\.up_proj\.weight has values that are not finite"):
        write_folded(tmp_path / "out", model, EMPTY)
    assert not (tmp_path / "out").exists()
    half = SimpleNamespace(named_parameters=lambda: [("x", torch.tensor([1, math.inf], dtype=torch.float16))])
    with pytest.raises(TaperlitError, match="it: x has values that are not finite"):
        check_finite(half, "it", "use another")


def written(model, path, **changes):
    config = {name: getattr(model.config, name) for name in TINY}
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"preset": "small_1m", "taper": "none", "overrides": {**config, "tied": False}},
        "TextDataModule": {"tokenizer": "{}", "sample": torch.arange(12).view(3, 4)},
        "taperlit": {"format": CHECKPOINT_FORMAT},
    }
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hyper_parameters": [1]}, "it.hyper_parameters is a list of 1, not a dictionary"),
        ({"state_dict": 3}, "it.state_dict is 3, not a dictionary"),
        ({"state_dict": lambda s: {**s, 3: torch.ones(1)}}, "it.state_dict has the key 3, not a text"),
        ({"TextDataModule": {"tokenizer": 3}}, "TextDataModule.tokenizer is 3, not a text or null"),
        ({"TextDataModule": {"sample": torch.ones(3, 4)}}, "TextDataModule.sample is no few rows of tokens"),
        ({"TextDataModule": {"sample": "x"}}, "TextDataModule.sample is 'x', not a Tensor or null"),
        ({"callbacks": []}, r"it.callbacks is \[\], not a dictionary"),
        (
            {"hyper_parameters": lambda h: {**h, "overrides": {**h["overrides"], "n_layer": 10**9}}},
            "n_layer must be at most 4096",
        ),
        (
            {"hyper_parameters": lambda h: {**h, "overrides": {**h["overrides"], "n_layer": 4000}}},
            "n_layer is 4000, and its weights are of 2 blocks",
        ),
        (
            {"state_dict": lambda s: {**s, "model.head.weight": s["model.head.weight"] * math.inf}},
            "head.weight has values that are not finite; the run diverged",
        ),
        ({"taperlit": lambda t: {**t, "origin": {"name": "x"}}}, "origin.files is missing"),
        (
            {"taperlit": lambda t: {**t, "origin": {"name": "x", "files": {"config.json": "["}}}},
            "the config.json of its pretrained model is no JSON object",
        ),
    ],
)
def test_a_checkpoint_that_says_what_it_should_not_is_refused_by_field(tiny, tmp_path, changes, words):
    path = written(tiny(), tmp_path / "last.ckpt", **changes)
    with pytest.raises(TaperlitError) as error:
        load_checkpoint(path)
    assert re.search(words, str(error.value)), error.value
    assert "\n" not in str(error.value)
    load_checkpoint(written(tiny(), tmp_path / "last.ckpt"))  # it was only that


def test_a_config_of_transformers_cannot_ask_for_layers_without_end(tmp_path):
    shapes = {f"h.{i}.weight": (16, 4) for i in range(8)}
    check_counts({"num_hidden_layers": 8, "num_local_experts": 16, "hidden_size": 10**9}, shapes, "it", "use another")
    for name in ("num_hidden_layers", "n_layer", "num_local_experts"):
        with pytest.raises(TaperlitError, match=f"it: {name} is 1000000000, and there are 8 tensors; use another"):
            check_counts({name: 10**9}, shapes, "it", "use another")
    with pytest.raises(TaperlitError, match="num_hidden_layers is 99"):
        check_counts({"text_config": {"num_hidden_layers": 99}}, shapes, "it", "use another")


def test_a_folder_that_is_copied_over_another_is_refused(tiny, tmp_path):
    """Each file is whole, and they do not belong together."""
    write_folded(tmp_path / "a", tiny(), EMPTY)
    model = tiny()
    model.head.weight.data.add_(1)
    write_folded(tmp_path / "b", model, EMPTY)
    shutil.copy(tmp_path / "b/model.safetensors", tmp_path / "a/model.safetensors")
    with pytest.raises(TaperlitError, match="its checksum differs"):
        load_model(tmp_path / "a")


def test_a_file_takes_no_folders_place(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine").write_text("x")
    with pytest.raises(TaperlitError, match="corpus is a folder; name a file"):
        write_file(tmp_path / "corpus", lambda partial: partial.write_text("{}"))
    assert (tmp_path / "corpus/mine").read_text() == "x"
    assert os.listdir(tmp_path) == ["corpus"]
