import json
import os

import pytest
import torch

from taperlit.checkpoint import load_folded, load_model, read_checkpoint
from taperlit.errors import TaperlitError
from taperlit.files import write_directory
from taperlit.fold import write_folded


def test_folded_model_round_trips(tiny, tmp_path):
    model = tiny(tied=True).eval()
    write_folded(tmp_path / "out", model, ["a -> b"], '{"x": 1}')
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["out"]
    loaded = load_model(tmp_path / "out")
    assert loaded.tokenizer_json == '{"x": 1}'
    tokens = torch.randint(300, (1, 9))
    assert torch.equal(loaded.model(tokens), model(tokens))
    assert json.loads((tmp_path / "out/config.json").read_text())["folded_norms"] == ["a -> b"]


def test_an_existing_directory_is_kept_unless_forced(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(TaperlitError, match="out exists"):
        write_folded(tmp_path / "out", tiny(), [], None)
    assert (tmp_path / "out/mine").exists()
    write_folded(tmp_path / "out", tiny(), [], None, force=True)
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


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "directory"])
def test_bad_checkpoints_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    if damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "directory":
        path.mkdir()
    elif damage != "missing":
        torch.save({"state_dict": {"x": torch.zeros(10000)}, "hyper_parameters": {}}, path)
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    with pytest.raises(TaperlitError, match=r"last\.ckpt") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"preset": Evil(tmp_path / "ran")}}, path)
    with pytest.raises(TaperlitError, match=r"evil\.ckpt"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


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
    write_folded(tmp_path / "out", tiny(), [], None)
    if content is None:
        (tmp_path / "out" / file).unlink()
    else:
        (tmp_path / "out" / file).write_text(content)
    with pytest.raises(TaperlitError, match="out"):
        load_folded(tmp_path / "out")
