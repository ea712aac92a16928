"""One run, one meaning: the same losses, scalars and target on any number of processes, however they share the work."""

import pytest
import torch
from conftest import write_corpus
from processes import FSDP2, TENSOR, Run, fit_args, scalars, trace_only

from taperlit.checkpoint.reader import read_checkpoint

pytestmark = pytest.mark.slow

# name: processes, blocks a batch on each, micro-batches a step, more options
WAYS = {
    "accumulated": (1, 1, 4, []),
    "ddp": (2, 2, 1, ["--trainer.strategy=ddp"]),
    "ddp, accumulated": (2, 1, 2, ["--trainer.strategy=ddp"]),
    "fsdp2": (2, 2, 1, ["--trainer.strategy", FSDP2]),
    "fsdp2, full checkpoints, compiled": (
        2, 2, 1, ["--trainer.strategy", FSDP2, "--trainer.strategy.init_args.save_distributed_checkpoint=false"],
    ),
    "fsdp": (
        2, 2, 1,
        ["--trainer.strategy", "{class_path: cpu_fsdp.CpuFSDPStrategy}", "--trainer.enable_checkpointing=false"],
    ),
    "tensor parallel": (2, 4, 1, ["--trainer.strategy", TENSOR]),
    "ddp, compiled": (2, 2, 1, ["--trainer.strategy=ddp"]),
    "tensor parallel, compiled": (2, 4, 1, ["--trainer.strategy", TENSOR]),
    "ddp, in chunks": (2, 2, 1, ["--trainer.strategy=ddp"]),
    "fsdp2, in chunks": (2, 2, 1, ["--trainer.strategy", FSDP2]),
    "fsdp, in chunks": (
        2, 2, 1,
        ["--trainer.strategy", "{class_path: cpu_fsdp.CpuFSDPStrategy}", "--trainer.enable_checkpointing=false"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, its token cache, and the reference: one process, one batch a step."""
    folder = tmp_path_factory.mktemp("equivalence")
    write_corpus(folder / "corpus")
    return folder


def go(home, name, ranks=1, batch=4, accumulate=1, extra=(), setup=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        extra = [f"--data.batch_size={batch}", f"--trainer.accumulate_grad_batches={accumulate}",
                 f"--trainer.val_check_interval={12 * accumulate}", f"--trainer.devices={ranks}",
                 "--model.overrides.embed_norm=true", *extra]  # fmt: skip
        Run(fit_args(home, home / "corpus", *extra, name=name), home, ranks, setup).succeed()
    return home / name / "version_0"


@pytest.fixture(scope="module")
def one(home):
    return go(home, "one")


@pytest.mark.parametrize("way", WAYS)
def test_same_run(home, one, way):
    ranks, batch, accumulate, extra = WAYS[way]
    if "compiled" in way:
        extra = [*extra, "--model.compile=true", "--model.activation_checkpointing=true"]
    if in_chunks := "in chunks" in way:
        # The head is not watched in most steps, so that its gradients may be made in the forward pass.
        extra = [*extra, "--model.chunk_tokens=16", "--taper.monitor.every=7"]
    # The code that is written for the tensor parallel's graphs, which alone have collectives in them, is enough.
    setup = trace_only if "compiled" in way and "tensor" not in way else None
    run = go(home, way, ranks, batch, accumulate, extra, setup)
    expected, got = scalars(one), scalars(run)
    assert len(got["train/loss"]) == 24
    unseen = ["gain"] if way.partition(",")[0] == "fsdp" else []
    if "compiled" in way:  # its norms are within the graphs
        unseen += ["scale_max/", "scale_p999/"]
    assert {tag for tag in expected if not any(part in tag for part in unseen)} <= got.keys()
    tags = ["train/loss", "train/scale_loss", "val/loss", "train/tokens", "train/grad_norm"]
    if not in_chunks:
        assert {value for _, value in got["taper/gate"]} == {value for _, value in expected["taper/gate"]}
        tags.append("taper/pre_logit_rms")
    for tag in tags:
        # The scale loss is the square of a small difference of two numbers that are compared themselves.
        least = 1e-8 if tag == "train/scale_loss" else 1e-12
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-5, abs=least), tag
    if way.partition(",")[0] == "fsdp":  # saves nothing on the CPU, but logs every c
        for tag in (tag for tag in expected if tag.startswith("taper/alignment/")):
            assert got[tag][-1][1] == pytest.approx(expected[tag][-1][1], rel=1e-5), tag
        return
    mine, theirs = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (one, run))
    for key in (key for key in mine["state_dict"] if key.endswith(".alignment")):
        torch.testing.assert_close(theirs["state_dict"][key], mine["state_dict"][key], rtol=1e-5, atol=0)
    target, other = (c["callbacks"]["ScaleAnchor"]["target"] for c in (mine, theirs))
    torch.testing.assert_close(other, target, rtol=1e-5, atol=0)


def test_a_validation_right_before_the_boundary_changes_nothing(home):
    """FSDP2 leaves the outermost module's parameters gathered after it, the final norm's among them."""
    extra = ["--model.taper=all", "--trainer.enable_checkpointing=false", "--trainer.val_check_interval=8"]
    one, two = (
        scalars(go(home, f"validated by {ranks}", ranks, 4 // ranks, 1, [*extra, *more]))
        for ranks, more in ((1, []), (2, ["--trainer.strategy", FSDP2]))
    )
    for tag in ("train/loss", "val/loss", "taper/pre_logit_rms"):
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]], rel=1e-5), tag


@pytest.mark.parametrize(
    ("way", "precision"),
    [("ddp", "bf16-mixed"), ("ddp", "bf16-true"), ("fsdp2", "bf16-mixed"), ("tensor parallel", "bf16-true")],
)
def test_low_precision_keeps_its_statistics_in_float32(home, one, way, precision):
    ranks, batch, accumulate, extra = WAYS[way]
    run = go(home, f"{way} {precision}", ranks, batch, accumulate, [*extra, f"--trainer.precision={precision}"])
    losses, expected = ([v for _, v in scalars(folder)["train/loss"]] for folder in (run, one))
    assert losses == pytest.approx(expected, rel=0.03)
    checkpoint = read_checkpoint(run / "checkpoints/last.ckpt")
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for key, value in checkpoint["state_dict"].items():
        if key.endswith((".alignment", ".alignment_ema", "gate.value")):
            assert value.dtype == torch.float32, key
        elif key.endswith("weight"):
            assert value.dtype == wanted, key
    assert checkpoint["callbacks"]["ScaleAnchor"]["target"].dtype == torch.float32


@pytest.mark.parametrize(
    ("strategy", "extra", "words"),
    [
        (FSDP2.replace("data_parallel_size: 2", "data_parallel_size: 3"), [], "--trainer.strategy.data_parallel_size"),
        (TENSOR, ["--model.overrides.n_head=1"], "n_head 1 is not a multiple of the strategy's tensor_parallel_size 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(home, strategy, extra, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(home / "cache"))
        args = fit_args(home, home / "corpus", "--trainer.devices=2", "--trainer.strategy", strategy, *extra)
        run = Run(args, home, 2)
    assert run.wait() == [1, 1], run.log.read_text()
    (line,) = run.errors()
    assert words in line
    assert "Traceback" not in run.log.read_text()
