import json
import os
from pathlib import Path

import pytest
import torch

from taperlit.bench.machine import about, command_line, commit, pick_device, read_bandwidth
from taperlit.bench.results import check_paths, table, write_json, write_png
from taperlit.errors import TaperlitError

ROWS = [
    {"variant": "normalized", "ratio": 1.0, "low": 1.0, "high": 1.0, "tokens_per_s": 1234.5, "count": 3, "none": None},
    {"variant": "folded", "ratio": 1.25, "low": 1.2, "high": 1.31, "tokens_per_s": 12.345, "count": 12, "none": None},
    {"variant": "peer", "ratio": None, "low": None, "high": None, "tokens_per_s": None, "skipped": "not here"},
]


def test_the_table_has_the_ratio_first_and_leaves_out_what_nobody_has():
    columns = {"ratio": "ratio", "variant": "variant", "tokens_per_s": "tokens/s", "none": "none", "skipped": "skipped"}
    lines = table(ROWS, columns).splitlines()
    assert lines[0].split() == ["ratio", "variant", "tokens/s", "skipped"]
    assert lines[2].split() == ["1.25x", "(1.20", "to", "1.31)", "folded", "12.3"]
    assert lines[1].split()[-1] == "1,234"
    assert lines[3].split() == ["peer", "not", "here"]


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_json(path, {"device": "some"}, ROWS)
    before = json.loads(path.read_text())
    assert before["rows"][1]["ratio"] == 1.25

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TaperlitError, match=r"rows.json cannot be written: No space left"):
        write_json(path, {"device": "other"}, ROWS)
    monkeypatch.undo()
    assert json.loads(path.read_text()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {}, [{"ratio": float("nan")}])  # no JSON has it
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_the_picture_is_one(tmp_path):
    write_png(tmp_path / "ratios.png", "Decoding", ROWS, ("preset",))
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_is_refused_before_measuring(tmp_path):
    with pytest.raises(TaperlitError, match="there is no folder"):
        check_paths(str(tmp_path / "nowhere" / "rows.json"), None)


def test_the_machine_is_told():
    facts = about(command_line("bench decode", ["--preset", "[a, b]"]), torch.device("cpu"))
    assert facts.keys() == {"versions", "device", "commit", "command"}
    assert facts["command"] == "taperlit bench decode --preset '[a, b]'"
    assert facts["versions"]["torch"] == torch.__version__
    assert "CPU cores" in facts["device"]
    assert facts["commit"] == commit()
    with pytest.raises(TaperlitError, match="No device 'nope' here"):
        pick_device("nope")


def test_the_bandwidth_is_of_the_machine(monkeypatch):
    monkeypatch.setattr("taperlit.bench.machine.READ_BYTES", {"cpu": 1 << 24})
    assert 0.1 < read_bandwidth(torch.device("cpu")) < 1e5
