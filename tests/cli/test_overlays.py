"""An overlay that loses to what comes later is said."""

import json
from pathlib import Path

import pytest
from test_configs import parse

from taperlit.cli.overlays import without_effect

TAPER = Path(__file__).parents[2] / "configs/taper"
RUN = Path(__file__).parents[2] / "configs/quickstart.yaml"


def overlay(name):
    return str(TAPER / f"{name}.yaml")


def test_of_two_overlays_of_one_dial_the_first_has_no_effect():
    args = ["--config", str(RUN), "--config", overlay("all"), f"--config={overlay('internal_aux')}"]
    (line,) = without_effect(args)
    assert (
        line == f"--config {overlay('all')} has no effect: all that it sets is set again by {overlay('internal_aux')}."
    )


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--config", "{run}", "--config", "{all}"],
        ["--config", "{run}", "--config", "{all}", "--config", "{all}"],  # it says what the other says
        ["--config", "{all}", "--taper.anchor=true"],  # its other value stands
        ["--config", "{all}", "--trainer.callbacks+=RngState", "--model.taper"],
        ["--config", "nowhere.yaml", "--config", "{all}"],  # for the parser to refuse
    ],
)
def test_what_has_an_effect_or_cannot_be_known_is_not_told(args):
    assert without_effect([arg.format(run=RUN, all=overlay("all")) for arg in args]) == []


def test_options_and_whole_sections_take_values_back(tmp_path):
    one, whole, nested = (tmp_path / f"{name}.yaml" for name in ("one", "whole", "nested"))
    one.write_text("taper: {gate: {class_path: GateSchedule, init_args: {warmup: 3}}}\n")
    whole.write_text("taper: {gate: null}\n")
    nested.write_text("taper: {gate: {init_args: {warmup: 4}}}\n")
    assert "set again by --taper.gate." in without_effect([f"--config={one}", "--taper.gate", "false"])[0]
    assert f"set again by {whole}." in without_effect([f"--config={one}", f"--config={whole}"])[0]
    assert "set again by --taper.gate.warmup." in without_effect([f"--config={nested}", "--taper.gate.warmup=5"])[0]
    assert without_effect([f"--config={nested}", "--taper.gate.warmup=4"]) == []
    assert without_effect(["--taper.gate.warmup=5", f"--config={nested}"]) == []


def test_what_adds_up_takes_nothing_back(tmp_path):
    (tmp_path / "a.yaml").write_text("prompt: one\n")
    args = ["--config", str(tmp_path / "a.yaml"), "--prompt", "two"]
    assert len(without_effect(args)) == 1
    assert without_effect(args, gathered=["prompt"]) == []


def shape(tmp_path, *args):
    """The model's shape that a command with these options would build; texts of a model are files."""
    files = [arg for arg in args if arg.startswith("model:")]
    for i, text in enumerate(files):
        (tmp_path / f"{i}.yaml").write_text(text)
    given = [f"--config={tmp_path / f'{files.index(arg)}.yaml'}" if arg in files else arg for arg in args]
    return parse(*given).model.overrides


SIZES = "model: {preset: small_1m, overrides: {d_model: 32, d_ff: 48, bias: true}}"
GLU = {"d_model": 32, "bias": True, "mlp": "glu"}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALED = f"model: {{preset: small_1m, overrides: {{rope_scaling: {json.dumps(SCALING)}}}}}"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([SIZES], {"d_model": 32, "d_ff": 48, "bias": True}),
        ([SIZES, "model: {overrides: {d_ff: 64, mlp: glu}}"], {"d_model": 32, "d_ff": 64, "bias": True, "mlp": "glu"}),
        (["--model.overrides.d_model=48", SIZES], {"d_model": 32, "d_ff": 48, "bias": True}),
        (["--model.overrides.n_head", "2", SIZES], {"n_head": 2, "d_model": 32, "d_ff": 48, "bias": True}),
        (
            [SIZES, "model: {overrides: {init: fan_in}}", "model: {overrides: {mlp: glu, rope_scaling: null}}"],
            {"d_model": 32, "d_ff": 48, "bias": True, "init": "fan_in", "mlp": "glu", "rope_scaling": None},
        ),
        ([SIZES, "--model.overrides.d_ff=64"], {"d_model": 32, "d_ff": 64, "bias": True}),
        ([SIZES, "--model.overrides={d_ff: 64}"], {"d_model": 32, "d_ff": 64, "bias": True}),
        ([SIZES, "--model.overrides", "{d_ff: 64, mlp: glu}", "model: {overrides: {d_ff: 96}}"], GLU | {"d_ff": 96}),
        ([SIZES, "--model.overrides=null", "--model.overrides={d_ff: 64}"], {"d_ff": 64}),
        ([SCALED, "model: {overrides: {mlp: glu}}"], {"rope_scaling": SCALING, "mlp": "glu"}),
        ([SCALED, "--model.overrides={mlp: glu}"], {"rope_scaling": SCALING, "mlp": "glu"}),
        ([SIZES, "model: {overrides: null}"], None),
        ([SIZES, "model: {overrides: null}", "model: {overrides: {mlp: glu}}"], {"mlp": "glu"}),
        ([SIZES, "--model.overrides=null", "model: {overrides: {mlp: glu}}"], {"mlp": "glu"}),
        ([SIZES, "model: {lr: 1.0e-3}"], {"d_model": 32, "d_ff": 48, "bias": True}),
    ],
)
def test_an_overlay_or_an_option_changes_single_fields_of_the_shape(tmp_path, args, expected):
    assert shape(tmp_path, *args) == expected
