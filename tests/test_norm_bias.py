"""A bias in the linear branch of norms that have none: the formula, its gradients, its state, and where it folds to."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from taperlit import AlignmentFreeze, GateSchedule, LanguageModel, load_model, taper, write_folded
from taperlit.baselines.fakeln import apply_fakeln
from taperlit.decode import Engine
from taperlit.decode.onnx_export import onnx_engine
from taperlit.distributed import parallelize
from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.hub.families import as_causal_lm, as_transformer
from taperlit.norm import TaperLayerNorm, TaperRMSNorm, shared_gate, tapered_norms
from taperlit.stress import stress
from taperlit.surgery import missing_gains, separate_first
from taperlit.transformer import Transformer, TransformerConfig

SHAPE = dict(vocab_size=60, block_size=16, n_layer=2, n_head=2, d_model=16, d_ff=32)


class SeesOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def scattered(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name or p.dim() < 2 or not isinstance(module, Transformer):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def biased(shape=24, **words):
    norm = TaperRMSNorm(shape, eps=1e-3, **words)
    norm.add_bias()
    norm.alignment.fill_(1.7)
    return scattered(norm)


@pytest.mark.parametrize("shape", [(24,), (3, 8)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("g", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("s", [None, 0.4])
def test_it_is_the_formula_and_its_gradients(shape, affine, g, watched, s):
    """In the one step of torch's own norms, and in the plain operations that a mode sees."""
    norm, x = biased(shape, elementwise_affine=affine), torch.randn(4, 5, *shape).requires_grad_()
    norm.gate.set(g)
    if s is not None:
        norm.separate_first()
        norm.first_alignment.fill_(0.05)
        norm.gate.set_first(s)
    with SeesOperations() if watched else torch.enable_grad():
        y = norm(x)
    if g == 0.3:
        inner = y.grad_fn.next_functions
        assert ("BlendBackward" in str(inner) or "BlendBackward" in str(y.grad_fn)) is not watched
    wide = {name: p.detach().double().requires_grad_() for name, p in norm.named_parameters()}
    xd, c = x.detach().double().requires_grad_(), torch.tensor([1.7] * 5, dtype=torch.float64)
    if s is not None:
        c[0] = 0.05**s * 1.7 ** (1 - s)
    dims, one = tuple(range(-len(shape), 0)), torch.ones(shape).double()
    normed = xd / (xd.square().mean(dims, keepdim=True) + 1e-3).sqrt() * wide.get("weight", one)
    linear = c.view(5, *(1 for _ in shape)) * xd * wide.get("taper_weight", one) + wide["taper_bias"]
    expected = g * normed + (1 - g) * linear
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    seed = torch.randn(y.shape)
    mine = torch.autograd.grad(y, [x, *norm.parameters()], seed)
    theirs = torch.autograd.grad(expected, [xd, *wide.values()], seed.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_blend_can_be_differentiated_twice():
    norm = biased(6, dtype=torch.float64)
    norm.gate.set(0.4)
    named = dict(norm.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(norm, dict(zip(named, values, strict=True)), x)

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in named.values()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_gate_1_and_while_it_is_zero_nothing_changes(dtype):
    plain, norm = TaperRMSNorm(24).to(dtype), TaperRMSNorm(24).to(dtype)
    norm.add_bias()
    assert norm.taper_bias.dtype == dtype
    x = torch.randn(3, 5, 24).to(dtype)
    for g in (1.0, 0.6, 0.0):
        for each in (plain, norm):
            each.gate.set(g)
        assert torch.equal(norm(x), plain(x)), g
    with torch.no_grad():
        norm.taper_bias.normal_()
    norm.gate.set(1.0)
    assert torch.equal(norm(x), nn.RMSNorm(24).to(dtype)(x))


def test_only_where_there_is_none():
    theirs, without = TaperLayerNorm(8), TaperLayerNorm(8, bias=False)
    own = theirs.taper_bias
    theirs.add_bias()
    without.add_bias()
    assert theirs.taper_bias is own
    assert without.taper_bias.shape == (8,)
    assert TaperRMSNorm(8).taper_bias is None


def test_the_boundary_and_a_reset_begin_it_at_zero():
    for begin in (TaperRMSNorm.freeze, TaperRMSNorm.reset_parameters):
        norm = biased()
        norm.alignment_ema.copy_(torch.tensor([1.0, 2.0, 1.0]))
        begin(norm)
        assert torch.equal(norm.taper_bias, torch.zeros(24))
        assert torch.equal(norm.taper_weight, norm.weight)


def test_its_state_makes_itself_room():
    norm, x = biased(), torch.randn(3, 5, 24)
    norm.gate.set(0.4)
    fresh = TaperRMSNorm(24, eps=1e-3)
    fresh.load_state_dict(norm.state_dict())
    with torch.device("meta"):
        hollow = TaperRMSNorm(24, eps=1e-3)
    hollow.load_state_dict(norm.state_dict(), assign=True)
    for other in (fresh, hollow, copy.deepcopy(norm)):
        assert torch.equal(other(x), norm(x))
    plain = scattered(nn.RMSNorm(24), 3)
    norm.load_state_dict(plain.state_dict())
    assert torch.equal(norm.taper_weight, plain.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*taper_bias"):
        norm.load_state_dict(TaperRMSNorm(24).state_dict())


# ---- on a model


def model_of(names=("*",), **changes):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SHAPE, **changes}))
    taper(model, names, bias=True)
    for i, norm in enumerate(tapered_norms(model).values()):
        norm.alignment.fill_(0.5 + 0.3 * i)
    return scattered(model).eval()


