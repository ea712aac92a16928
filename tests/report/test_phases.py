"""The phases of a run, against the schedule that made its gate."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from written import CONFIG, END, STEPS, WARMUP

from taperlit.report.phases import Zone, find_phases
from taperlit.schedule import gate_at


def gates(warmup, end, steps, every=1, shape="cosine"):
    return [(k, gate_at(k + 1, warmup, end, shape)) for k in range(0, steps, every)]


def test_the_config_tells_and_the_trace_agrees():
    phases = find_phases(yaml.safe_load(CONFIG), None, gates(WARMUP, END, STEPS))
    assert (phases.warmup, phases.end, phases.source) == (WARMUP, END, "the config")
    assert phases.zones(STEPS) == [Zone("warm-up", 0, 10), Zone("taper", 10, 25), Zone("linear", 25, 40)]
    assert phases.zones(18) == [Zone("warm-up", 0, 10), Zone("taper", 10, 18)]
    assert phases.zones(25)[-1] == Zone("linear", 25, 25)  # its first step is the last of the run


def test_a_gate_among_the_listed_callbacks_tells_too():
    gate = {"class_path": "taperlit.callbacks.gate.GateSchedule", "init_args": {"warmup": 3, "end": 0.5}}
    config = {"trainer": {"max_steps": 20, "callbacks": [{"class_path": "lightning.Callback"}, gate]}, "taper": None}
    phases = find_phases(config, None, [])
    assert (phases.warmup, phases.end) == (3, 10)


@given(
    warmup=st.integers(1, 30), length=st.integers(2, 40), after=st.integers(0, 20), every=st.integers(1, 7),
    shape=st.sampled_from(["cosine", "linear"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_trace_has_the_last_word(warmup, length, after, every, shape):
    end = warmup + length
    trace = gates(warmup, end, end + after, every, shape)
    true = find_phases({}, (warmup, end), trace)
    assert (true.warmup, true.end, true.source) == (warmup, end, "the checkpoint")
    seen = find_phases({}, (warmup + every, end + 50), trace)  # of another run: the trace contradicts it
    if seen is not None and "checkpoint" not in seen.source:
        assert warmup - every < seen.warmup <= warmup
        assert seen.end is None or end <= seen.end < end + every
    ones = [k + 1 for k, g in trace if g == 1]
    if trace[-1][1] < 1 and any(warmup < k + 1 <= warmup + every for k, _ in trace):
        assert seen.warmup == ones[-1]  # there is a point that tells


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"trainer": None},
        {"taper": 3, "trainer": {}},
        {"taper": {"gate": None}, "trainer": {"max_steps": 9}},
        {"taper": {"gate": {"class_path": "GateSchedule", "init_args": {"warmup": 2.5}}}, "trainer": {"max_steps": 9}},
    ],
)
def test_configs_of_others_tell_nothing(config):
    assert find_phases(config, None, []) is None
