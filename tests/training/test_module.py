import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import lightning as L
import pytest
import torch
from families import FAMILIES
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._dynamo.testing import CompileCounter

from taperlit import AlignmentFreeze, GateSchedule, LanguageModel, ScaleAnchor, TailPenalty
from taperlit.callbacks import TokenThroughput
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.training import optimizer as adamw
from taperlit.training.module import Perplexity, TokenMean
from taperlit.training.optimizer import Settings

SHAPE = dict(vocab_size=100, block_size=16, n_layer=2, n_head=2, d_model=16, d_ff=32)


def trainer(tmp_path, steps=12, **options):
    return L.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False,
        **{"logger": False, "enable_checkpointing": False, "enable_model_summary": False, **options},
    )  # fmt: skip


def blocks(count=48, batch_size=4, seed=0):
    data = torch.randint(100, (count, 17), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(data, batch_size=batch_size)


def test_only_matrices_decay(tmp_path):
    module = LanguageModel("gpt2_124m", "internal", {**SHAPE, "position": "learned"}, weight_decay=0.3)
    trainer(tmp_path, steps=1).fit(module, blocks())
    decay, keep = module.trainer.optimizers[0].param_groups
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert decay["weight_decay"] == 0.3
    assert keep["weight_decay"] == 0.0
    decayed = {names[p] for p in decay["params"]}
    assert decayed == {n for n in names.values() if ".blocks." in n and n.endswith("proj.weight")}
    assert {names[p] for p in keep["params"]} == set(names.values()) - decayed


def test_the_maps_of_a_mixture_decay_too():
    for family in ("Mixtral", "Gemma2"):
        model = FAMILIES[family].make()
        decay, keep = adamw.build(model, Settings(1e-3, (0.9, 0.95), 0.1, 0, 10, 0.1, 0), fused=False)[0].param_groups
        names = {parameter: name for name, parameter in model.named_parameters()}
        kept = {names[p] for p in keep["params"]}
        assert kept == {n for n in names.values() if "norm" in n or "embed" in n}
        assert len(kept) + len(decay["params"]) == len(names)


def test_validation_is_the_mean_over_tokens_with_a_ragged_last_batch(tmp_path):
    module = LanguageModel("small_1m", "none", SHAPE)
    module.configure_model()
    data = torch.randint(100, (7, 17))
    data[-1] = -100  # padding
    data[3, 5:] = -100
    metrics = trainer(tmp_path).validate(module, torch.utils.data.DataLoader(data, batch_size=3), verbose=False)[0]
    with torch.no_grad():
        logits = module(data[:, :-1].clamp(min=0)).double()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    assert metrics["val/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_started_process_has_metrics_of_its_own(tmp_path):
    module = LanguageModel("small_1m", "none", SHAPE)
    there = pickle.loads(ForkingPickler.dumps(module))
    assert there.val_loss.weight.is_shared()
    there.trainer = trainer(tmp_path)
    there.setup("validate")
    for name in ("val_loss", "val_perplexity", "test_loss", "test_perplexity"):
        getattr(there, name).update(2.0, 3)
        assert getattr(there, name).weight == 3
        assert getattr(module, name).weight == 0


def test_a_mean_over_many_batches_is_exact_in_every_precision():
    for kind, expected in ((TokenMean, loss := torch.tensor(5.68)), (Perplexity, loss.double().exp())):
        module = nn.Sequential(nn.Linear(2, 2))
        module.mean = kind()
        module.to(torch.bfloat16)
        for _ in range(3000):
            module.mean.update(loss, torch.tensor(4096))
        assert module.mean.compute().item() == pytest.approx(expected.item(), rel=1e-9)
        module.mean.reset()
        assert module.mean.mean_value.dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_the_logged_validation_loss_is_the_mean_of_the_token_losses(tmp_path, precision):
    module = LanguageModel("small_1m", "none", SHAPE)
    module.configure_model()
    sums = []

    class Add(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            sums.append(outputs.double().sum().item())

    checking = trainer(tmp_path, precision=precision, callbacks=[Add()])
    metrics = checking.validate(module, blocks(1200, 2), verbose=False)[0]
    assert len(sums) == 600
    assert metrics["val/loss"] == pytest.approx(sum(sums) / (1200 * 16), rel=1e-6)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_over_fewer_batches_has_their_mean(tmp_path, clip):
    torch.manual_seed(0)
    module = LanguageModel("small_1m", "none", SHAPE, lr=0.01, warmup=0)
    data, seen = blocks(24), []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([p.grad.clone() for p in pl_module.model.parameters()])
            self.weights = copy.deepcopy(pl_module.model)

    watch = Watch()
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": clip, "logger": CSVLogger(tmp_path)}
    trainer(tmp_path, steps=2, callbacks=[watch], log_every_n_steps=1, **options).fit(module, data)
    assert len(seen) == 2  # over four batches, and over the two that the epoch has left
    left = torch.cat([*data][4:])
    model = watch.weights
    model.zero_grad()
    model(left[:, :-1], left[:, 1:]).backward()
    for parameter, gradient in zip(model.parameters(), seen[1], strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert module.trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm, rel=1e-4)


def test_a_random_pass_counts_as_much_in_a_short_step(tmp_path, monkeypatch):
    def gradients(extra):
        monkeypatch.setattr(
            TailPenalty,
            "_on_random_tokens",
            lambda self, trainer, module: module.model.head.weight.sum() if extra else None,
        )
        torch.manual_seed(0)
        module, seen = LanguageModel("small_1m", "internal", SHAPE, lr=1e-20), []

        class Watch(L.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                seen.append(pl_module.model.head.weight.grad.clone())

        callbacks = [GateSchedule(1, 3), AlignmentFreeze(), TailPenalty(weight=0.25, random_every=1), Watch()]
        trainer(tmp_path, steps=3, callbacks=callbacks, accumulate_grad_batches=4).fit(module, blocks(40))
        return seen

    with_pass, without = gradients(True), gradients(False)
    assert len(without) == 3  # over four batches, four, and two; there are no targets in the first step
    for step, share in enumerate((0.0, 0.25, 0.25)):
        difference = with_pass[step] - without[step]
        torch.testing.assert_close(difference, torch.full_like(difference, share), rtol=1e-4, atol=1e-5)


def test_random_tokens_go_with_activation_checkpointing(tmp_path):
    def weights(on):
        torch.manual_seed(0)
        module = LanguageModel("small_1m", "internal", SHAPE, lr=0.01, warmup=0, activation_checkpointing=on)
        callbacks = [GateSchedule(2, 4), AlignmentFreeze(), TailPenalty(random_every=1)]
        trainer(tmp_path, steps=6, callbacks=callbacks).fit(module, blocks(24))
        return module.state_dict()

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_not_hidden(tmp_path):
    module = LanguageModel("small_1m", "none", SHAPE)
    module.configure_model()
    with torch.no_grad():
        module.model.head.weight[0] = float("nan")
    metrics = trainer(tmp_path).validate(module, blocks(), verbose=False)[0]
    assert metrics["val/loss"] != metrics["val/loss"]


def test_a_whole_compiled_run_makes_one_graph_a_phase(tmp_path, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=counter, **options))
    module = LanguageModel("small_1m", "internal", SHAPE, compile=True)
    phases = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            phases.append((next(iter(tapered_norms(pl_module).values())).gate.phase.value, counter.frame_count))

    callbacks = [GateSchedule(0.25, 0.75), AlignmentFreeze(), ScaleAnchor("model.final_norm"), Watch()]
    # Validation, its ragged last batch and the summary's example all have other shapes and modes.
    options = {"val_check_interval": 2, "enable_model_summary": True}
    trainer(tmp_path, callbacks=callbacks, **options).fit(module, blocks(), blocks(count=10))
    graphs = dict(phases)  # graphs so far, at the end of each phase
    assert list(graphs) == ["normalize", "blend", "linear"]
    assert graphs == {"normalize": 1, "blend": 2, "linear": 3}


def test_compiled_and_eager_runs_agree(tmp_path, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend="aot_eager", **options))
    results = []
    for compile in (False, True):
        torch._dynamo.reset()
        L.seed_everything(0, verbose=False)
        module = LanguageModel("small_1m", "internal", SHAPE, compile=compile)
        trainer(tmp_path, callbacks=[GateSchedule(0.25, 0.75), AlignmentFreeze()]).fit(module, blocks())
        results.append(module.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_statistics_are_float32_in_every_precision(tmp_path, precision):
    L.seed_everything(0, verbose=False)
    module = LanguageModel("gpt2_124m", "internal", SHAPE)
    anchor = ScaleAnchor("model.final_norm")
    fit = trainer(tmp_path, callbacks=[GateSchedule(0.25, 0.75), AlignmentFreeze(), anchor], precision=precision)
    fit.fit(module, blocks())
    for norm in tapered_norms(module).values():
        assert norm.alignment.dtype == norm.alignment_ema.dtype == norm.gate.value.dtype == torch.float32
        assert norm.alignment != 1
        assert norm.gate.value == 0
    assert anchor.target.dtype == torch.float32
    assert fit.callback_metrics["train/loss"].dtype == torch.float32


def test_gradients_and_learning_rate_are_logged(tmp_path):
    module = LanguageModel("small_1m", "none", SHAPE, lr=0.01, warmup=4)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    throughput = TokenThroughput(window=4)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "gradient_clip_val": 1e-3}
    trainer(tmp_path, callbacks=[throughput, Watch()], **options).fit(module, blocks())
    assert [round(m["train/lr"], 6) for m in seen[:5]] == [0.0025, 0.005, 0.0075, 0.01, 0.01]
    assert all(m["train/grad_norm"] > 1e-3 for m in seen)  # before clipping
    assert seen[-1]["train/tokens"] == throughput.tokens == 12 * 4 * 16
    assert seen[-1]["train/tokens_per_s"] > 0


def test_model_flops_are_six_a_parameter_and_attention():
    module = LanguageModel("small_9m")
    c, T = module.source.config, 512
    with torch.device("meta"):
        module.configure_model()
    matrices = sum(p.numel() for n, p in module.named_parameters() if p.ndim == 2)  # the tied one serves the head
    attention = 12 * c.n_layer * c.d_model * T
    assert module.flops_per_token(T) == pytest.approx(6 * matrices + attention, rel=0.15)


def test_max_steps_is_asked_for(tmp_path):
    for warmup in (2, 0.05):
        module = LanguageModel("small_1m", "none", SHAPE, warmup=warmup)
        with pytest.raises(TaperlitError, match=r"Set trainer\.max_steps"):
            trainer(tmp_path, steps=-1, max_epochs=1).fit(module, blocks())
