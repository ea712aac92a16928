"""A taper that watches itself is the same on any number of processes, and when it is resumed."""

import functools

import pytest
import torch
from conftest import write_corpus
from processes import FSDP2, TENSOR, Run, differences, fit_args, scalars, trace_only

from taperlit.checkpoint.reader import read_checkpoint

pytestmark = pytest.mark.slow

WATCHED = [
    "--taper.gate.warmup=auto", "--taper.gate.least=8", "--taper.gate.latest=12", "--taper.gate.end=24",
    "--taper.gate.stages=kind", "--taper.gate.settle=0.001", "--taper.alignment.track=0.3", "--taper.ema_rate=0.1",
    "--taper.alignment.moments=true",
    "--taper.hold", "{class_path: taperlit.GateHold, init_args: {band: 2.0, window: 8, back: 2}}",
    "--taper.tail", "{class_path: taperlit.TailPenalty, init_args: {multiple: 1.0}}",
    "--trainer.max_steps=36", "--trainer.val_check_interval=12",
    "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 18, save_top_k: -1}}",
]  # fmt: skip
WAYS = {
    "one": (1, 4, []),
    "ddp": (2, 2, ["--trainer.strategy=ddp"]),
    "fsdp2": (2, 2, ["--trainer.strategy", FSDP2]),
    "fsdp2, compiled": (2, 2, ["--trainer.strategy", FSDP2, "--model.compile=true"]),
    "tensor parallel": (2, 4, ["--trainer.strategy", TENSOR]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    write_corpus(folder / "corpus")
    return folder


def go(home, way, name, *more):
    ranks, batch, extra = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        args = [*WATCHED, f"--data.batch_size={batch}", f"--trainer.devices={ranks}", *extra, *more]
        Run(fit_args(home, home / "corpus", *args, name=name), home, ranks, trace_only).succeed()
    return home / name / "version_0"


def end(run):
    return read_checkpoint(next((run / "checkpoints").glob("*step=36.ckpt")))


@pytest.fixture(scope="module")
def whole(home):
    """The run of each way that nothing stopped, made when it is first asked for."""
    return functools.cache(lambda way: go(home, way, way))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_every_way_decides_the_same(whole, way):
    one, run = whole("one"), whole(way)
    expected, got = scalars(one), scalars(run)
    assert max(v for _, v in expected["taper/delay"]) > 0
    for tag in ("taper/gate", "taper/delay"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in expected[tag]], abs=1e-6), tag
    assert all(v > 0 for _, v in expected["train/tail_loss"][1:])
    alignments = (tag for tag in expected if tag.startswith("taper/alignment/"))
    for tag in ("train/loss", "train/tail_loss", "val/loss", *alignments):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-4), tag
    mine, theirs = (end(folder) for folder in (one, run))
    events, others = ([e["step"] for e in c["callbacks"]["GateHold"]["events"]] for c in (mine, theirs))
    assert events == others
    for key in (key for key in mine["state_dict"] if key.endswith((".alignment", ".stage"))):
        torch.testing.assert_close(theirs["state_dict"][key], mine["state_dict"][key], rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["one", "fsdp2"])
def test_resumed_in_the_taper_it_is_the_unbroken_run(home, whole, way):
    middle = next((whole(way) / "checkpoints").glob("*step=18.ckpt"))
    resumed = go(home, way, f"{way} resumed", "--ckpt_path", str(middle))
    ends = [end(run) for run in (whole(way), resumed)]
    a, b = ({"state_dict": each["state_dict"], "hold": each["callbacks"]["GateHold"]} for each in ends)
    assert a["hold"]["events"]
    assert not differences(a, b)
