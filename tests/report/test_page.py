"""The page and the command that writes it."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from written import CONFIG, STEPS, Page, a_taper, csv_run, tensorboard_run

import taperlit.report
from taperlit.checkpoint.checksum import checksum_of
from taperlit.checkpoint.folded import write_folded
from taperlit.cli import main
from taperlit.folding import fold
from taperlit.norm import shared_gate

ROOT = Path(taperlit.report.__file__).parent


@pytest.fixture
def report(tmp_path, capsys):
    """A run of the command: the page, and what was printed."""

    def make(*args) -> tuple[Page, str]:
        out = tmp_path / "page.html"
        assert main(["report", "--out", str(out), *map(str, args)]) == 0
        return Page(out.read_text()), capsys.readouterr().out

    return make


def error_of(capsys, *args) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, args)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("taperlit: error: ")
    assert error.count("\n") == 1
    return error


def fold_a_tiny_model(tiny, folder: Path, step: int | None = None):
    """A folded model without a tokenizer; the record of what folding did."""
    model = tiny(["*"]).eval()
    shared_gate(model).set(0.0)
    structure = fold(model, lambda: model(torch.arange(9)[None]))
    write_folded(folder, model, structure, step=step)
    return structure


@pytest.mark.parametrize("write", [tensorboard_run, csv_run])
def test_every_figure_of_the_loggers_is_on_the_page(tmp_path, report, write):
    page, _ = report(write(tmp_path / "version_0"))
    names = {"taper/gate": "gate", "train/loss": "train", "val/loss": "val", "train/lr": "lr"}
    names |= {
        "taper/alignment/model.blocks.1.mlp_norm": "1.mlp_norm",
        "grad_norm/model.blocks.attn.q_proj.weight": "attn.q_proj",
    }
    for tag, points in a_taper().items():
        name = names.get(tag, tag.removeprefix("taper/"))
        for part, short in (("alignment/model.blocks.", ""), ("grad_norm/model.blocks.", "")):
            name = name.replace(part, short).removesuffix(".weight")
        (line,) = page.lines(name)
        assert [step for step, _ in line] == [step + 1 for step, _ in points]
        assert [value for _, value in line] == pytest.approx([value for _, value in points], rel=1e-5)
        assert tag in page.words  # in the table of all traces too


def test_it_says_what_the_run_was(tmp_path, report):
    page, printed = report(tensorboard_run(tmp_path / "mine/version_3"))
    for fact in ("small_1m", "internal", "text.txt", "256 per process", "40 of 40", "mine/version_3"):
        assert fact in page.words
    assert "warm-up steps 1 to 10 taper steps 11 to 24 linear steps 25 to 40 boundaries by the config" in page.words
    assert ("pre", CONFIG) in page.texts
    assert re.search(r"validation loss +7\.438 \(step 10\), .*, 5\.562 \(step 40\)\ngate +1 -> 0\n", printed)
    assert printed.endswith(f"{tmp_path / 'page.html'}\n")


def test_what_is_missing_is_one_line_with_the_command_that_makes_it(tmp_path, report):
    run = tensorboard_run(tmp_path / "it's/version_0")  # a name that a shell would take apart
    page, _ = report(run)
    lines = re.findall(r"There [^.]*\.|Nothing [^.]*\.", page.words)
    assert len(lines) >= 4
    assert "no checkpoint to fold" in page.words
    assert "no checkpoint and no folded model to sample from" in page.words
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last.ckpt").write_bytes(b"no checkpoint")
    page, _ = report(run)
    path = f"'{tmp_path}/it'\"'\"'s/version_0"
    assert f"taperlit fold --ckpt {path}/checkpoints/last.ckpt'" in page.words
    assert f"taperlit predict --config {path}/config.yaml' --ckpt_path {path}/checkpoints/last.ckpt'" in page.words
    assert "is truncated, damaged or not a checkpoint" in page.words


def test_a_gate_that_is_open_and_a_run_without_a_taper_have_no_fold(tmp_path, report):
    unfinished = {tag: [(k, v) for k, v in points if k < 20] for tag, points in a_taper().items()}
    run = tensorboard_run(tmp_path / "unfinished", unfinished)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last.ckpt").touch()
    page, _ = report(run, "--samples=false")
    assert re.search(r"the gate ended at 0\.25, not 0\. Train on: taperlit fit --config \S+ --ckpt_path", page.words)
    assert "Samples were left out" in page.words
    assert "20 of 40" in page.words
    losses = {tag: points for tag, points in a_taper().items() if not tag.startswith("taper/")}
    config = CONFIG.replace("taper: internal", "taper: none").replace("gate: {", "gate: null\n  was: {")
    page, _ = report(tensorboard_run(tmp_path / "plain", losses, config))
    assert "there is nothing to fold" in page.words
    assert "gate g" not in page.words


def test_several_runs_stand_side_by_side(tmp_path, report):
    base = tensorboard_run(tmp_path / "base/version_0", a_taper(shift=0.5))
    short = {tag: points[:2] if tag == "val/loss" else points for tag, points in a_taper().items()}
    other, third = csv_run(tmp_path / "other/version_0", short), tensorboard_run(tmp_path / "third/version_0")
    page, printed = report(base, other.parent, third)
    last = {"base": 8.5 - 39 / 16, "other": 8 - 19 / 16, "third": 8 - 39 / 16}
    for name, loss in last.items():
        config, step = ("", 20) if name == "other" else ("internal ", 40)
        assert f"{name} {config}40 {loss:.4f} {step}" in page.words
    gaps = [(k + 1, (8 - k / 16) / (8.5 - k / 16) - 1) for k in range(9, STEPS, 10)]
    (drawn,) = (line for line in page.lines("third") if line[0][1] < 0)
    assert drawn == [(step, pytest.approx(gap, rel=1e-5)) for step, gap in gaps]
    assert f"\u2212{-gaps[-1][1]:.2%}" in page.words
    assert f"\u2212{-gaps[1][1]:.2%} at step 20" in page.words  # the last step that both were validated at
    assert f"third  {last['third']:.4f}  {gaps[-1][1]:+.2%} at step 40" in printed
    assert "(other " not in printed
    elsewhere = tensorboard_run(tmp_path / "elsewhere/version_0", config=CONFIG + "\ndata: {files: other.txt}")
    page_there, told = report(
        with_data := tensorboard_run(tmp_path / "data/v", config=CONFIG + "\ndata: {}"), elsewhere
    )
    assert f"{with_data.name}" in told
    assert "at step 40 (other data.files)" in told
    assert "(other data.files)" in page_there.words
    validation = next(chart for chart in page.charts if [s["name"] for s in chart["series"]] == [*last])
    assert [zone[0] for zone in validation["zones"]] == ["warm-up", "taper", "linear"]
    assert [attributes["id"] for _, attributes in page.elements if "run" in attributes.get("class", "").split()] == [
        "runs", "run-0", "run-1", "run-2",
    ]  # fmt: skip


def test_the_fold_is_told_from_its_record(tmp_path, report, tiny):
    run = tensorboard_run(tmp_path / "version_0")
    structure = fold_a_tiny_model(tiny, run / "folded")
    page, printed = report(run)
    removed = len(structure["identities"])
    assert removed == 5
    assert f"folded {removed} 0" in page.words
    assert "blocks.1.mlp_norm -> " in page.words
    assert f"{removed} norms removed; difference {structure['difference']:.1e} in float64" in printed
    assert "has no tokenizer" in page.words  # so that there is no sample
    record = json.loads((run / "folded/config.json").read_text())
    record["structure"]["difference"] = 0.0
    (run / "folded/config.json").write_text(json.dumps(record))
    page, _ = report(run)
    assert "config.json is damaged (its checksum differs); fold the checkpoint again." in page.words
    damage = {"{}": "is not of a folded model", "{": "is damaged (", '{"format": 1, "format": 1}': "'format' twice"}
    for text, words in damage.items():
        (run / "folded/config.json").write_text(text)
        page, _ = report(run)
        assert words in page.words
    record["structure"]["identities"] = {"blocks.0.mlp_norm": [7]}
    (run / "folded/config.json").write_text(json.dumps(record))
    page, _ = report(run)
    assert "it.structure.identities.blocks.0.mlp_norm[0] is 7, not a text; fold the checkpoint again." in page.words
    del record["structure"]["difference"], record["structure"]["identities"]["blocks.0.mlp_norm"]
    record["checksums"]["config.json"] = checksum_of(record)
    (run / "folded/config.json").write_text(json.dumps(record))
    page, _ = report(run)
    assert "structure.difference is missing; fold the checkpoint again." in page.words


@pytest.mark.parametrize(("step", "told"), [(None, ""), (STEPS, ""), (STEPS + 3, ""), (30, ", of step 30 of 40")])
def test_what_was_made_at_an_earlier_step_says_so(tmp_path, report, tiny, step, told):
    run = tensorboard_run(tmp_path / "version_0")
    fold_a_tiny_model(tiny, run / "folded", step)
    line = {"logprobs": [-1.0, -2.0]} | ({} if step is None else {"step": step})
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last-predictions.jsonl").write_text(f"{json.dumps(line)}\n")
    page, printed = report(run)
    assert f"folded{told} 5 0" in page.words
    assert f"2 tokens in last-predictions.jsonl, by taperlit predict{told} 1.5" in page.words
    assert f" in float64{told}\n" in printed
    (run / "checkpoints/last-predictions.jsonl.1").write_text(json.dumps({**line, "step": 20}))
    page, _ = report(run)
    assert "are of different steps; run `taperlit predict` again." in page.words
    for odd in ('{"logprobs": [-1.0], "step": Infinity}', '{"logprobs": [-1.0], "step": "x"}', "[]"):
        (run / "checkpoints/last-predictions.jsonl.1").write_text(odd)
        page, _ = report(run)
        assert "line 1, is no block of `taperlit predict`" in page.words


def test_measurements_in_the_folder_are_on_the_page(tmp_path, report):
    run = tensorboard_run(tmp_path / "version_0")
    rows = [
        {"variant": "normalized", "batch": 1, "tokens_per_s": 1000.0, "ratio": 1.0, "low": 1.0, "high": 1.0},
        {"variant": "folded", "batch": 1, "tokens_per_s": 1275.0, "ratio": 1.27, "low": 1.1, "high": 1.4},
        {"variant": "onnx", "batch": 8, "ratio": None, "skipped": "is not <installed>"},
    ]
    about = {"versions": {"torch": "2.9"}, "device": "a CPU", "command": "taperlit bench decode --json x"}
    (run / "bench_decode.json").write_text(json.dumps({**about, "rows": rows}))
    (run / "bench_broken.json").write_text("[1]")
    page, _ = report(run)
    for words in (
        "1.27x (1.10 to 1.40)",
        "a CPU; torch 2.9",
        about["command"],
        "is not <installed>",
        "batch 1; against",
    ):
        assert words in page.words
    assert "bench_broken.json is not what `taperlit bench --json` writes" in page.words
    (run / "bench_broken.json").write_text('{"rows": [3]}')
    (run / "config.yaml").write_bytes(b"model: \xff")
    page, _ = report(run)
    assert "bench_broken.json: rows[0] is 3, not a dictionary; measure again." in page.words
    assert "config.yaml is damaged ('utf-8' codec" in page.words
    (run / "config.yaml").write_text("model: " + "[" * 20_000)
    page, _ = report(run)
    assert "config.yaml is damaged (maximum recursion depth" in page.words


def test_the_tails_are_those_of_the_losses(tmp_path, report):
    logged = {
        "val/loss_max": [(9, 12.5)],
        "val/loss_p999": [(9, 9.75)],
        "val/loss_at/2-3": [(9, 4.125)],
        "val/loss": [(9, 5.5)],
    }
    run = tensorboard_run(tmp_path / "version_0", logged)
    (run / "checkpoints").mkdir()
    losses = torch.rand(300, 8, generator=torch.Generator().manual_seed(0)).double() * 9
    for number, part in enumerate(losses.split(200)):
        lines = [json.dumps({"loss": 0, "logprobs": (-row).tolist()}) for row in part]
        name = "last-predictions.jsonl" + (f".{number}" if number else "")
        (run / "checkpoints" / name).write_text("\n".join([*lines, json.dumps({"logprobs": [-9.5, -9.25]})]) + "\n")
    page, _ = report(run)
    assert "logged as val/ at step 10 5.5 9.75 12.5" in page.words
    every = torch.cat([losses.flatten(), torch.tensor([9.5, 9.25] * 2).double()])
    found = re.search(
        r"2,404 tokens in last-predictions\.jsonl, by taperlit predict (\S+) (\S+) (\S+) (\S+) 0", page.words
    )
    expected = (every.mean(), every.median(), every.quantile(0.999, interpolation="higher"), every.max())
    assert [float(value) for value in found.groups()] == pytest.approx([value.item() for value in expected], rel=1e-3)
    (run / "checkpoints/last-predictions.jsonl").write_text("{}\n")
    page, _ = report(run)
    assert "line 1, is no block of `taperlit predict`" in page.words


def test_text_from_files_is_never_markup(tmp_path, report):
    evil = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\"'&amp;\x00\x1b"
    config = CONFIG + f"note: {json.dumps(evil)}\nother: |\n  </pre><script>alert(3)</script>\n"
    config = config.replace("small_1m", json.dumps(evil))
    traces = {f"taper/alignment/{evil}": [(0, 1.0), (5, 2.0)], evil: [(0, 1.0), (5, 2.0)], "train/loss": [(0, 1.0)]}
    run = tensorboard_run(tmp_path / "<b>run<script>", traces, config)
    (run / "bench.json").write_text(
        json.dumps({"command": evil, "rows": [{"variant": evil, "ratio": 1.0, evil: evil}]})
    )
    page, _ = report(run, tensorboard_run(tmp_path / "other"))
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == len(page.charts) + 1
    assert not [tag for tag, _ in page.elements if tag in ("img", "b><") or tag.startswith("b>")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script></script><img src=x onerror=alert(2)>\"'&amp;\ufffd\ufffd" in page.words
    assert ("pre", config) in page.texts
    assert page.lines(evil) == [[(1, 1.0), (6, 2.0)]] * 2  # as data, and that is how the script shows it


def test_the_page_asks_for_nothing(tmp_path, report):
    page, _ = report(tensorboard_run(tmp_path / "version_0"))
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use")
        assert "src" not in attributes
        assert "style" not in attributes  # which the policy would block
        assert attributes.get("href", "#").startswith("#")
    (style,) = (text for tag, text in page.texts if tag == "style")
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    script = next(text for tag, text in page.texts if tag == "script" and not text.startswith("{"))
    assert not re.search(r"fetch\(|XMLHttp|import\(|innerHTML|eval\(", script)
    assert re.findall(r"https?://[^\"'`\s]+", script) == ["http://www.w3.org/2000/svg"]  # a name, which is not fetched
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_bad_input_is_one_line_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    run = tensorboard_run(tmp_path / "version_0")
    before = sorted(tmp_path.rglob("*"))
    assert "there is no such folder" in error_of(capsys, tmp_path / "nowhere")
    assert "nothing to report on" in error_of(capsys)
    assert "there is no folder" in error_of(capsys, run, "--out", tmp_path / "no/page.html")
    assert "is no report; name another --out" in error_of(capsys, run, "--out", run / "config.yaml")
    assert "new_tokens is 0" in error_of(capsys, run, "--new_tokens=0")
    assert "nothing to measure; leave --measure out" in error_of(capsys, run, "--measure")
    (run / "metrics.csv").write_text("a\n1\n")
    assert "metrics.csv, line 2" in error_of(capsys, run)
    (run / "metrics.csv").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert (run / "config.yaml").read_text() == CONFIG

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in error_of(capsys, run)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_is_replaced_and_stands_in_the_run_by_default(tmp_path, capsys):
    run = tensorboard_run(tmp_path / "version_0")
    for _ in range(2):
        assert main(["report", str(run)]) == 0
        assert Page((run / "report.html").read_text())


def test_options_and_folders_may_stand_in_any_order(tmp_path, report):
    one, two = tensorboard_run(tmp_path / "one"), tensorboard_run(tmp_path / "two")
    for args in ([one, "--samples", "false", two], ["--seed", 3, "--samples=false", one, two], [one, "--", two]):
        page, _ = report(*args)
        assert "Side by side" in page.words


def test_help_is_quick():
    code = "import sys, taperlit.cli.report; print({'torch', 'lightning', 'tensorboard'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_the_package_has_the_files_that_go_into_the_page():
    pyproject = (ROOT.parents[1] / "pyproject.toml").read_text()
    for path in [*ROOT.glob("*.css"), *ROOT.glob("*.js")]:
        assert f'"report/*{path.suffix}"' in pyproject, "add it to [tool.setuptools.package-data]"
