import dataclasses
import io
import json
import os
import pickle
import shutil
import warnings

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import differences
from torch.distributed.checkpoint import save

from taperlit import AlignmentFreeze, GateSchedule, LanguageModel
from taperlit.callbacks import RunCheckpoint
from taperlit.checkpoint.atomic import remove, write_directory
from taperlit.checkpoint.folded import load_checkpoint, load_model, write_folded
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT, load_whole, open_checkpoint, read_checkpoint
from taperlit.checkpoint.sharded import DIGEST, _MetadataUnpickler, digest, read_metadata
from taperlit.errors import TaperlitError
from taperlit.structure import add_bias, untie
from taperlit.training.trainer import Trainer


def test_folded_model_round_trips(tiny, tmp_path):
    model = tiny(tied=True).eval()
    structure = {"identities": {}, "scales": {}, "biases": {"head.bias": [300]}, "untied": ["head.weight"]}
    untie(model, "head.weight")
    torch.nn.init.normal_(add_bias(model, "head.bias", [300]))
    write_folded(tmp_path / "out", model, structure, '{"x": 1}')
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["out"]
    loaded = load_model(tmp_path / "out")
    assert loaded.tokenizer_json == '{"x": 1}'
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(loaded.model(tokens), model(tokens))
    assert loaded.model.head.weight is not loaded.model.tok_embed.weight
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["structure"], config["model"]) == (structure, dataclasses.asdict(model.config))


