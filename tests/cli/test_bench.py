"""``taperlit bench``: what it refuses, and each bench end to end in a process of its own."""

import json
import shlex
import subprocess
import sys

import pytest

from taperlit.cli import main
from taperlit.cli.bench import BENCHES

KEYS = {"versions", "device", "commit", "command", "bandwidth_gb_s", "rows"}
ROW = {
    "preset", "batch", "prompt", "dtype", "backend", "variant", "tokens_per_s", "ratio", "low", "high",
    "kernels_per_token",
}  # fmt: skip


def test_each_bench_has_help(capsys):
    assert main(["bench", "--help"]) == 0
    listed = capsys.readouterr().out
    for what in BENCHES:
        assert f"  {what} " in listed
        with pytest.raises(SystemExit) as exit:
            main(["bench", what, "--help"])
        assert exit.value.code == 0
        assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "bench what? Choose decode, train, fold."),
        (["speed"], "there is no bench 'speed'; choose from decode, train, fold."),
        (["decode", "--preset", "[small_1m, nope]"], "No preset 'nope'; choose from"),
        (["decode", "--batch", "0"], "--batch must be at least 1, not 0."),
        (["decode", "--quick", "--new_tokens", "1"], "--new_tokens must be at least 2, not 1."),
        (
            ["decode", "--prompt", "500"],
            "564 tokens are more than the context of small_1m, 512; give less with --prompt",
        ),
        (["decode", "--device", "nope"], "No device 'nope' here"),
        (["decode", "--json", "/nowhere/rows.json"], "there is no folder /nowhere; make it first."),
        (["train", "--preset", "nope"], "No preset 'nope'; choose from"),
        (["train", "--preset", "small_1m", "--block", "513"], "give less with --block."),
        (["train", "--rounds", "-1"], "--rounds must be at least 1, not -1."),
        (["train", "--preset", "[]"], "an empty list was given"),
        (["fold", "--preset", "nope"], "No preset 'nope'; choose from"),
        (["fold", "--rounds", "0"], "--rounds must be at least 1, not 0."),
    ],
)
def test_what_the_user_can_mend_is_one_line(args, words, capsys):
    assert main(["bench", *args]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(
    "args",
    [["decode", "--batch", "many"], ["train", "--speed", "1"], ["train", "--rou", "1"], ["fold", "--png", "x"]],
)
def test_a_wrong_option_is_one_line(args, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *args])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def told(folder, printed, *args):
    content = json.loads((folder / "rows.json").read_text())
    assert content.keys() == KEYS
    assert content["command"] == shlex.join(["taperlit", *args])
    for row in content["rows"]:
        assert row["variant"] in printed
    return content


def run(folder, *args):
    args = ["bench", *args, "--json", str(folder / "rows.json")]
    done = subprocess.run([sys.executable, "-m", "taperlit", *args], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return told(folder, done.stdout, *args)


@pytest.mark.slow
def test_decode_tells_what_folding_saves(tmp_path):
    """What is compiled is in tests/bench."""
    content = run(tmp_path, "decode", "--quick", "--backend", "[eager]")
    assert content["bandwidth_gb_s"] > 0
    rows = {row["variant"]: row for row in content["rows"]}
    assert {"normalized", "explicit", "folded", "transformers-dynamic", "transformers-static"} < rows.keys()
    for row in rows.values():
        assert row["backend"] == "eager"
        assert row.keys() >= ROW
        if row["ratio"] is None:  # it could not be measured here, and says why
            assert row["skipped"]
            assert row["variant"].startswith("onnxruntime-")
            continue
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["tokens"].startswith("equal")  # those of a forward pass without a cache
    assert rows["folded"]["kernels_per_token"] <= 0.9 * rows["normalized"]["kernels_per_token"]
    assert rows["normalized"]["ratio"] == 1


@pytest.mark.slow
def test_train_tells_what_each_phase_costs(tmp_path, capsys):
    args = ["bench", "train", "--quick", "--json", str(tmp_path / "rows.json")]
    assert main(args) == 0
    rows = {row["variant"]: row for row in told(tmp_path, capsys.readouterr().out, *args)["rows"]}
    assert [*rows] == ["plain", "normalize", "blend", "linear", "transformers", "lightning"]
    for row in rows.values():
        assert row.keys() >= {"preset", "batch", "block", "dtype", "backend", "tokens_per_s", "ratio", "low", "high"}
        assert row["low"] <= row["ratio"] <= row["high"]
    assert rows["plain"]["ratio"] == rows["plain"]["peak_ratio"] == 1
    # Memory has no noise: the norms' statistics are gone in the linear phase.
    assert rows["linear"]["peak_gb"] < rows["normalize"]["peak_gb"]
    assert rows["lightning"]["overhead_percent"] is not None


@pytest.mark.slow
def test_fold_tells_seconds_and_memory(tmp_path):
    (row,) = run(tmp_path, "fold", "--quick")["rows"]
    assert row["variant"] == "fold"
    assert row["seconds"] > 0
    # What torch itself takes at the first product is far more than the weights of the smallest preset.
    assert row["peak_gb"] > row["weights_gb"] == pytest.approx(4.27e-3, rel=0.01)
    assert row["peak_ratio"] == pytest.approx(row["peak_gb"] / row["weights_gb"])
