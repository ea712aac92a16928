"""``tools/torture``: what it calls good and bad, on planted faults; and, slow, its short form."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from torture_harness import __main__ as command  # noqa: E402
from torture_harness import damage, faults, mutations  # noqa: E402
from torture_harness.runner import Call, Runner  # noqa: E402
from torture_harness.verdict import Allowed, Ended, Outcome, judge  # noqa: E402

LINE = "taperlit: error: config.json is damaged; fold again.\n"


@pytest.mark.parametrize(
    ("ended", "allowed", "outcome"),
    [
        (Ended(1, stderr=LINE), Allowed(), Outcome.REFUSED),
        (Ended(2, stderr=f"a bar\r{LINE}"), Allowed(), Outcome.REFUSED),
        (Ended(0, result="a"), Allowed("a"), Outcome.SAME),
        (Ended(0, result="b"), Allowed("a", edited=True), Outcome.EDITED),
        (Ended(0, result="b"), Allowed("a"), Outcome.WRONG),
        (Ended(0, result="a"), Allowed(), Outcome.WRONG),
        (Ended(0), Allowed(), Outcome.WRONG),
        (Ended(1, stderr="no such file\n"), Allowed(), Outcome.UNTOLD),
        (Ended(1, stderr=LINE + LINE), Allowed(), Outcome.UNTOLD),
        (Ended(1, stderr=f"Traceback (most recent call last):\n  ...\nKeyError\n{LINE}"), Allowed(), Outcome.TRACEBACK),
        (Ended(70, stderr="x"), Allowed(), Outcome.TRACEBACK),
        (Ended(-11), Allowed("a", edited=True), Outcome.TRACEBACK),
        (Ended(-9, hung=True), Allowed(), Outcome.HANG),
        (Ended(0, result="a", hung=True), Allowed("a"), Outcome.HANG),
    ],
)
def test_how_a_command_ends_is_judged(ended, allowed, outcome):
    assert judge(ended, allowed)[0] is outcome
    assert outcome.good == (outcome in (Outcome.REFUSED, Outcome.SAME, Outcome.EDITED))


def test_what_differs_is_named():
    written = {"state_dict": "a", "RngState": "b"}
    made = {"state_dict": "a", "RngState": "c", "loops": "d"}
    assert judge(Ended(0, result=made), Allowed(written)) == (Outcome.WRONG, "status 0, and other RngState, loops")


def test_code_that_ran_is_told_whatever_else_happened(tmp_path):
    canary = tmp_path / "canary"
    assert judge(Ended(1, stderr=LINE), Allowed(), canary)[0] is Outcome.REFUSED
    canary.mkdir()
    assert judge(Ended(1, stderr=LINE), Allowed(), canary)[0] is Outcome.CODE


def planted(args):
    """A command with every kind of end; run in a process of the harness's."""
    if args == ["traceback"]:
        raise KeyError("n_layer")
    if args == ["spins"]:
        while True:
            pass
    if args == ["refuses"]:
        print(LINE.strip(), file=sys.stderr)
        return 1
    return 0


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Each planted end, by the words that make it."""
    folder = tmp_path_factory.mktemp("planted")
    runner = Runner(folder / "logs", limit=5.0)
    words = ("traceback", "spins", "refuses", "accepts")
    return {word: runner.run(Call([word], folder, function="test_torture:planted")) for word in words}


def test_a_planted_traceback_hang_refusal_and_silent_acceptance_are_caught(ends):
    outcomes = {name: judge(ended, Allowed("what was written"))[0] for name, ended in ends.items()}
    assert outcomes == {
        "traceback": Outcome.TRACEBACK,
        "spins": Outcome.HANG,
        "refuses": Outcome.REFUSED,
        "accepts": Outcome.WRONG,
    }
    assert "KeyError: 'n_layer'" in judge(ends["traceback"], Allowed())[1]


def test_the_table_counts_and_says_how_to_do_it_again(capsys):
    tally = command.Tally(7)
    tally.add("mutation/0", "folded", Outcome.REFUSED, LINE, "config.json: bit 3")
    tally.add("mutation/1", "folded", Outcome.REFUSED, LINE, "config.json: bit 4")
    tally.add("fault/5", "fit", Outcome.HANG, "", "taperlit fit --model.lr=nan")
    assert [row.split() for row in tally.table().splitlines()] == [
        ["refused", "in", "one", "line", "HANG", "all"],
        ["fault", "fit", "1", "1"],
        ["mutation", "folded", "2", "2"],
        ["all", "2", "1", "3"],
    ]
    assert len(tally.bad) == 1
    assert "tools/torture --seed 7 --case fault/5" in capsys.readouterr().err


def test_a_seed_damages_a_file_in_one_way_and_many_seeds_in_many(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(random.Random(0).randbytes(500))
    told, contents = Counter(), set()
    for seed in range(200):
        twice = []
        for _ in range(2):
            path = damage.copy(source, tmp_path / "copy")
            words = damage.damage_bytes(path, random.Random(seed))
            twice.append((words, path.read_bytes() if path.is_file() else b""))
        assert twice[0] == twice[1]
        told[twice[0][0].split()[0]] += 1
        contents.add(twice[0][1])
        assert twice[0][1] != source.read_bytes() or "zero" in twice[0][0]
    assert len(contents) > 150
    assert {"flip", "zero", "cut", "insert", "append", "double:", "doubled:", "halves"} <= told.keys()


def test_values_of_json_become_others():
    text = json.dumps({"model": {"n_layer": 2, "norm": "rmsnorm"}, "tied": {}, "list": [1, 2]})
    seen = Counter()
    for seed in range(300):
        changed, words = damage.damage_json(text, random.Random(seed))
        seen[words.split(" is ")[-1].split()[0]] += 1
        assert changed != text or " is " in words
    assert {"gone", "called", "there", "nested", "True", "nan"} <= seen.keys()
    assert not mutations.KINDS.keys() - {"checkpoint", "folded", "sharded", "cache", "tokenizer", "config"}


def test_planted_code_is_code(tmp_path):
    path, canary = tmp_path / "last.ckpt", tmp_path / "canary"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    damage.plant_bomb(path, canary, random.Random(0))
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_there_are_faults_of_every_command():
    commands = {name for name, _ in faults.all_faults()}
    assert {"fit", "validate", "fold", "generate", "export", "stress", "bench decode", "report"} <= commands
    lines = [tuple(args) for _, args in faults.all_faults()]
    assert len({*lines}) == len(lines) >= 200


@pytest.mark.parametrize("args", [["--mutations=-1"], ["--limit=0"], ["--minutes=0"], ["--nothing"]])
def test_wrong_options_are_told(args, capsys):
    with pytest.raises(SystemExit) as end:
        command.parse(args)
    assert end.value.code == 2


@pytest.mark.slow
def test_the_short_form_finds_nothing():
    # In a process of its own: commands are forked from it, and pytest's threads and files are not theirs to inherit.
    args = [sys.executable, "-m", "torture_harness", "--mutations=6", "--faults=3", "--kills=1", "--starts=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    done = subprocess.run(args, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 kills, seed 0, ")