def test_an_existing_directory_is_kept_unless_forced(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(TaperlitError, match="out exists"):
        write_folded(tmp_path / "out", tiny(), EMPTY)
    assert (tmp_path / "out/mine").exists()
    write_folded(tmp_path / "out", tiny(), EMPTY, force=True)
    assert not (tmp_path / "out/mine").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_write_leaves_the_old_directory_and_no_debris(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")

    def fill(partial):
        (partial / "half").write_text("y")
        raise OSError(28, "No space left on device")

    with pytest.raises(TaperlitError, match="out cannot be written: No space left on device"):
        write_directory(tmp_path / "out", fill, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["mine"]


EMPTY = {"identities": {}, "scales": {}, "biases": {}, "untied": []}


def written(**changes):
    """A checkpoint's content as this version writes it, as far as its readers look."""
    return {
        "state_dict": {"x": torch.zeros(10000)},
        "hyper_parameters": {},
        "taperlit": {"format": CHECKPOINT_FORMAT},
        **changes,
    }


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no such checkpoint"),
        ("empty", "truncated, damaged or not a checkpoint"),
        ("truncated", "truncated, damaged or not a checkpoint"),
        ("text", "truncated, damaged or not a checkpoint"),
        ("flipped", "damaged"),
        ("foreign", "not a checkpoint of `taperlit fit`"),
        ("directory", "a directory without"),
        ("folded", "is a folded model"),
        ("safetensors", "is a folded model"),
        ("older", "an older taperlit"),
        ("oldest", "an older taperlit"),
        ("newer", "a newer taperlit"),
    ],
)
def test_bad_checkpoints_are_refused_by_name(tiny, tmp_path, damage, words):
    path = tmp_path / "last.ckpt"
    if damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "directory":
        path.mkdir()
    elif damage == "folded":
        write_folded(path, tiny(), EMPTY)
    elif damage == "safetensors":
        path = tmp_path / "last.ckpt.safetensors"
        path.write_bytes(b"x")
    elif damage == "older":
        torch.save(written(taperlit={"format": CHECKPOINT_FORMAT - 1, "version": "0.1.0"}), path)
    elif damage == "oldest":
        torch.save({key: value for key, value in written().items() if key != "taperlit"}, path)
    elif damage == "newer":
        torch.save(written(taperlit={"format": 99, "version": "9.0"}), path)
    elif damage != "missing":
        torch.save(written(), path)
        assert open_checkpoint(path)["state_dict"]["x"].sum() == 0
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": data[:middle], "text": b"hello", "flipped": flipped}[damage])
    for reader in (open_checkpoint, read_checkpoint, load_checkpoint):
        with pytest.raises(TaperlitError, match=r"last\.ckpt") as error:
            reader(path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save(written(hyper_parameters={"preset": Evil(tmp_path / "ran")}), path)
    for reader in (open_checkpoint, read_checkpoint, load_whole, load_checkpoint, load_model):
        with pytest.raises(TaperlitError, match=r"evil\.ckpt"):
            reader(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def shard(directory, state=None):
    """A sharded checkpoint, written by torch and Lightning's rules."""
    values = {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}
    optimizer = {
        "state": {"model.a": {"step": torch.tensor(3.0), "exp_avg": torch.full((2, 3), 0.5)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["model.a"]}],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"state_dict": values, "optimizer_0": optimizer, **(state or {})}, checkpoint_id=directory)
    torch.save({key: value for key, value in written().items() if key != "state_dict"}, directory / "meta.pt")
    (directory / DIGEST).write_text(digest(directory))
    return {"state_dict": values, "optimizer_states": [optimizer]}


def test_a_sharded_checkpoint_is_read_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    expected = shard(path)
    assert open_checkpoint(path).keys() == written().keys() - {"state_dict"}
    got = read_checkpoint(path)
    assert differences(expected, {key: got[key] for key in expected}) == []
    assert "optimizer_states" not in read_checkpoint(path, optimizer=False)


@pytest.mark.parametrize("where", [".metadata", "meta.pt", "value", "tensor"])
def test_reading_a_sharded_checkpoint_runs_no_code(tmp_path, where):
    path, ran = tmp_path / "evil.ckpt", tmp_path / "ran"
    shard(path, {"extra": Evil(ran)} if where == "value" else None)
    if where == ".metadata":
        (path / where).write_bytes(pickle.dumps(Evil(ran)))
    elif where == "meta.pt":
        torch.save(written(hyper_parameters={"x": Evil(ran)}), path / where)
    elif where == "tensor":
        metadata = read_metadata(path)
        (index,) = (i for i in metadata.storage_data if i.fqn == "state_dict.model.b")
        item = metadata.storage_data[index]
        evil = io.BytesIO()
        torch.save(Evil(ran), evil)
        data = (path / item.relative_path).read_bytes()
        (path / item.relative_path).write_bytes(data + evil.getvalue())
        place = dataclasses.replace(item, offset=len(data), length=len(evil.getvalue()))
        metadata.storage_data[index] = place
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / DIGEST).write_text(digest(path))  # the attacker knows of it
    for reader in (open_checkpoint, read_checkpoint, load_whole, load_checkpoint, load_model):
        with pytest.raises(TaperlitError, match=r"evil\.ckpt"):
            reader(path)
    assert not ran.exists()


def test_a_sharded_checkpoint_names_no_file_outside_it(tmp_path):
    path = tmp_path / "evil.ckpt"
    shard(path)
    metadata = read_metadata(path)
    for item in metadata.storage_data.values():
        item.relative_path = "../secret.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / DIGEST).write_text(digest(path))
    with pytest.raises(TaperlitError, match=r"outside the checkpoint"):
        open_checkpoint(path)


def test_the_metadata_cannot_name_other_things_of_an_allowed_module():
    for name in ("torch.distributed.checkpoint.metadata\nos.system", "torch\nload", "torch.serialization\nload"):
        with pytest.raises(pickle.UnpicklingError, match="it asks for"):
            _MetadataUnpickler(io.BytesIO(f"c{name}\n.".encode())).load()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Checkpoints as real runs write them: a file, and a directory of shards."""
    folder = tmp_path_factory.mktemp("real")
    model = LanguageModel("small_1m", "internal", {**TINY, "n_layer": 1})
    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[GateSchedule(1, 2), AlignmentFreeze()],
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.randint(300, (24, 33)), batch_size=8))
    trainer.save_checkpoint(folder / "file.ckpt")
    shard(folder / "shards.ckpt")
    return {name: (folder / f"{name}.ckpt", read_checkpoint(folder / f"{name}.ckpt")) for name in ("file", "shards")}


@pytest.mark.parametrize("form", ["file", "shards"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_checkpoint_is_refused_or_the_same(real, tmp_path, form, data):
    source, whole = real[form]
    path = tmp_path / f"mutated-{form}.ckpt"
    remove(path)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    victim = path if path.is_file() else data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "zero", "cut", "insert", "swap", "delete"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "zero":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "swap":
        half = len(content) // 2
        content = content[half:] + content[:half]
    victim.write_bytes(content)
    if kind == "delete":
        victim.unlink()
    refusal = None
    try:
        got = read_checkpoint(path)
    except TaperlitError as error:
        refusal = str(error)
    if refusal is None:
        assert differences(whole, got) == []
    else:
        assert path.name in refusal
        assert "\n" not in refusal


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    model = LanguageModel("small_1m", "none", {**TINY, "n_layer": 1})
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.randint(300, (8, 33)), batch_size=8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taperlit.training.trainer.torch.save", full)
    with pytest.raises(TaperlitError, match=r"last\.ckpt cannot be written: No space left on device"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_directory_killed_between_its_two_renames_comes_back(tmp_path):
    shard(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.old")
    assert open_checkpoint(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_no_path_of_a_checkpoint_is_deleted_outside_the_runs_folder(tmp_path):
    keep = RunCheckpoint(dirpath=tmp_path / "run")
    outside = [str(tmp_path / "victim.ckpt"), f"{tmp_path}/run/../../victim.ckpt", f"{tmp_path}/run/.."]
    inside = str(tmp_path / "run/best.ckpt")
    state = keep.state_dict() | {
        "best_k_models": {path: torch.tensor(1.0) for path in [*outside, inside]},
        "best_model_path": outside[0], "kth_best_model_path": outside[1], "last_model_path": outside[2],
    }  # fmt: skip
    keep.load_state_dict(state)
    assert list(keep.best_k_models) == [inside]
    assert {keep.best_model_path, keep.kth_best_model_path, keep.last_model_path} == {""}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", '{"format": "gguf"}'),
        ("model.safetensors", ""),
        ("model.safetensors", None),
    ],
)
def test_bad_folded_directories_are_refused_by_name(tiny, tmp_path, file, content):
    write_folded(tmp_path / "out", tiny(), EMPTY)
    if content is None:
        (tmp_path / "out" / file).unlink()
    else:
        (tmp_path / "out" / file).write_text(content)
    with pytest.raises(TaperlitError, match="out") as error:
        load_model(tmp_path / "out")
    assert "\n" not in str(error.value)
