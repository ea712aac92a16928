"""What a run prints: one screen, nothing that nobody can act on."""

import logging
import warnings

import pytest
from small import error_of, fit_command

from taperlit.cli import main
from taperlit.cli.quiet import quiet


@pytest.fixture
def said():
    """What Lightning's loggers say, line by line."""
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_run_says_what_it_is_and_what_to_do_next(tmp_path, corpus, said, capsys):
    args = fit_command(tmp_path, f"{corpus}/*.py", "--trainer.enable_model_summary=true", "--model.taper=internal")
    overlays = ["--config", f"{tmp_path}/lost.yaml", "--config", f"{tmp_path}/won.yaml"]
    for name, weight in (("lost", 0.2), ("won", 0.3)):
        (tmp_path / f"{name}.yaml").write_text(f"model: {{weight_decay: {weight}}}\n")
    capsys.readouterr()
    assert main([*args, *overlays, "--trainer.enable_progress_bar=false"]) == 0
    printed = capsys.readouterr()
    run = tmp_path / "runs/run/version_0"
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in said if line}
    assert told["model"].startswith("llama_350m with overrides: ")
    assert told["norms"] == "4 tapered: model.blocks.*.attn_norm (2), model.blocks.*.mlp_norm (2)"
    assert f"data.files {corpus}/*.py: " in told["data"]
    assert told["devices"] == "1 x cpu, 32-true"
    assert told["logs"] == str(run)
    assert "val" not in told
    assert told["steps"] == "20"
    assert float(told["val/loss"]) > 0
    assert told["next"] == f"taperlit generate --model {run}/folded --prompt 'Once'"
    (lost,) = [line for line in said if "has no effect" in line]
    assert lost == f"--config {tmp_path}/lost.yaml has no effect: all that it sets is set again by {tmp_path}/won.yaml."
    everything = "\n".join([*said, printed.out, printed.err])
    assert len(everything.splitlines()) < 30
    for word in ("Tip", "litlogger", "GPU available", "deprecated", "Warning"):
        assert word not in everything, word
    config = str(run / "config.yaml")
    assert "without one the model is untrained" in error_of(capsys, "validate", "--config", config)


def test_a_run_that_will_not_validate_says_so(tmp_path, corpus, said):
    args = fit_command(tmp_path, f"{corpus}/*.py", "--trainer.enable_model_summary=true")
    options = [
        "--trainer.max_steps=2",
        "--trainer.accumulate_grad_batches=2",
        "--taper.gate.warmup=1",
        "--taper.gate.end=2",
    ]
    assert main([*args, *options, "--trainer.val_check_interval=5"]) == 0
    (line,) = [line for line in said if line.startswith("val ")]
    assert line.split(maxsplit=1)[1] == "never: trainer.val_check_interval is 5, and the run has 4 batches; lower it"
    assert not any(line.startswith("val/loss") for line in said)
    assert not any("no effect" in line for line in said)
    said.clear()
    assert main([*args, *options, "--trainer.val_check_interval=4"]) == 0  # as it says
    assert any(line.startswith("val/loss") for line in said)
    assert not any(line.startswith("val ") for line in said)


def test_a_slot_that_the_taper_keeps_off_is_told(tmp_path, corpus, said):
    args = fit_command(tmp_path, f"{corpus}/*.py", "--model.taper=none", "--trainer.max_steps=1")
    assert main([*args, "--taper.tail=true", "--taper.hold=false"]) == 0
    (line,) = [line for line in said if "taper.tail" in line]
    assert line == "taper.tail has no effect with model.taper none: it is for attention, internal, all."
    assert not any("taper.hold" in line for line in said)


def test_only_what_nobody_can_mend_is_kept_back(said):
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    advert = "💡 Tip: For seamless cloud logging, try installing something."
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter("always", append=True)
        rank_zero_info(advert)
        rank_zero_info("GPU available: False, used: False")
        rank_zero_info("GPU available but not used")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another.", FutureWarning, stacklevel=1)
        warnings.warn("`Trainer(x)` is deprecated, use y.", FutureWarning, stacklevel=1)
    assert said == ["GPU available but not used"]
    assert [str(warning.message) for warning in caught] == ["`Trainer(x)` is deprecated, use y."]
    rank_zero_info(advert)
    assert said[-1] == advert  # nothing stays behind


def test_a_save_dir_that_is_no_folder_is_one_line(tmp_path, corpus, capsys):
    (tmp_path / "runs").write_text("a file")
    line = error_of(capsys, *fit_command(tmp_path, f"{corpus}/*.py"))
    assert f"{tmp_path}/runs" in line
    assert "cannot be written: Not a directory" in line
    assert (tmp_path / "runs").read_text() == "a file"
