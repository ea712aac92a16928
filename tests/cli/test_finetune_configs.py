"""The fine-tuning configs: they parse, compose with every overlay, and hold the budgets that they name."""

import pytest
from test_configs import CONFIGS, parse, slots

RUNS = sorted((CONFIGS / "finetune").glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "taper").glob("*.yaml"))
# arXiv:2507.02559: optimizer steps and peak and final learning rate of the released models.
BUDGETS = {"small": (300, 6e-4, 3e-4), "medium": (500, 6e-4, 3e-4), "large": (600, 3e-4, 4e-5), "xl": (800, 1e-4, 2e-5)}


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.stem)
def test_every_run_parses(run):
    config = parse("--config", str(run))
    assert config.model.preset is None
    assert config.data.tokenizer == config.model.pretrained
    assert slots(config) >= {"gate", "alignment", "anchor", "fold"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_compose_with_them(overlay):
    config = parse("--config", str(CONFIGS / "finetune/gpt2_xl_owt.yaml"), "--config", str(overlay))
    running = slots(config)
    assert ("gate" in running) == (config.model.taper in ("attention", "internal", "all"))
    assert ("fakeln" in running) == (overlay.stem == "fakeln")
    if "fakeln" in running:
        assert config.taper.fakeln.init_args.final == 722  # the run's own schedule, not the overlay's


@pytest.mark.parametrize("size", BUDGETS)
def test_gpt2_runs_have_fakelns_budget(size):
    steps, peak, final = BUDGETS[size]
    config = parse("--config", str(CONFIGS / f"finetune/gpt2_{size}_owt.yaml"))
    assert (config.trainer.max_steps, config.model.lr) == (steps, peak)
    assert config.model.lr * config.model.min_lr_ratio == pytest.approx(final, rel=0.01)
    tokens = config.data.batch_size * config.data.block_size * config.trainer.accumulate_grad_batches
    assert tokens == 2**19
    assert config.data.max_tokens * (1 - config.data.val_fraction) > steps * tokens
