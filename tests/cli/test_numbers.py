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
    FakeLNSchedule,
    FiniteGuard,
    GateHold,
    GateSchedule,
    LanguageModel,
    LossTails,
    ScaleAnchor,
    ShrinkMassive,
    TailPenalty,
    TaperMonitor,
    TextDataModule,
)
from taperlit.callbacks import StepProgressBar, TokenThroughput
from taperlit.cli import main
from taperlit.cli.trainer_options import RANGES, check_options
from taperlit.errors import TaperlitError

NAN, INF = math.nan, math.inf
CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = dict(preset="small_1m", overrides=dict(vocab_size=100, block_size=16, n_layer=1, d_model=16, d_ff=32, n_head=2))
WRONG = [
    (LanguageModel, MODEL, "model.lr", "lr", [0.0, -1e-3, NAN, INF]),
    (LanguageModel, MODEL, "model.betas[0]", "betas", [(-0.1, 0.9), (1.0, 0.9), (NAN, 0.9)]),
    (LanguageModel, MODEL, "model.betas[1]", "betas", [(0.9, 1.5), (0.9, -1.0)]),
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
    (BoundedWrites, {}, "BoundedWrites.multiple", "multiple", [1.0, NAN, INF]),
    (FakeLNSchedule, {}, "FakeLNSchedule.aux_weight", "aux_weight", [-1.0, NAN]),
    (FakeLNSchedule, {}, "FakeLNSchedule.end_of_text", "end_of_text", [-1]),
    (FiniteGuard, {}, "FiniteGuard.patience", "patience", [0]),
    (GateHold, {}, "GateHold.band", "band", [0.0, NAN]),
    (GateHold, {}, "GateHold.far", "far", [1.0, NAN]),
    (GateHold, {}, "GateHold.window", "window", [3]),
    (GateHold, {}, "GateHold.patience", "patience", [0]),
    (GateSchedule, {}, "GateSchedule.settle", "settle", [0.0, NAN]),
    (LossTails, {}, "LossTails.threshold", "threshold", [-1.0, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.weight", "weight", [-0.1, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.ema_rate", "ema_rate", [0.0, NAN]),
    (ScaleAnchor, {"module": "x"}, "ScaleAnchor.skip", "skip", [-1]),
    (ShrinkMassive, {}, "ShrinkMassive.multiple", "multiple", [0.5, NAN]),
    (StepProgressBar, {}, "StepProgressBar.refresh_rate", "refresh_rate", [0]),
    (TailPenalty, {}, "TailPenalty.weight", "weight", [-1.0, NAN]),
    (TailPenalty, {}, "TailPenalty.multiple", "multiple", [0.9, NAN]),
    (TailPenalty, {}, "TailPenalty.ema_rate", "ema_rate", [0.0, NAN]),
    (TailPenalty, {}, "TailPenalty.random_every", "random_every", [0]),
    (TailPenalty, {}, "TailPenalty.random_sequences", "random_sequences", [0]),
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


def options(seed_everything=0, ckpt_path=None, **trainer):
    return Namespace(trainer=Namespace(**trainer), seed_everything=seed_everything, ckpt_path=ckpt_path)


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
        check_options(options(**{name: value}))
    for value in bad:
        with pytest.raises(TaperlitError, match=rf"^trainer\.{name} is {value}; it must be "):
            check_options(options(**{name: value}))


def test_the_trainer_has_these_options():
    assert RANGES.keys() <= inspect.signature(L.Trainer).parameters.keys()


def test_seed_and_checkpoint():
    for seed in (True, False, 0, 2**32 - 1):
        check_options(options(seed))
    with pytest.raises(TaperlitError, match="seed_everything is -1; it must be at least 0"):
        check_options(options(-1))
    with pytest.raises(TaperlitError, match="ckpt_path is empty"):
        check_options(options(ckpt_path=""))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
        ("--seed_everything=4294967296", "seed_everything is 4294967296"),
        ("--model.lr=.nan", "model.lr is nan"),
        ("--taper.monitor.every=0", "TaperMonitor.every is 0"),
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
