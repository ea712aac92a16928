"""A user's own model: taper, fold, write, and load again in a process that knows nothing of this one."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_models import MODELS, Decoder, Tables, outputs
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from taperlit import fold, load_folded, load_model, taper
from taperlit.checkpoint.folded import write_folded
from taperlit.errors import TaperlitError
from taperlit.norm import shared_gate, tapered_norms
from taperlit.structure import apply_structure

CASES = [(name, tied) for name in MODELS for tied in (("untie", "scale") if name.endswith("tied") else ("untie",))]
EMPTY = {"identities": {}, "scales": {}, "biases": {}, "untied": []}

FRESH = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from own_models import MODELS, outputs
from safetensors.torch import save_file
from taperlit import load_folded

torch.manual_seed(99)
results, ties = {}, {}
for directory in map(Path, sys.argv[3:]):
    name = directory.name.rpartition(" ")[0]
    model = load_folded(directory, build=MODELS[name])
    assert not model.training
    names = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    results[directory.name], ties[directory.name] = outputs(model, name), sorted(names.values())
    results |= {f"{directory.name}/{key}": value for key, value in model.named_buffers()}
save_file({key: value.clone() for key, value in results.items()}, sys.argv[2])
Path(sys.argv[2] + ".json").write_text(json.dumps(ties))
"""


