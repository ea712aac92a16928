"""EqualRows on a sharded embedding is EqualRows on a whole one; BoundedWrites refuses sharded matrices by name."""

import pytest
import torch
from conftest import write_corpus
from processes import FSDP2, TENSOR, Run, fit_args, scalars

from taperlit.checkpoint.reader import read_checkpoint

pytestmark = pytest.mark.slow

SHORT = ["--trainer.max_steps=15", "--taper.gate.warmup=4", "--taper.gate.end=10"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    write_corpus(folder / "corpus")
    return folder


def start(home, name, ranks, *extra):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        extra = [f"--trainer.devices={ranks}", "--model.overrides.tied=true", *SHORT, *extra]
        return Run(fit_args(home, home / "corpus", *extra, name=name), home, ranks)


def test_equal_rows_are_the_same_however_they_are_split(home):
    losses, tables = {}, {}
    for name, ranks, extra in (
        ("one", 1, []),
        ("fsdp2", 2, ["--data.batch_size=2", "--trainer.strategy", FSDP2]),
        ("tensor", 2, ["--trainer.strategy", TENSOR]),
    ):
        start(home, name, ranks, "--taper.rows=true", *extra).succeed()
        run = home / name / "version_0"
        losses[name] = [value for _, value in scalars(run)["train/loss"]]
        state = read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]
        tables[name] = next(value for key, value in state.items() if key.endswith("tok_embed.weight"))
        norms = tables[name].double().norm(dim=1)
        assert norms.max() / norms.min() < 1 + 1e-6, name
    for name in ("fsdp2", "tensor"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-4)
        torch.testing.assert_close(tables[name], tables["one"], rtol=0, atol=1e-3)


def test_sharded_matrices_are_refused_by_name(home):
    run = start(home, "writes", 2, "--taper.writes=true", "--trainer.strategy", FSDP2)
    assert run.wait() == [1, 1], run.log.read_text()
    (line,) = run.errors()
    assert "BoundedWrites would change the weight of model.blocks.0.attn.o_proj, which is computed, no matrix" in line
    start(home, "whole", 1, "--taper.writes=true").succeed()
