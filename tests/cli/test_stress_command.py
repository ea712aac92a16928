"""``taperlit stress``: its table, its verdict, its exit status and what it writes."""

import json
import re

import pytest
import torch
from small_models import saved

from taperlit.checkpoint.folded import write_folded
from taperlit.cli import main
from taperlit.data.tokenizer import train_tokenizer
from taperlit.folding import fold
from taperlit.norm import shared_gate

PLANTED = 271


@pytest.fixture
def folded(tiny, tmp_path):
    """Writes a folded model, with its embedding of one token multiplied."""

    def write(times=1.0):
        model = tiny(["*norm"], block_size=16).eval()
        shared_gate(model).set(0.0)
        with torch.no_grad():
            model.tok_embed.weight[PLANTED] *= times
        structure = fold(model, lambda: model(torch.arange(8)[None]))
        tokenizer = train_tokenizer(iter(["def function(x): return x" * 20]), 270)
        return str(write_folded(tmp_path / f"folded-{times}", model, structure, tokenizer.to_str()))

    return write


def test_a_sound_model(folded, tmp_path, capsys):
    model, out = folded(), tmp_path / "rows.json"
    assert main(["stress", "--model", model, "--device=cpu", "--quick", "--seed=3", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "verdict: no non-finite logits in float32, bfloat16 and float16; largest scale " in printed
    record = json.loads(out.read_text())
    assert record["ok"] is True
    assert record["command"] == f"taperlit stress --model {model} --device cpu --seed 3 --quick --json {out}"
    assert {"versions", "device", "commit", "verdict", "model"} <= record.keys()
    (contexts,) = {
        row["case"] for row in record["rows"] if re.fullmatch(r"random contexts of \d+ lengths", row["case"])
    }
    assert {(row["case"], row["dtype"]) for row in record["rows"]} == {
        (case, dtype)
        for case in (
            "single tokens", "repeated tokens", "random tokens", contexts, "cached decoding",
        )
        for dtype in ("float32", "bfloat16", "float16")
    }  # fmt: skip
    singles = [row for row in record["rows"] if row["case"] == "single tokens"]
    assert [(row["tokens"], row["nonfinite"]) for row in singles] == [(300, 0)] * 3
    assert all(row["case"] in printed for row in record["rows"])


def test_a_model_that_explodes_on_one_token_fails_and_the_token_is_named(folded, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert main(["stress", "--model", folded(1e25), "--device=cpu", "--quick", "--json", str(out)]) == 1
    printed = capsys.readouterr()
    assert "logits are not finite in float32, single tokens: token 271" in printed.out
    assert printed.err.count("\n") == 1
    assert "fails in float32, see the verdict" in printed.err
    record = json.loads(out.read_text())
    assert record["ok"] is False
    assert record["rows"][0]["worst_token"] == PLANTED
    assert record["rows"][0]["ratio_of_scales"] is None  # JSON has no infinity


def test_what_is_not_for_float16_is_told_with_status_0(folded, capsys):
    assert main(["stress", "--model", folded(1e5), "--device=cpu", "--quick"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("verdict: no non-finite logits in float32 and bfloat16; ")
    assert "not for float16: " in verdict
    assert "token 271 " in verdict.rpartition("not for float16")[2]


def test_a_folder_of_transformers(tmp_path, capsys):
    assert main(["stress", "--model", str(saved("llama", tmp_path / "llama")), "--device=cpu", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "no non-finite logits in float32" in lines[-1]
    assert not any("not tried" in line for line in lines)


def test_what_the_user_can_mend_is_one_line(folded, capsys):
    for args, words in (
        (["--model", "/nowhere/at all"], "/nowhere/at all"),
        (["--model", folded(), "--device=nope"], "No device 'nope' here"),
        (["--model", folded(1.5), "--json=/nowhere/rows.json"], "there is no folder /nowhere; make it first."),
    ):
        assert main(["stress", *args]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
