import sys

import pytest
import torch

from taperlit.bench.models import random_model, tapered
from taperlit.bench.train import Setting, Stepper, our_loss, their_loss, train_rows
from taperlit.errors import TaperlitError
from taperlit.norm import Phase, tapered_norms
from taperlit.transformer import TransformerConfig

CONFIG = TransformerConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, d_model=32, d_ff=64)


def setting(steps=2, rounds=2):
    return Setting("small_1m", 4, 32, torch.float32, "eager", torch.device("cpu"), steps, rounds)


@pytest.mark.slow
def test_every_variant_is_measured():
    rows = {row["variant"]: row for row in train_rows(CONFIG, setting(), "all")}
    assert [*rows] == ["plain", "normalize", "blend", "linear", "transformers", "lightning"]
    for row in rows.values():
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["tokens_per_s"] == pytest.approx(4 * 32 * 1e3 / row["step_ms"])
    assert rows["plain"]["ratio"] == rows["plain"]["peak_ratio"] == 1
    assert rows["linear"]["peak_gb"] < rows["blend"]["peak_gb"]
    lightning = rows["lightning"]
    assert lightning["overhead_low"] <= lightning["overhead_percent"] <= lightning["overhead_high"]


def stepper(model, loss=our_loss):
    where = setting()
    return Stepper(model.train(), loss, where, where.batches(300))


def test_a_step_trains_the_parameters_of_its_phase_alone():
    for gate, phase in ((1.0, Phase.NORMALIZE), (0.0, Phase.LINEAR)):
        model = tapered(random_model(CONFIG), "all", gate)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        one = stepper(model)
        one.step()
        norms = tapered_norms(model)
        assert all(norm.gate.phase is phase for norm in norms.values())
        for name, parameter in model.named_parameters():
            idle = name.endswith("norm.taper_weight" if phase is Phase.NORMALIZE else "norm.weight")
            assert torch.equal(parameter, before[name]) == idle, name
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(not norm.pending.any() for norm in norms.values())  # taken into the averages, or never there


def test_the_peak_is_what_the_step_allocates():
    """A loss whose activations and gradients can be counted by hand."""
    model = torch.nn.Linear(1000, 1000, bias=False)

    def loss(model, batch):
        kept = model(torch.ones(500, 1000))  # two of 2 MB, of which the input lives on for the gradient
        return kept.exp().sum()  # one more, kept for the gradient

    one = stepper(model, loss)
    one.step()
    own = 4 * 1000 * 1000
    assert one.resident_bytes() == pytest.approx(3 * own, abs=100)  # the weights and two moments
    peak = one.peak_bytes() - one.resident_bytes()
    # At the least the weights' gradient, the input and the exponential; at most the other temporaries of AdamW too.
    assert own + 2 * 500 * 1000 * 4 <= peak <= own + 4 * 500 * 1000 * 4 + 3 * own
    assert one.peak_bytes() - one.resident_bytes() == peak


def test_a_peer_that_computes_another_loss_fails_the_bench(monkeypatch):
    monkeypatch.setattr("taperlit.bench.train.their_loss", lambda model, batch: 1.01 * their_loss(model, batch))
    with pytest.raises(TaperlitError, match=r"transformers' loss is .* with the same weights and tokens"):
        next(train_rows(CONFIG, setting(), "all"))


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = {row["variant"]: row for row in train_rows(CONFIG, setting(1, 1), "all", lightning=False)}
    assert rows["transformers"]["skipped"] == "transformers is not installed"
    assert rows["transformers"]["ratio"] is None
    assert rows["linear"]["ratio"] > 0
