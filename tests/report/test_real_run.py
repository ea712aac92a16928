"""Reports of runs that were trained, and pages opened in a browser."""

import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from written import CONFIG, Page, a_taper, tensorboard_run

from taperlit.checkpoint.folded import read_model, write_folded
from taperlit.cli import main
from taperlit.report.traces import read_traces

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--model.overrides", "{vocab_size: 300, block_size: 32, n_layer: 2, n_head: 2, d_model: 32, d_ff: 64}",
    "--data.vocab_size=300", "--data.block_size=32", "--data.batch_size=4", "--data.val_fraction=0.2",
    "--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=4",
    "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false",
    "--taper.monitor.every=1", "--taper.gate.warmup=0.2", "--taper.gate.end=0.6",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 steps through all phases: warm-up to 4, taper to 12."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPERLIT_CACHE", str(folder / "cache"))
        text = write_corpus(folder / "corpus")
        args = ["--config", str(CONFIGS / "quickstart.yaml"), "--data.files", f"{text}/*.py", *SMALL]
        assert main(["fit", *args, f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]) == 0
        assert main(["fold", "--ckpt", str(folder / "run/version_0/checkpoints/last.ckpt")]) == 0
    return folder / "run/version_0"


@pytest.mark.slow
def test_a_trained_run_has_all_parts(run, capsys, monkeypatch):
    monkeypatch.setenv("TAPERLIT_CACHE", str(run.parents[1] / "cache"))
    config, last = str(run / "config.yaml"), str(run / "checkpoints/last.ckpt")
    assert main(["predict", "--config", config, "--ckpt_path", last, "--trainer.limit_predict_batches=4"]) == 0
    capsys.readouterr()
    assert main(["validate", "--config", config, "--ckpt_path", last]) == 0
    told = re.search(r"mean (\S+), median (\S+), 99\.9% (\S+)\n +largest (\S+):", capsys.readouterr().out).groups()
    assert main(["report", str(run.parent), "--measure"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"gate +1 -> 0\n", printed)
    assert len(re.findall(r"\d tokens/s", printed)) == 2
    assert float(re.search(r"largest logit difference +(\S+)", printed)[1]) < 1e-4
    page = Page((run / "report.html").read_text())
    assert "taper steps 5 to 11 linear steps 12 to 20 boundaries by the checkpoint" in page.words
    assert "There " not in page.words
    assert "checkpoints/last-folded 4 0" in page.words
    assert "before folding" in page.words
    samples = [text for tag, text in page.texts if tag == "pre"]
    assert any("def function_" in text for text in samples)
    tails = re.search(r"by taperlit predict (\S+) (\S+) (\S+) (\S+) 0", page.words).groups()
    for name, ours, theirs in zip(("mean", "median", "99.9%", "largest"), tails, told, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=2e-3), name  # validate's are rounded to four digits
    for points in read_traces(run).values():
        assert f"{points[-1][1]:.6g}".replace("-", "\u2212") in page.words


@pytest.mark.slow
def test_a_folded_model_of_another_checkpoint_is_not_measured(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("bench*", "report*", "last-folded"))
    loaded = read_model(run / "folded")
    with torch.no_grad():
        loaded.model.head.weight.mul_(1.1)
    write_folded(other / "folded", loaded.model, loaded.structure, loaded.tokenizer_json, force=True)
    assert main(["report", str(other), "--measure"]) == 1
    assert re.search(r"folded is not .*last\.ckpt folded: their logits differ by 0\.\d+", capsys.readouterr().err)
    assert not [*other.glob("bench*"), *other.glob("report*")]


def browser() -> str:
    """The path of a Chromium; CI must have one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        assert os.environ.get("CI") != "true", "CI opens the page in Chromium; install it (apt-get install chromium)"
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    return found


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """A page's elements when its script has run, as HTML, and what the browser said of it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={folder}", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([browser(), *flags, page.as_uri()], capture_output=True, text=True, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_a_browser_runs_the_page_and_nothing_of_the_run(tmp_path):
    evil = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    traces = {**a_taper(), f"taper/alignment/{evil}": [(0, 1.0), (5, 2.0)]}
    one = tensorboard_run(tmp_path / "one/version_0", traces, f"{CONFIG}evil: {evil!r}\n")
    two = tensorboard_run(tmp_path / "two/version_0", a_taper(shift=0.25))
    page = tmp_path / "page.html"
    assert main(["report", str(one), str(two), "--out", str(page)]) == 0
    dom, console = opened(page, tmp_path / "profile")
    assert console == ""  # no error, and nothing that the page's own policy had to block
    charts = len(re.findall(r'<figure class="chart">', dom))
    assert f'data-charts="{charts}"' in dom  # which the script says when it is through
    assert charts > 15
    assert "<title>one and 1 more \u00b7 taperlit report</title>" in dom
    assert len(re.findall('<li [^>]*role="button"', dom)) == sum(
        len(chart["series"]) for chart in Page(page.read_text()).charts
    )

    # What the pointer shows: in a copy whose policy lets this test's own script move it.
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    move = """<script>
    const charts = [...document.querySelectorAll("#run-0 figure.chart")];
    const chart = charts.find((each) => each.textContent.includes("gate g"));
    const picture = chart.querySelector(":scope > svg"), box = picture.getBoundingClientRect();
    const right = box.left + box.width * 393 / 400 - 1; // the last step
    picture.dispatchEvent(new PointerEvent("pointermove", {clientX: right, clientY: box.top + 50}));
    document.querySelector("#runs .legend li").click();
    </script></body>"""
    (tmp_path / "free.html").write_text(free.replace("</body>", move))
    dom, console = opened(tmp_path / "free.html", tmp_path / "profile")
    assert console == ""
    tip = unescape(re.sub(r"<[^>]+>", " ", re.search(r'<div id="tip".*?</ul></div>', dom, re.DOTALL)[0]))
    assert tip.split() == ["step", "40,", "linear", "gate", "0"]
    assert dom.count("cursor on") == len(
        re.findall('class="chart"', dom.partition('id="run-0"')[2].partition('id="run-1"')[0])
    )
    assert len(re.findall('<li [^>]*aria-pressed="false"', dom)) == 1
    assert len(re.findall(r'class="series[^"]* off"', dom)) == 1
