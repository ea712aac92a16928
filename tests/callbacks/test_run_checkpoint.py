"""What a resumed run's RunCheckpoint knows of the run before."""

from toy import Toy, fit

from taperlit.callbacks import RunCheckpoint


def test_a_run_that_goes_on_has_the_score_of_the_last_validation(tmp_path):
    def go(steps, ckpt_path=None):
        callback = RunCheckpoint(dirpath=tmp_path, monitor="val/loss")
        options = dict(enable_checkpointing=True, limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=0)
        fit(tmp_path, Toy(tapered=False), callback, steps=steps, ckpt_path=ckpt_path, **options)
        return callback

    first = go(10)
    assert first.current_score is not None
    second = go(11, str(tmp_path / "last.ckpt"))  # which no validation has
    assert second.state_dict() == first.state_dict()
