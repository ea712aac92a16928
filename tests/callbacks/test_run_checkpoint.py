"""What a resumed run's RunCheckpoint knows of the run before."""

from datetime import timedelta

import pytest
import torch
from toy import Toy, fit, same, state_of, trainer

from taperlit import Trainer
from taperlit.callbacks import RunCheckpoint
from taperlit.errors import TaperlitError

OPTIONS = dict(enable_checkpointing=True, limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=0)


def read(path):
    return torch.load(path, weights_only=True)


def test_a_run_that_goes_on_has_the_score_of_the_last_validation(tmp_path):
    def go(steps, ckpt_path=None):
        callback = RunCheckpoint(dirpath=tmp_path, monitor="val/loss")
        fit(tmp_path, Toy(tapered=False), callback, steps=steps, ckpt_path=ckpt_path, **OPTIONS)
        return callback

    first = go(10)
    assert first.current_score is not None
    second = go(11, str(tmp_path / "last.ckpt"))  # which no validation has
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("steps", [10, 12])
def test_a_second_fit_of_the_callback_saves_as_the_first(tmp_path, steps):
    callback = RunCheckpoint(dirpath=tmp_path)
    for seed, lr in enumerate((1e-2, 1e-6)):  # the second's losses are worse
        model = Toy(tapered=False, seed=seed, lr=lr)
        fit(tmp_path, model, callback, steps=steps, **OPTIONS)
        assert same(read(tmp_path / "last.ckpt")["state_dict"], state_of(model))
        best = read(tmp_path / "best.ckpt")
        assert best["callbacks"][callback.state_key]["best_model_score"] == callback.best_model_score
        assert list(callback.best_k_models.values()) == [callback.best_model_score]
        alone = RunCheckpoint(dirpath=tmp_path / f"{seed}")
        fit(tmp_path, Toy(tapered=False, seed=seed, lr=lr), alone, steps=steps, **OPTIONS)
        assert callback.best_model_score == alone.best_model_score
        assert same(best["state_dict"], read(tmp_path / f"{seed}/best.ckpt")["state_dict"])


def test_a_trainer_that_goes_on_keeps_its_best(tmp_path):
    callback = RunCheckpoint(dirpath=tmp_path)
    run = trainer(tmp_path, callback, steps=10, kind=Trainer, **OPTIONS)
    model = Toy(tapered=False)
    run.fit(model)
    best = read(tmp_path / "best.ckpt")
    model.lr = 10.0  # which makes all worse
    run.fit_loop.epoch_loop.max_steps = 20
    run.fit(model)
    assert same(read(tmp_path / "best.ckpt")["state_dict"], best["state_dict"])
    last = read(tmp_path / "last.ckpt")
    assert last["global_step"] == 20
    assert same(last["state_dict"], state_of(model))


@pytest.mark.parametrize("between", [{"every_n_train_steps": 4}, {"train_time_interval": timedelta(minutes=1)}])
def test_a_score_is_never_of_another_step_than_its_weights(between):
    (name,) = between
    words = rf"RunCheckpoint\.{name} would keep the weights of one step under val/loss of another.* with monitor=None"
    with pytest.raises(TaperlitError, match=words):
        RunCheckpoint(**between)
    RunCheckpoint(monitor=None, **between)


def test_a_second_fit_that_resumes_has_the_checkpoints_best(tmp_path):
    callback = RunCheckpoint(dirpath=tmp_path)
    fit(tmp_path, Toy(tapered=False), callback, steps=10, **OPTIONS)
    saved = callback.state_dict()
    fit(tmp_path, Toy(tapered=False), callback, steps=11, ckpt_path=tmp_path / "last.ckpt", **OPTIONS)
    assert callback.state_dict() == saved
    assert read(tmp_path / "last.ckpt")["global_step"] == 11