def test_it_joins_the_optimizer_beside_the_gain():
    model = Transformer(TransformerConfig(**SHAPE))
    decay = [p for name, p in model.named_parameters() if "norm" not in name]
    keep = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": keep, "weight_decay": 0.0}])
    taper(model, bias=True, optimizers=optimizer)
    held = {id(p) for p in optimizer.param_groups[1]["params"]}
    new = [p for name, p in model.named_parameters() if "taper_bias" in name]
    assert len(new) == 5
    assert all(id(p) in held for p in new)
    assert missing_gains(model, [optimizer]) == []


def test_one_that_no_optimizer_holds_is_named():
    model = Transformer(TransformerConfig(**SHAPE))
    optimizer = torch.optim.SGD(model.blocks.parameters())
    with pytest.raises(
        TaperlitError, match=r"holds a gain of final_norm, whose group its new bias would join"
    ) as error:
        taper(model, bias=True, optimizers=[optimizer])
    assert "\n" not in str(error.value)
    assert not tapered_norms(model)
    taper(model, bias=True)  # as it says, but of an optimizer that is there
    gains = [p for name, p in model.named_parameters() if "taper_bias" not in name]
    missing = missing_gains(model, [torch.optim.SGD(gains)])
    assert missing == [name for name, _ in model.named_parameters() if "taper_bias" in name]


def test_fakelns_linear_branch_has_no_parameters_of_its_own():
    model = Transformer(TransformerConfig(**SHAPE))
    apply_fakeln(model)
    with pytest.raises(TaperlitError, match=r"linear branch of final_norm is the norm itself"):
        model.final_norm.add_bias()


