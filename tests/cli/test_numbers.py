"""Numbers out of their range are refused where they enter, by name."""

import inspect
import math
from pathlib import Path

import lightning as L
import pytest
from jsonargparse import Namespace

from taperlit import (
    AlignmentFreeze,
    BoundedWrites,
    DecayWithGate,
    FakeLNSchedule,
    FiniteGuard,
    FirstPosition,
    GateHold,
    GateSchedule,
    LanguageModel,
    LearningRateDip,
    LossTails,
    RunCheckpoint,
    ScaleAnchor,
    ShrinkMassive,
    TailPenalty,
    TaperMonitor,
    TextDataModule,
    Trainer,
)
from taperlit.callbacks import StepProgressBar, TokenThroughput
from taperlit.cli import main
from taperlit.cli.trainer_options import check_options
from taperlit.errors import TaperlitError
from taperlit.training.trainer_numbers import RANGES, check_numbers

NAN, INF = math.nan, math.inf
CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = dict(preset="small_1m", overrides=dict(vocab_size=100, block_size=16, n_layer=1, d_model=16, d_ff=32, n_head=2))
WRONG = [
    (LanguageModel, MODEL, "model.lr", "lr", [0.0, -1e-3, NAN, INF]),
    (LanguageModel, MODEL, "model.betas[0]", "betas", [(-0.1, 0.9), (1.0, 0.9), (NAN, 0.9)]),
    (LanguageModel, MODEL, "model.betas[1]", "betas", [(0.9, 1.5), (0.9, -1.0)]),
    (LanguageModel, MODEL, "model.warmup", "warmup", [-1, -0.5, 1.5, NAN]),
    (LanguageModel, MODEL, "model.decay_start", "decay_start", [-1, -0.5, 1.5, NAN]),
    (LanguageModel, MODEL, "model.weight_decay", "weight_decay", [-1.0, NAN]),
    (LanguageModel, MODEL, "model.min_lr_ratio", "min_lr_ratio", [-0.1, 1.1, NAN]),
    (LanguageModel, MODEL, "model.chunk_tokens", "chunk_tokens", [0]),
    (TextDataModule, {}, "data.vocab_size", "vocab_size", [0]),
    (TextDataModule, {}, "data.tokenizer_bytes", "tokenizer_bytes", [0]),
    (TextDataModule, {}, "data.block_size", "block_size", [0]),
    (TextDataModule, {}, "data.batch_size", "batch_size", [0, -4]),
    (TextDataModule, {}, "data.val_fraction", "val_fraction", [0.0, 1.0, NAN]),
    (TextDataModule, {}, "data.max_documents", "max_documents", [0]),
    (TextDataModule, {}, "data.max_tokens", "max_tokens", [-1]),
    (TextDataModule, {}, "data.num_workers", "num_workers", [-1]),
    (TextDataModule, {}, "data.seed", "seed", [-1, 2**32]),
    (AlignmentFreeze, {}, "AlignmentFreeze.ema_rate", "ema_rate", [0.0, 1.5, NAN]),
    (AlignmentFreeze, {}, "AlignmentFreeze.track", "track", [-0.1, 1.0, NAN]),
    (AlignmentFreeze, {}, "AlignmentFreeze.at", "at", [0, 0.0, 1.5]),
    (AlignmentFreeze, {}, "AlignmentFreeze.skip", "skip", [-1]),
    (BoundedWrites, {}, "BoundedWrites.at", "at", [0, 0.0, 1.5]),
    (BoundedWrites, {}, "BoundedWrites.multiple", "multiple", [1.0, NAN, INF]),
    (FakeLNSchedule, {}, "FakeLNSchedule.aux_weight", "aux_weight", [-1.0, NAN]),
    (FakeLNSchedule, {}, "FakeLNSchedule.end_of_text", "end_of_text", [-1]),
    (FakeLNSchedule, {}, "FakeLNSchedule.start", "start", [1, -0.1, 1.1, NAN]),
    (FakeLNSchedule, {}, "FakeLNSchedule.mlp", "mlp", [-1, 1.5]),
    (FakeLNSchedule, {}, "FakeLNSchedule.qk", "qk", [-1, INF]),
    (FakeLNSchedule, {}, "FakeLNSchedule.v", "v", [-1, NAN]),
    (FakeLNSchedule, {}, "FakeLNSchedule.final", "final", [-1, 1.5]),
    (FiniteGuard, {}, "FiniteGuard.patience", "patience", [0, NAN]),
    (FirstPosition, {}, "FirstPosition.end", "end", [0, -3, 0.0, 1.5, NAN]),
    (GateHold, {}, "GateHold.band", "band", [0.0, NAN]),
    (GateHold, {}, "GateHold.far", "far", [1.0, NAN]),
    (GateHold, {}, "GateHold.window", "window", [3]),
    (GateHold, {}, "GateHold.patience", "patience", [0]),
    (GateHold, {}, "GateHold.back", "back", [-1, -0.5, 1.5]),
    (GateHold, {}, "GateHold.latest", "latest", [0, 1.5, NAN]),
    (GateSchedule, {}, "GateSchedule.settle", "settle", [0.0, NAN]),
    (GateSchedule, {}, "GateSchedule.warmup", "warmup", [-1, -0.5, 1.5, NAN]),
    (GateSchedule, {}, "GateSchedule.end", "end", [0, -1, 0.0, 1.5, NAN, 0.05]),  # the warm-up ends there
    (GateSchedule, {"warmup": 7}, "GateSchedule.end", "end", [7]),
    (GateSchedule, {"warmup": "auto"}, "GateSchedule.end", "end", [0.3]),  # it may last until there
    (GateSchedule, {"warmup": "auto"}, "GateSchedule.least", "least", [-1, 1.5, NAN]),
    (GateSchedule, {"warmup": "auto"}, "GateSchedule.latest", "latest", [-1, 1.5, NAN, 0.01]),
    (DecayWithGate, {}, "DecayWithGate.floor", "floor", [-0.1, 1.1, NAN]),
    (LearningRateDip, {}, "LearningRateDip.factor", "factor", [-0.1, 1.0, NAN]),
    (LearningRateDip, {}, "LearningRateDip.steps", "steps", [0, -0.1, 0.0, 1.5, INF, NAN]),
    (LossTails, {}, "LossTails.threshold", "threshold", [-1.0, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.weight", "weight", [-0.1, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.ema_rate", "ema_rate", [0.0, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.skip", "skip", [-1]),
    (RunCheckpoint, {}, "RunCheckpoint.minutes", "minutes", [0, -1.0, NAN, INF]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.fade", "fade", [-1, -0.1, 1.5, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.at", "at", [0, -0.1, 1.5]),
    (ShrinkMassive, {}, "ShrinkMassive.multiple", "multiple", [0.5, NAN]),
    (ShrinkMassive, {}, "ShrinkMassive.begin", "begin", [0, -0.1, 1.5]),
    (ShrinkMassive, {}, "ShrinkMassive.end", "end", [2, 0.0, 1.5, NAN]),
    (StepProgressBar, {}, "StepProgressBar.refresh_rate", "refresh_rate", [0]),
    (TailPenalty, {}, "TailPenalty.weight", "weight", [-1.0, NAN]),
    (TailPenalty, {}, "TailPenalty.multiple", "multiple", [0.9, NAN]),
    (TailPenalty, {}, "TailPenalty.ema_rate", "ema_rate", [0.0, NAN]),
    (TailPenalty, {}, "TailPenalty.start", "start", [-1, 1.5]),
    (TailPenalty, {}, "TailPenalty.random_every", "random_every", [0]),
    (TailPenalty, {}, "TailPenalty.random_sequences", "random_sequences", [0]),
    (TailPenalty, {}, "TailPenalty.random_length", "random_length", [0]),
    (TailPenalty, {}, "TailPenalty.vocab_size", "vocab_size", [0]),
    (TailPenalty, {}, "TailPenalty.seed", "seed", [-1]),
    (TaperMonitor, {}, "TaperMonitor.every", "every", [0]),
    (TokenThroughput, {}, "TokenThroughput.window", "window", [0, 1]),
]


@pytest.mark.parametrize(("build", "other", "name", "argument", "values"), WRONG, ids=[row[2] for row in WRONG])
def test_constructors_name_the_number_and_its_range(build, other, name, argument, values):
    build(**other)  # it is the value that is refused
    for value in values:
        with pytest.raises(TaperlitError) as error:
            build(**{**other, argument: value})
        assert str(error.value).startswith(f"{name} is ")
        assert "; it must be " in str(error.value)


def options(seed_everything=0, ckpt_path=None, taper=None):
    return Namespace(seed_everything=seed_everything, ckpt_path=ckpt_path, taper=taper or Namespace())


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("gradient_clip_val", [0, 1.0, None], [-1, -1e-9, NAN, INF]),  # below 0, all gradients would be turned round
        ("accumulate_grad_batches", [1, 8], [0, -1]),
        ("log_every_n_steps", [1, None], [0]),
        ("val_check_interval", [1, 0.5, "00:00:10:00", None], [0, 0.0, -1]),
        ("check_val_every_n_epoch", [1, None], [0]),
        ("num_sanity_val_steps", [-1, 0], [-2]),
        ("num_nodes", [1], [0]),
        ("min_epochs", [0], [-1]),
        ("min_steps", [0], [-1]),
        ("overfit_batches", [0.0, 0.5], [-1, NAN]),
    ],
)
def test_the_trainers_numbers(name, good, bad):
    for value in good:
        check_numbers({name: value})
    for value in bad:
        with pytest.raises(TaperlitError, match=rf"^trainer\.{name} is {value}; it must be "):
            Trainer(**{name: value})


def test_the_trainer_has_these_options():
    assert RANGES.keys() <= inspect.signature(L.Trainer).parameters.keys()


def test_options_that_no_class_checks():
    for seed in (True, False, 0, 2**32 - 1):
        check_options(options(seed))
    with pytest.raises(TaperlitError, match="seed_everything is -1; it must be at least 0"):
        check_options(options(-1))
    with pytest.raises(TaperlitError, match="ckpt_path is empty"):
        check_options(options(ckpt_path=""))
    with pytest.raises(TaperlitError, match="taper is True, not a dictionary; give its slots, or leave it out"):
        check_options(options(taper=True))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("--seed_everything=4294967296", "seed_everything is 4294967296"),
        ("--model.lr=.nan", "model.lr is nan"),
        ("--taper.monitor.every=0", "TaperMonitor.every is 0"),
        ("--model.warmup=-0.5", "model.warmup is -0.5"),
        ("--taper.gate.warmup=-1", "GateSchedule.warmup is -1"),
        ("--trainer.log_every_n_steps=0", "trainer.log_every_n_steps is 0"),
        ("--taper.gate.end=0.05", "GateSchedule.end is 0.05"),  # where the config's warm-up ends
    ],
)
def test_the_command_line_says_it_in_one_line(capsys, option, said):
    assert main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), option]) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if line.startswith("taperlit: error:")] == err[-1:]
    assert said in err[-1]
    assert "it must be" in err[-1]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["fold", "--ckpt="], 2, "--ckpt is empty"),
        (["fold", "--ckpt=x", "--out="], 2, "--out is empty"),
        (["report", "--seed=-1", "x"], 1, "--seed is -1; it must be at least 0"),
        (["bench", "decode", f"--seed={2**70}"], 1, "--seed is 1180591620717411303424; it must be"),
        (["bench", "train", "--batch=0"], 1, "--batch must be at least 1"),
        (["stress", "--model=x", "--seed=-1"], 1, "--seed is -1"),
        (["export", "--to=onnx", "--model=\udcff"], 2, "--model '\\udcff' is not UTF-8"),
    ],
)
def test_other_commands(capsys, args, status, said):
    try:
        code = main(args)
    except SystemExit as exit:
        code = exit.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == status
    assert line.startswith("taperlit: error: ")
    assert said in line