def folded(name, tied="untie", seed=0):
    """A model whose norms became maps that are not trivial, the record of it, and what it gave before it was folded."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    taper(model)
    with torch.no_grad():
        for norm in tapered_norms(model).values():
            norm.alignment.fill_(0.7)
            norm.taper_weight.normal_(1, 0.3)
            if norm.taper_bias is not None:
                norm.taper_bias.normal_()
    shared_gate(model).set(0.0)
    before = outputs(model, name)
    structure = fold(model, lambda: outputs(model, name), tied=tied)
    return model, structure, before


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """All models, and what a fresh process makes of their directories."""
    home = tmp_path_factory.mktemp("own")
    models = {}
    for name, tied in CASES:
        model, structure, before = folded(name, tied)
        models[name, tied] = model, before
        write_folded(home / f"{name} {tied}", model, structure)
    directories = [str(home / f"{name} {tied}") for name, tied in CASES]
    program = [sys.executable, "-c", FRESH, str(Path(__file__).parent), str(home / "results")]
    subprocess.run([*program, *directories], check=True)
    return models, load_file(home / "results"), json.loads((home / "results.json").read_text())


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_fresh_process_gives_the_same_bits(loaded, name, tied):
    models, results, ties = loaded
    model, before = models[name, tied]
    assert not tapered_norms(model)
    torch.testing.assert_close(outputs(model, name), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[f"{name} {tied}"], outputs(model, name))
    for key, buffer in model.named_buffers():
        assert torch.equal(results[f"{name} {tied}/{key}"], buffer), key
        assert results[f"{name} {tied}/{key}"].dtype == buffer.dtype, key
    names = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    assert ties[f"{name} {tied}"] == sorted(names.values())
    shared = [key for keys in names.values() if len(keys) > 1 for key in keys]
    assert bool(shared) == (tied == "scale")


def test_a_shared_matrix_is_on_disk_once(tmp_path):
    model, structure, _ = folded("layernorm tied", "scale")
    write_folded(tmp_path / "out", model, structure)
    assert json.loads((tmp_path / "out/config.json").read_text())["tied"] == {"head.weight": "embed.weight"}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(name for name, _ in model.named_parameters())


def test_half_precision_is_kept(tmp_path):
    torch.manual_seed(0)
    model = Tables().bfloat16().eval()
    write_folded(tmp_path / "out", model, EMPTY)
    again = load_folded(tmp_path / "out", Tables)
    assert all(
        a.dtype == b.dtype for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 8, 16).bfloat16()
    assert torch.equal(again(x), model(x))


def test_overlapping_parameters_are_kept_apart(tmp_path):
    class Overlapping(nn.Module):
        def __init__(self):
            super().__init__()
            matrix = torch.randn(4, 4)
            self.a = nn.Parameter(matrix)
            self.b = nn.Parameter(matrix.t())  # square: taken for the same, it would be transposed
            self.c = nn.Parameter(matrix[1:3])

        def forward(self, x):
            return x @ self.a @ self.b @ self.c.T

    model, x = Overlapping().double().eval(), torch.randn(2, 4).double()
    write_folded(tmp_path / "out", model, EMPTY)
    again = load_folded(tmp_path / "out", Overlapping)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_folded(tmp_path / "out", Tables(), EMPTY, "{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    files = ("config.json", "model.safetensors", "buffers.safetensors", "tokenizer.json")
    assert modes == dict.fromkeys(files, 0o666 & ~umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


class Other(Decoder):
    pass


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(16, 17), nn.RMSNorm(16)
        for name in ("angles", "projection", "again", "low"):
            self.register_buffer(name, torch.zeros(1), persistent=False)
        self.register_buffer("kept", torch.zeros(16))


class Without(Tables):
    def __init__(self):
        super().__init__()
        del self.angles


class More(Tables):
    def __init__(self):
        super().__init__()
        self.register_buffer("more", torch.zeros(2), persistent=False)


class Deeper(Tables):
    def __init__(self):
        super().__init__()
        self.deep = nn.Linear(2, 2)


class Shallower(Tables):
    def __init__(self):
        super().__init__()
        del self.inner


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Other(nn.RMSNorm, True), r"out holds a Tables, and build\(\) returned a Other; build the Tables"),
        (Wide, r"model\.safetensors does not fit Tables: size mismatch for inner\.weight: .*\[17, 16\]"),
        (Without, r"out has a buffer angles, which build\(\) does not make"),
        (More, r"out has no buffer more, which build\(\) makes"),
        (Deeper, r"model\.safetensors has no deep\.weight, which Tables has"),
        (Shallower, r"model\.safetensors has inner\.bias, which Tables has not"),
        (lambda: None, r"build\(\) must return a torch\.nn\.Module"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, build, words):
    write_folded(tmp_path / "out", Tables(), EMPTY)

    def named():
        model = build()
        if isinstance(model, nn.Module) and not isinstance(model, Decoder):
            model.__class__ = type("Tables", (type(model),), {})
        return model

    with pytest.raises(TaperlitError, match=words) as error:
        load_folded(tmp_path / "out", named)
    assert "\n" not in str(error.value)


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    write_folded(tmp_path / "out", Tables(), EMPTY | {"identities": {"nowhere": ["inner.weight"]}})
    with pytest.raises(TaperlitError, match="nowhere") as error:
        load_folded(tmp_path / "out", Tables)
    assert "\n" not in str(error.value)


def test_load_model_names_the_way_to_load_a_model_that_is_not_ours(tmp_path):
    write_folded(tmp_path / "out", Tables(), EMPTY)
    with pytest.raises(TaperlitError, match=r"out holds a Tables, .* taperlit\.load_folded\(directory, build=lambda"):
        load_model(tmp_path / "out")


def test_a_model_that_is_not_folded_is_not_written(tmp_path):
    model = Tables()
    taper(model)
    with pytest.raises(TaperlitError, match="norm is still a TaperNorm; fold the model"):
        write_folded(tmp_path / "out", model, EMPTY)
    assert os.listdir(tmp_path) == []


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    ("model", "name"),
    [(Extra(2, 2), "_extra_state"), (Sparse(), "mask"), (nn.Linear(2, 2, device="meta"), "weight"),
     (nn.Linear(2, 2, dtype=torch.complex128), r"model\.safetensors")],
)  # fmt: skip
def test_state_that_has_no_place_in_the_file_is_refused_by_name(tmp_path, model, name):
    with pytest.raises(TaperlitError, match=f"^{name} ") as error:
        write_folded(tmp_path / "out", model, EMPTY)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_changes_while_it_is_read_is_refused(tmp_path):
    first, second = Tables(), Tables()
    with torch.no_grad():
        second.inner.weight.add_(1)
    write_folded(tmp_path / "out", first, EMPTY)

    def build():
        write_folded(tmp_path / "out", second, EMPTY, force=True)
        return Tables()

    with pytest.raises(TaperlitError, match="out was replaced while it was read; load it again"):
        load_folded(tmp_path / "out", build)
    assert torch.equal(load_folded(tmp_path / "out", Tables).inner.weight, second.inner.weight)


def test_a_loaded_model_does_not_need_its_files(tmp_path):
    model, structure, _ = folded("layernorm")
    write_folded(tmp_path / "out", model, structure)
    again = load_folded(tmp_path / "out", MODELS["layernorm"])
    with open(tmp_path / "out/model.safetensors", "r+b") as file:  # the same inode
        file.write(bytes((tmp_path / "out/model.safetensors").stat().st_size))
    assert torch.equal(outputs(again, "layernorm"), outputs(model, "layernorm"))


def test_a_directory_killed_between_its_two_renames_comes_back(tmp_path):
    write_folded(tmp_path / "out", Tables(), EMPTY)
    for load in (lambda: load_folded(tmp_path / "out", Tables), lambda: load_model(tmp_path / "out")):
        (tmp_path / "out").rename(tmp_path / ".out.old")
        with contextlib.suppress(TaperlitError):  # load_model: it is no Transformer
            load()
        assert os.listdir(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mutated") / "out"
    model, structure, _ = folded("tables")
    return write_folded(directory, model, structure, '{"model": "of words"}'), outputs(model, "tables")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_directory_is_refused_or_the_same(written, tmp_path, data):
    source, expected = written
    path = tmp_path / "mutated"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, path)
    victim = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "digit"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
    elif kind == "digit":
        content[place : place + 1] = b"5"
    victim.write_bytes(content)
    if kind == "delete":
        victim.unlink()
    refusal = None
    try:
        model = load_folded(path, Tables)
    except TaperlitError as error:
        refusal = str(error)
    if refusal is None:
        assert torch.equal(outputs(model, "tables"), expected)
        assert (path / "tokenizer.json").read_text() == '{"model": "of words"}'
    else:
        assert "mutated" in refusal
        assert "\n" not in refusal


def test_a_file_of_another_library_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "out/model.safetensors")
    with pytest.raises(TaperlitError, match=r"out has no config\.json"):
        load_folded(tmp_path / "out", Tables)
    (tmp_path / "out/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(TaperlitError, match=r"config\.json is not of a folded model"):
        load_folded(tmp_path / "out", Tables)
    (tmp_path / "out/config.json").write_text('{"format": "taperlit-folded-1", "model_class": "Transformer"}')
    for load in (lambda: load_folded(tmp_path / "out", Tables), lambda: load_model(tmp_path / "out")):
        with pytest.raises(TaperlitError, match="out was written by another version of taperlit; fold"):
            load()


def test_the_record_can_be_used_without_a_directory():
    model, structure, _ = folded("layernorm tied")
    again = apply_structure(MODELS["layernorm tied"](), json.loads(json.dumps(structure))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, "layernorm tied"), outputs(model, "layernorm tied"))