READERS = {"attn_norm": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp_norm": ("mlp.gate_proj", "mlp.up_proj")}


@pytest.mark.parametrize(("names", "changes"), [
    (["*"], {}), (["blocks.*"], {"tied": True}), (["*"], {"tied": True, "bias": True}), (["*"], {"qkv_bias": True}),
])  # fmt: skip
def test_it_folds_into_the_biases_of_what_the_norms_feed(names, changes):
    model = model_of(names, **changes)
    shared_gate(model).set(0.0)
    before, tokens = copy.deepcopy(model).double(), torch.randint(60, (2, 9))
    wanted = model(tokens)
    structure = fold(model, lambda: model(tokens))
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-5)
    feeds = {f"blocks.{i}.{n}": [f"blocks.{i}.{m}" for m in maps] for i in range(2) for n, maps in READERS.items()}
    if names == ["*"]:
        feeds["final_norm"] = ["head"]
    made = set()
    for name, maps in feeds.items():
        norm = before.get_submodule(name)
        for one in maps:
            old, new = before.get_submodule(one), model.get_submodule(one)
            gain = norm.alignment.double() * norm.taper_weight
            bias = old.weight @ norm.taper_bias + (0 if old.bias is None else old.bias)
            torch.testing.assert_close(new.weight.double(), old.weight * gain, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(new.bias.double(), bias, rtol=1e-5, atol=1e-7)
            made |= {f"{one}.bias"} if old.bias is None else set()
    assert structure["biases"].keys() == made


@pytest.mark.parametrize("gate", [1.0, 0.4, 0.0, "folded"])
def test_it_decodes(gate, tmp_path):
    """The engine's cache against the model's own forward pass, in every phase and folded, there and back from disk."""
    model, tokens = model_of(), torch.randint(60, (2, 12))
    shared_gate(model).set(0.0 if gate == "folded" else gate)
    if gate == "folded":
        structure = fold(model, lambda: model(tokens))
        model = load_model(write_folded(tmp_path / "folded", model, structure)).model
    with torch.no_grad():
        wanted = model(tokens)
    engine = Engine(model, batch_size=2)
    got = [engine.prefill(tokens[:, :5]), *(engine.step(tokens[:, i]) for i in range(5, 12))]
    torch.testing.assert_close(torch.stack(got, 1), wanted[:, 4:], rtol=1e-4, atol=1e-4)


def test_folded_it_runs_in_onnx_and_under_stress():
    model, tokens = model_of(), torch.randint(60, (1, 9))
    shared_gate(model).set(0.0)
    fold(model, lambda: model(tokens))
    with torch.no_grad():
        wanted = model(tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = onnx_engine(model)
        got = [engine.prefill(tokens[:, :5]), *(engine.step(tokens[:, i]) for i in range(5, 9))]
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(torch.stack(got, 1), wanted[:, 4:], rtol=1e-4, atol=1e-4)
    report = stress(model, 60, 16, others=())
    assert report.ok, report.verdict()
    assert [one.note for one in report.outcomes if one.case == "cached decoding"] == [None]


@pytest.mark.parametrize("gate", [0.4, "folded"])
def test_it_goes_to_transformers_and_back(gate):
    model, tokens = model_of(), torch.randint(60, (2, 9))
    shared_gate(model).set(0.0 if gate == "folded" else gate)
    if gate == "folded":
        fold(model, lambda: model(tokens))
    theirs = as_causal_lm(model)
    torch.testing.assert_close(theirs(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    ours = as_transformer(theirs)
    for (name, mine), other in zip(model.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_it_stands_beside_a_first_position_of_its_own():
    model = model_of()
    separate_first(model)
    shared_gate(model).set(0.5)
    theirs = as_causal_lm(model)
    assert torch.equal(as_transformer(theirs).blocks[0].attn_norm.taper_bias, model.blocks[0].attn_norm.taper_bias)


def test_it_is_split_as_the_gains_are(tmp_path):
    """FSDP2 with a single process: its parameters are DTensors, gathered for each block and reduced after it."""
    whole, split, tokens = model_of().train(), model_of().train(), torch.randint(60, (2, 9))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallelize(split, init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
        assert isinstance(split.blocks[0].attn_norm.taper_bias, DTensor)
        for g in (1.0, 0.4, 0.0):
            for model in (whole, split):
                shared_gate(model).set(g)
                model.zero_grad()
                model(tokens).square().mean().backward()
            for (name, mine), other in zip(whole.named_parameters(), split.parameters(), strict=True):
                got = other.grad.full_tensor()
                torch.testing.assert_close(got, mine.grad, rtol=1e-5, atol=1e-7, msg=f"{name} at {g}")
                assert (
                    bool(got.any()) or (g == 1.0 and ".taper_" in name) or (g == 0.0 and name.endswith("norm.weight"))
                )
    finally:
        dist.destroy_process_group()


# ---- in a run


def blocks():
    return torch.randint(60, (64, 9), generator=torch.Generator().manual_seed(1))


class Stop(L.Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.after


class ByNumber(LanguageModel):
    """Its batches are known by their number, so that a resumed run sees what the unbroken one does."""

    def training_step(self, batch, batch_idx):
        return super().training_step(blocks()[4 * batch_idx : 4 * batch_idx + 4], batch_idx)


def run(tmp_path, *more, ckpt_path=None, policy="all", bias=True):
    torch.manual_seed(0)
    module = ByNumber("small_1m", policy, SHAPE, lr=3e-3, taper_bias=bias)
    trainer = L.Trainer(
        max_steps=12, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[GateSchedule(4, 8), AlignmentFreeze(), *more],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = torch.utils.data.DataLoader(blocks(), batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return module, trainer


def test_a_run_trains_it_from_the_boundary_on_and_resumes(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(max(norm.taper_bias.abs().max().item() for norm in tapered_norms(pl_module).values()))

    whole, trainer = run(tmp_path, Look())
    assert seen[:4] == [0.0] * 4
    assert all(value > 0 for value in seen[4:])
    assert not any("taper_bias" in name for name in decayed(whole, trainer))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, first = run(tmp_path, Stop(6))
    first.save_checkpoint(tmp_path / "mid.ckpt")
    second, _ = run(tmp_path, ckpt_path=tmp_path / "mid.ckpt")
    for (name, mine), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    loaded, tokens = load_model(tmp_path / "end.ckpt").model, blocks()[:2]
    assert torch.equal(loaded(tokens), whole.eval()(tokens))
    with pytest.raises(TaperlitError, match=r"model\.taper_bias is False and .* began with True") as error:
        run(tmp_path, ckpt_path=tmp_path / "mid.ckpt", bias=False)
    assert "\n" not in str(error.value)


def decayed(module, trainer):
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[p] for p in trainer.optimizers[0].param_groups[0]["params"]]


@pytest.mark.parametrize(("policy", "count"), [("attention", 2), ("internal", 4), ("all", 5), ("none", 0), ("dyt", 0)])
def test_the_option_reaches_the_norms_of_the_policy(policy, count):
    module = LanguageModel("small_1m", policy, SHAPE, taper_bias=True)
    module.configure_model()
    assert sum("taper_bias" in name for name, _ in module.named_parameters()) == count
    plain = LanguageModel("small_1m", policy, SHAPE)
    plain.configure_model()
    assert not any("taper_bias" in name for name, _ in plain.named_parameters())
