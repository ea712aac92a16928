"""AdamW and its schedule, also after a resume, against torch's own and the formula."""

import copy

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from taperlit.schedule import warmup_cosine
from taperlit.training.module import LanguageModel
from taperlit.training.optimizer import Settings, apply_settings, build

SHAPE = dict(vocab_size=100, block_size=16, n_layer=1, n_head=2, d_model=16, d_ff=32)
SETTINGS = Settings(lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, warmup=3, total=20, min_lr_ratio=0.1)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def steps(model, optimizer, schedule, count, first=0):
    rates = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(3, 4, generator=generator)).square().sum().backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return rates


def resumed(after, settings):
    """An optimizer as Lightning restores it after some steps under SETTINGS, then told the settings of now."""
    before = model()
    optimizer, schedule = build(before, SETTINGS, fused=False)
    steps(before, optimizer, schedule, after)
    again = model()
    again.load_state_dict(before.state_dict())
    mine, plan = build(again, settings, fused=False)
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan.load_state_dict(copy.deepcopy(schedule.state_dict()))
    apply_settings(mine, plan, settings)
    return (before, optimizer, schedule), (again, mine, plan)


@pytest.mark.parametrize("after", [1, 3, 9])
def test_unchanged_settings_change_no_bit(after):
    whole, again = resumed(after, SETTINGS)
    assert again[1].state_dict()["param_groups"] == whole[1].state_dict()["param_groups"]
    assert again[2].state_dict() == whole[2].state_dict()
    assert steps(*whole, 5, after) == steps(*again, 5, after)
    for mine, theirs in zip(again[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@given(
    after=st.integers(1, 12),
    lr=st.floats(1e-5, 1),
    warmup=st.integers(0, 15),
    total=st.integers(13, 40),
    floor=st.floats(0, 1),
    start=st.integers(0, 40),
)
def test_every_rate_after_a_resume_is_the_formulas(after, lr, warmup, total, floor, start):
    settings = Settings(lr, (0.5, 0.6), 0.2, warmup, total, floor, start)
    _, (again, optimizer, schedule) = resumed(after, settings)
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    for number, rates in enumerate(steps(again, optimizer, schedule, 4, after), after):
        assert rates == [pytest.approx(lr * warmup_cosine(number, warmup, total, floor, start))] * 2
    decay, keep = optimizer.param_groups
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.2, 0.0)
    assert decay["betas"] == keep["betas"] == (0.5, 0.6)


def test_it_is_torchs_adamw():
    mine, theirs = model(), model()
    optimizer, schedule = build(mine, SETTINGS, fused=False)
    matrices = [theirs[0].weight, theirs[2].weight]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}], lr=0.1, betas=(0.9, 0.95)
    )
    for number in range(6):
        for group in plain.param_groups:
            group["lr"] = 0.1 * warmup_cosine(number, 3, 20, 0.1)
        generator = torch.Generator().manual_seed(number)
        theirs(torch.randn(3, 4, generator=generator)).square().sum().backward()
        plain.step()
        plain.zero_grad()
    steps(mine, optimizer, schedule, 6)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trainer_without_our_command_line_applies_what_it_is_given_too(tmp_path):
    data = torch.utils.data.DataLoader(torch.randint(100, (64, 17)), batch_size=4)
    rates = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    def fit(steps, ckpt_path=None, **options):
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[Watch()], default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        module = LanguageModel("small_1m", "none", SHAPE, warmup=2, **options)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    fit(5, lr=0.01).save_checkpoint(tmp_path / "five.ckpt")
    rates.clear()
    fit(8, str(tmp_path / "five.ckpt"), lr=0.001)
    assert rates == [pytest.approx(0.001 * warmup_cosine(step, 2, 8, 0.1)) for step in (5, 6, 7)]


def test_the_fused_step_is_the_plain_one():
    (before, *plain), (again, *fused) = ((m := model(), *build(m, SETTINGS, fused=way)) for way in (False, True))
    assert steps(before, *plain, 6) == steps(again, *fused, 6)
    for mine, theirs in zip(again.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
