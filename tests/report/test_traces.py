"""What is read of a run is what its loggers were given."""

import math

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter
from written import a_taper, csv_run, tensorboard_run

from taperlit.errors import TaperlitError
from taperlit.report.traces import read_traces


@pytest.mark.parametrize("write", [tensorboard_run, csv_run])
def test_every_value_comes_back(tmp_path, write):
    read = read_traces(write(tmp_path / "version_0"))
    assert read.keys() == a_taper().keys()
    for tag, points in a_taper().items():
        assert [step for step, _ in read[tag]] == [step for step, _ in points]
        assert [value for _, value in read[tag]] == pytest.approx([value for _, value in points], rel=1e-6)


@pytest.mark.parametrize("write", [tensorboard_run, csv_run])
def test_values_that_are_not_finite_come_back(tmp_path, write):
    loss = [(0, 1.0), (1, math.nan), (2, math.inf), (3, -math.inf)]
    (read,) = read_traces(write(tmp_path / "version_0", {"train/loss": loss})).values()
    assert str(read) == str(loss)


def test_a_resumed_run_leaves_out_what_was_lost(tmp_path):
    tensorboard_run(tmp_path, {"loss": [(k, float(k)) for k in range(8)], "rare": [(3, 1.0), (7, 2.0)]}, None)
    tensorboard_run(tmp_path, {"loss": [(k, 10.0 + k) for k in range(5, 9)], "rare": [(9, 3.0)]}, None)
    read = read_traces(tmp_path)
    assert read["loss"] == [(k, float(k) if k < 5 else 10.0 + k) for k in range(9)]
    assert read["rare"] == [(3, 1.0), (7, 2.0), (9, 3.0)]  # by itself it does not tell that step 7 was lost


def test_gains_drawn_as_histograms_are_read_as_means_and_spreads(tmp_path):
    writer, generator = SummaryWriter(tmp_path), np.random.default_rng(0)
    gains = [generator.normal(1, 0.25, 64) for _ in range(3)]
    for step, gain in enumerate(gains):
        writer.add_histogram("gain/model.norm", gain, step)
    writer.close()
    read = read_traces(tmp_path)
    assert [value for _, value in read["taper/gain_mean/model.norm"]] == pytest.approx([g.mean() for g in gains])
    assert [value for _, value in read["taper/gain_std/model.norm"]] == pytest.approx([g.std() for g in gains])


def test_half_a_line_of_a_killed_run_is_no_number(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,8.5\n1,7.25\n2,1")  # of 1...
    assert read_traces(tmp_path) == {"train/loss": [(0, 8.5), (1, 7.25)]}


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,loss\n0,good\n", "step,loss\nfirst,1\n", "step,loss\n,1\n"])
def test_what_is_no_csv_of_a_logger_is_refused_by_line(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(TaperlitError, match=r"metrics\.csv, line 2, is not CSVLogger's"):
        read_traces(tmp_path)


def test_event_files_of_garbage_have_no_traces(tmp_path):
    (tmp_path / "events.out.tfevents.1.host.1.0").write_bytes(b"no event" * 99)
    assert read_traces(tmp_path) == {}
