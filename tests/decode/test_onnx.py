"""The ONNX graph in onnxruntime, against the model's own forward pass, our engine, and what the graph may hold."""

import copy
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from taperlit.compare import largest_difference
from taperlit.decode import Engine, Sampling
from taperlit.decode.onnx_engine import OnnxEngine
from taperlit.decode.onnx_export import export_onnx, onnx_engine
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate, tapered_norms

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"},
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "tied": True},
    "grouped": {"n_head": 4, "n_kv_head": 2, "d_model": 64, "tied": True},
    "wide": {"n_head": 4, "n_kv_head": 2, "d_head": 12, "qkv_bias": True, "rope_scaling": SCALING},
    "glu": {"mlp": "glu", "bias": True},
    "relu": {"norm": "layernorm", "mlp": "relu"},
    "narrow": {"n_head": 4, "n_kv_head": 1, "d_model": 40, "bias": True},  # heads of 10, which have to be padded
}
GATES = {"normalized": 1.0, "blended": 0.4, "explicit": 0.0, "folded": 0.0}
NORMALIZATIONS = {
    *("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "InstanceNormalization"),
    *("GroupNormalization", "BatchNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    *("LpNormalization", "MeanVarianceNormalization", "Sqrt", "Pow", "Reciprocal", "Div"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait busily are no use to tests that run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tiny):
    """A builder of models by name and kind."""

    def build(name: str = "llama", kind: str = "folded", taper=("*",), **changes):
        model = tiny([*taper], **{**MODELS[name], **changes}).eval()
        for i, norm in enumerate(tapered_norms(model).values()):
            norm.alignment.fill_(0.5 + 0.3 * i)
        gate = shared_gate(model)
        gate.set(GATES[kind])
        if kind == "folded":
            fold(model, lambda: model(torch.arange(8)[None]))
        return model

    return build


def operators(path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_and_logits_are_the_engines_and_the_models(build, tmp_path, name, kind):
    model = build(name, kind)
    directory = export_onnx(model, tmp_path / "out")
    for lengths in ((1,), (32,), (3, 17), (9, 1, 24)):
        rows = len(lengths)
        ours, theirs = Engine(model, rows, layout="rows", rms_form="fused"), OnnxEngine(directory, rows)
        prompts = prompts_of(*lengths)
        tokens = theirs.generate(prompts, 40)
        assert tokens == ours.generate(prompts, 40)
        assert len(tokens[0]) == 33 - max(lengths)
    alone = OnnxEngine(directory)  # which reads one prompt after another
    for length in range(1, 33):
        prompt = torch.tensor(prompts_of(length))
        assert largest_difference(model(prompt)[:, -1], alone.prefill(prompt)) < 1e-5


@torch.no_grad()
def test_a_cache_that_grows_serves_too(build, tmp_path):
    """As a stranger would run the graph: arrays in, arrays out, the prompt in two pieces, then token by token."""
    model = build("grouped")
    directory = export_onnx(model, tmp_path / "out")
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    pasts = {port.name: np.zeros((1, 2, 0, 16), np.float32) for port in session.get_inputs() if "past" in port.name}
    tokens, filled = np.array(prompts_of(20)), 0
    for new in (6, 4, 1, 1, 8):
        filled += new
        feeds = {
            "tokens": tokens[:, filled - new : filled],
            "lengths": np.array([filled]),
            "longest": np.array(filled, np.int32),
        }
        logits, *presents = session.run(None, feeds | pasts)
        assert all(present.shape == (1, 2, filled, 16) for present in presents)
        pasts = dict(zip(pasts, presents, strict=True))
        wanted = model(torch.from_numpy(tokens[:, :filled]))[:, -1]
        assert largest_difference(wanted, torch.from_numpy(logits)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_graph_normalizes_and_reduces_nothing(build, tmp_path, name):
    directory = export_onnx(build(name), tmp_path / "out")
    onnx.checker.check_model(directory / "model.onnx")
    OnnxEngine(directory, optimized=str(tmp_path / "optimized.onnx"))
    for path in (directory / "model.onnx", tmp_path / "optimized.onnx"):
        there = operators(path)
        assert there["GroupQueryAttention"] == 2  # in which the softmax is
        assert not {kind for kind in there if "Reduce" in kind or "Norm" in kind or "Softmax" in kind}
        assert not NORMALIZATIONS & {*there}


@pytest.mark.parametrize(("name", "fused"), [("llama", "RMSNormalization"), ("gpt2", "LayerNormalization")])
def test_onnxruntime_normalizes_in_one_operation(build, tmp_path, name, fused):
    directory = export_onnx(build(name, "normalized"), tmp_path / "out")
    OnnxEngine(directory, optimized=str(tmp_path / "optimized.onnx"))
    there = operators(tmp_path / "optimized.onnx")
    assert there[fused] == 5
    assert not {kind for kind in there if kind.startswith("Reduce")}
    left = operators(export_onnx(build(name, taper=["blocks.*"]), tmp_path / "blocks") / "model.onnx")
    assert left[fused] == 1  # the final one, which was not tapered


def test_draws_are_the_engines(build):
    model, sampling = build(), Sampling(temperature=0.7, top_k=20, repetition_penalty=1.2)
    prompts = prompts_of(4, 7)
    wanted = Engine(model, 2, layout="rows", rms_form="fused").generate(prompts, 20, sampling, seed=3)
    engine = onnx_engine(model, 2)
    assert engine.generate(prompts, 20, sampling, seed=3) == wanted
    assert engine.generate(prompts, 20, sampling, seed=4) != wanted


def test_what_it_returned_stays(build):
    engine = onnx_engine(build())
    first = engine.prefill([[1, 2]])
    kept = first.clone()
    engine.step(torch.tensor([3]))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_is_half_as_large(build, tmp_path, name):
    model = build(name)
    sizes = {
        dtype: (export_onnx(model, tmp_path / str(dtype), dtype=dtype) / "model.onnx.data").stat().st_size
        for dtype in (torch.float32, torch.float16)
    }
    assert sizes[torch.float16] < 0.75 * sizes[torch.float32]  # tensors start at pages
    engine = OnnxEngine(tmp_path / str(torch.float16))
    assert engine.cache.dtype == engine.prefill([[1]]).dtype == torch.float16
    with pytest.raises(TaperlitError, match="float32 and float16, not bfloat16"):
        export_onnx(model, tmp_path / "other", dtype=torch.bfloat16)


def test_large_tensors_are_beside_the_graph_and_tied_ones_once(build, tmp_path):
    sizes = {}
    for tied in (True, False):
        directory = export_onnx(build(kind="normalized", tied=tied), tmp_path / str(tied), tokenizer_json="{}")
        assert (directory / "model.onnx").stat().st_size < 20000
        sizes[tied] = (directory / "model.onnx.data").stat().st_size
        assert sorted(json.loads((directory / "config.json").read_text())["checksums"]) == [
            *("config.json", "model.onnx", "model.onnx.data", "tokenizer.json")
        ]
    assert sizes[False] - sizes[True] == 300 * 32 * 4


def test_what_is_not_in_the_graph_is_found(build, tmp_path):
    model = build()
    export_onnx(model, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_text()
    of_all = torch.nn.modules.module.register_module_forward_hook
    hook = of_all(lambda module, args, output: output + 0.1 if module is model.blocks[1].mlp else None)
    for force in (True, False):
        path = tmp_path / ("out" if force else "new")
        with pytest.raises(TaperlitError, match=r"differ from the model's own by .* remove the one"):
            export_onnx(model, path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == before
    hook.remove()
    hook = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output + 0.1)
    with pytest.raises(TaperlitError, match=r"blocks\.1\.mlp has forward hooks, .* remove it"):
        export_onnx(model, tmp_path / "new")
    hook.remove()
    export_onnx(model, tmp_path / "new")


@torch.no_grad()
def test_overflow_is_found(build, tmp_path):
    model = build(kind="normalized")
    model.blocks[0].mlp.down_proj.weight.mul_(1e8)
    with pytest.raises(TaperlitError, match=r"overflows in float16.* dtype float32"):
        export_onnx(model, tmp_path / "out", dtype=torch.float16)
    export_onnx(model, tmp_path / "out")
    model.head.weight[0] = torch.nan
    with pytest.raises(TaperlitError, match="logits are not finite"):
        export_onnx(model, tmp_path / "other")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_what_is_not_installed_is_named(build, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TaperlitError, match=rf"{missing}, which is not installed: pip install 'taperlit\[onnx\]'"):
        export_onnx(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_neither_is_imported_before_it_is_used():
    program = "import sys, taperlit.cli.exports; print({'onnx', 'onnxruntime'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_damage_is_told(build, tmp_path):
    directory = export_onnx(build(), tmp_path / "out")
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        path = directory / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"32", b"33") if name == "config.json" else whole[:-1])
        words = r"it\.model\.dtype is 'float33', not 'float32'" if name == "config.json" else r"its checksum differs\)"
        with pytest.raises(TaperlitError, match=rf"{name}.*{words}.*; export the model again\.$"):
            OnnxEngine(directory)
        path.unlink()
        with pytest.raises(TaperlitError, match=f"{name}"):
            OnnxEngine(directory)
        path.write_bytes(whole)
    config = directory / "config.json"
    for text, words in (
        ("{", "is damaged"),
        ("[]", "no ONNX export"),
        ('{"format": "taperlit-onnx-1", "format": ""}', "is damaged .it has the key 'format' twice"),
        ('{"format": "taperlit-folded-2"}', "no ONNX export"),
        ('{"format": "taperlit-onnx-0"}', "another version"),
        ('{"format": "taperlit-onnx-1"}', "it.model is missing; export the model again"),
    ):
        config.write_text(text)
        with pytest.raises(TaperlitError, match=words):
            OnnxEngine(directory)
    for change, words in (
        (lambda c: c["model"].update(n_layer=True), "it.model.n_layer is True, not an integer"),
        (lambda c: c["model"].update(n_layer=0), "it.model.n_layer is 0, and must be at least 1"),
        (lambda c: c["model"].update(n_layer=3), r"is damaged \(its checksum differs"),
        (lambda c: c["model"].pop("d_head"), "it.model.d_head is missing"),
        (lambda c: c["checksums"].pop("model.onnx"), "checksums.model.onnx is missing"),
        (lambda c: c["checksums"].update({"../x": 1}), r"checksums\.\.\./x is of no file beside it"),
        (lambda c: c["checksums"].update({"x": 1}), r"x is missing"),
    ):
        changed = json.loads(whole)
        change(changed)
        config.write_text(json.dumps(changed))
        with pytest.raises(TaperlitError, match=rf"{words}.*; export the model again\.$"):
            OnnxEngine(directory)
    with pytest.raises(TaperlitError, match=r"has no config.json"):
        OnnxEngine(config)


def test_wrong_use_is_told(build, tmp_path):
    directory = export_onnx(build(), tmp_path / "out")
    for arguments, words in (((0,), "batch_size must be"), ((1, 33), "outside the model's context")):
        with pytest.raises(TaperlitError, match=words):
            OnnxEngine(directory, *arguments)
    engine = OnnxEngine(directory, 1, 4)
    with pytest.raises(TaperlitError, match="call prefill first"):
        engine.step(torch.zeros(1, dtype=torch.int64))
    for prompts, words in (
        ([[1], [2]], "1 prompts at a time"),
        ([[]], "no tokens"),
        ([[1] * 5], "longer than the 4"),
        ([[300]], "outside of 0 to 299"),
    ):
        with pytest.raises(TaperlitError, match=words):
            engine.prefill(prompts)
    engine.prefill([[1, 2, 3, 4]])
    with pytest.raises(TaperlitError, match="context of 4 tokens is full"):
        engine.step(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TaperlitError, match="exists; name another directory or pass --force"):
        export_onnx(build(), directory)


def test_the_model_stays_as_it_was(build, tmp_path):
    model = build("narrow", "explicit")
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
