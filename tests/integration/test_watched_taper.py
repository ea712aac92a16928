"""A taper that watches itself is the same on any number of processes, and when it is resumed."""

import pytest
import torch
from conftest import write_corpus
from processes import FSDP2, TENSOR, Run, differences, fit_args, scalars

from taperlit.checkpoint.reader import read_checkpoint

pytestmark = pytest.mark.slow

WATCHED = [
    "--taper.gate.warmup=auto", "--taper.gate.least=8", "--taper.gate.latest=12", "--taper.gate.end=30",
    "--taper.gate.stages=kind", "--taper.gate.settle=0.001", "--taper.alignment.track=0.3", "--taper.ema_rate=0.1",
    "--taper.hold", "{class_path: taperlit.GateHold, init_args: {band: 2.0, window: 8, back: 2}}",
]  # fmt: skip
MOMENTS = "--taper.alignment.moments=true"
WAYS = {
    "ddp": (2, 2, [MOMENTS, "--trainer.strategy=ddp"]),
    "fsdp2": (2, 2, [MOMENTS, "--trainer.strategy", FSDP2]),
    "fsdp2, compiled": (2, 2, [MOMENTS, "--trainer.strategy", FSDP2, "--model.compile=true"]),
    "tensor parallel": (2, 4, [MOMENTS, "--trainer.strategy", TENSOR]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    write_corpus(folder / "corpus")
    return folder


def go(home, name, ranks=1, batch=4, extra=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        extra = [*WATCHED, f"--data.batch_size={batch}", f"--trainer.devices={ranks}", *extra]
        Run(fit_args(home, home / "corpus", *extra, name=name), home, ranks).succeed()
    return home / name / "version_0"


@pytest.fixture(scope="module")
def one(home):
    return go(home, "one", extra=[MOMENTS])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_decides_the_same(home, one, way):
    run = go(home, way, *WAYS[way])
    expected, got = scalars(one), scalars(run)
    assert max(v for _, v in expected["taper/delay"]) > 0
    for tag in ("taper/gate", "taper/delay"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in expected[tag]], abs=1e-6), tag
    for tag in ("train/loss", "val/loss", *(tag for tag in expected if tag.startswith("taper/alignment/"))):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-4), tag
    mine, theirs = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (one, run))
    events, others = ([e["step"] for e in c["callbacks"]["GateHold"]["events"]] for c in (mine, theirs))
    assert events == others
    for key in (key for key in mine["state_dict"] if key.endswith((".alignment", ".stage"))):
        torch.testing.assert_close(theirs["state_dict"][key], mine["state_dict"][key], rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["one", "fsdp2"])
def test_resumed_in_the_taper_it_is_the_unbroken_run(home, one, way):
    ranks, batch, extra = WAYS.get(way, (1, 4, [MOMENTS]))
    every = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 20, save_top_k: -1}}"
    whole = go(home, f"{way} whole", ranks, batch, [*extra, every])
    middle = next((whole / "checkpoints").glob("*step=20.ckpt"))
    resumed = go(home, f"{way} resumed", ranks, batch, [*extra, every, "--ckpt_path", str(middle)])
    ends = [read_checkpoint(next((run / "checkpoints").glob("*step=40.ckpt"))) for run in (whole, resumed)]
    a, b = ({"state_dict": end["state_dict"], "hold": end["callbacks"]["GateHold"]} for end in ends)
    assert a["hold"]["events"]
    assert not differences(a, b)
