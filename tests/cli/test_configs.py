import inspect
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from taperlit.cli.slots import SLOTS, stays_off
from taperlit.cli.train import TaperlitCLI, build_cli
from taperlit.errors import TaperlitError
from taperlit.norm import tapered_norms
from taperlit.training import source
from taperlit.training.module import LanguageModel

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
KINDS = [run for run in RUNS if "tinystories" not in run or "_1m" in run]  # TinyStories' differ in size alone
SIZES = {"1m": 1e6, "3m": 3e6, "9m": 9e6, "30m": 30e6, "124m": 124e6, "350m": 350e6}
OVERLAYS = {
    "baseline": "none",
    "attention": "attention",
    "internal": "internal",
    "internal_aux": "internal",
    "all": "all",
    "all_aux": "all",
}
PEERS = {"fakeln": "fakeln", "dyt": "dyt", "derf": "derf"}
ANCHORED = {"internal_aux", "all_aux", "baseline", *PEERS}  # overlays that leave the anchor as it is


ALWAYS = {"monitor", "guard", "tails"}
TAPERING = {"gate", "alignment", "fold"}
EVERY = {"StepProgressBar", "RunSummary", "TokenThroughput", "RunCheckpoint", "RngState"}


def parse(*args, command="fit"):
    """What the command line makes of its arguments, before anything is built."""
    nothing = {
        "instantiate_classes": lambda self: None,
        "_run_subcommand": lambda self, name: None,
    }
    with mock.patch.object(sys, "argv", ["taperlit", command, *args]), mock.patch.multiple(TaperlitCLI, **nothing):
        return build_cli(command).config[command]


@cache
def plain(run):
    """A run's config without an overlay; to be read only."""
    return parse("--config", str(CONFIGS / run))


def slots(config):
    """The slots whose callbacks run."""
    return {name for name in SLOTS if config.taper.get(name) is not None}


def listed(config):
    """The names of the classes in trainer.callbacks."""
    return [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]


@pytest.mark.parametrize("run", RUNS)
def test_every_run_builds_with_the_size_in_its_name(run):
    config = parse("--config", str(CONFIGS / run))
    with torch.device("meta"):
        module = LanguageModel(**{k: v for k, v in config.model.as_dict().items() if k != "compile"})
        module.configure_model()
    size = SIZES.get(run.removesuffix(".yaml").split("_")[1 if "gpt2" in run else -1])
    if size is not None:
        assert module.model.num_parameters() == pytest.approx(size, rel=0.08)
    assert module.model.config.block_size >= config.data.block_size
    assert len(tapered_norms(module)) == 2 * module.model.config.n_layer
    assert slots(config) == running("internal", True)
    assert sorted(listed(config)) == sorted(EVERY)


def test_tinystories_differ_in_size_alone():
    runs = [yaml.safe_load((CONFIGS / run).read_text()) for run in RUNS if "tinystories" in run]
    assert len(runs) == 4
    for run in runs:
        del run["model"]["preset"], run["model"]["lr"], run["trainer"]["logger"]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("overlay", OVERLAYS | PEERS)
@pytest.mark.parametrize("run", KINDS)
def test_every_overlay_composes_with_every_kind_of_run(run, overlay):
    before = plain(run)
    files = [f"--config={CONFIGS / name}" for name in (run, f"taper/{overlay}.yaml")]
    config = parse(*files)
    dial = (OVERLAYS | PEERS)[overlay]
    assert config.model.taper == dial
    assert slots(config) == running(dial, overlay.endswith("_aux"))
    for slot in slots(config) & slots(before):
        assert config.taper[slot] == before.taper[slot]  # an overlay chooses what, the run says when
    expected = deepcopy(before.model)
    expected.taper = dial
    if overlay in ("dyt", "derf"):
        expected.overrides = {**(expected.overrides or {}), "embed_norm": False}
    assert config.model == expected
    assert config.data.as_dict() == before.data.as_dict()
    assert config.trainer == before.trainer
    check_the_papers(parse(*files, f"--config={CONFIGS / 'taper/paper.yaml'}"), config)


def check_the_papers(config, before):
    """The paper's own settings are one overlay, over any run and any other overlay."""
    assert slots(config) == slots(before)
    assert config.model.taper == before.model.taper
    assert "anchor" not in slots(before) or before.taper.anchor.init_args.fade == 0.5
    assert {**(before.model.overrides or {}), "embed_norm": False, "init": "gpt2"} == config.model.overrides
    assert (config.model.taper_bias, config.model.decay_start) == (False, 0)
    if "gate" in slots(config):
        gate, alignment = config.taper.gate.init_args, config.taper.alignment.init_args
        assert (gate.warmup, gate.end, gate.shape) == (0.05, 0.5, "cosine")
        assert (alignment.ema_rate, alignment.fit) == (0.01, "energy")
    if "anchor" in slots(config):
        anchor = config.taper.anchor.init_args
        assert (anchor.weight, anchor.ema_rate, anchor.fade) == (0.1, 0.01, None)


FINETUNES = sorted(f"finetune/{path.name}" for path in (CONFIGS / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("overlay", ["dyt", "derf", "paper"])
@pytest.mark.parametrize("run", FINETUNES)
def test_overlays_that_take_a_presets_fields_back_go_over_pretrained_models(run, overlay):
    config = parse(f"--config={CONFIGS / run}", f"--config={CONFIGS / f'taper/{overlay}.yaml'}").model
    with mock.patch.object(source, "read_origin"):
        assert source.source_of(config.as_dict()).name == config.pretrained
        with pytest.raises(TaperlitError, match=r"overrides changes a preset; leave it out"):
            source.source_of({**config.as_dict(), "overrides": {"embed_norm": True}})


def running(taper, anchor):
    """The slots that should run."""
    if taper == "fakeln":
        return {*ALWAYS, "fakeln", "fold"}
    tapering = TAPERING | ({"anchor"} if anchor else set()) if taper in ("attention", "internal", "all") else set()
    return {*ALWAYS, *tapering}


@pytest.mark.parametrize("dial", ["none", "internal", "all"])
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("run", ["quickstart.yaml", "gpt2_124m_owt.yaml"])
def test_one_dial_says_which_callbacks_run(run, overlay, dial):
    files = ["--config", str(CONFIGS / run), "--config", str(CONFIGS / f"taper/{overlay}.yaml")]
    config = parse(*files, f"--model.taper={dial}")
    # where the overlay leaves the anchor alone it is on
    assert slots(config) == running(dial, overlay in ANCHORED)
    assert sorted(listed(config)) == sorted(EVERY)


@pytest.mark.parametrize(
    ("overlay", "dial"),
    [("internal", "fakeln"), ("all_aux", "dyt"), ("baseline", "derf"), ("fakeln", "all"), ("dyt", "none"),
     ("derf", "internal"), ("fakeln", "dyt")],
)  # fmt: skip
def test_the_dial_turns_between_the_taper_and_its_peers(overlay, dial):
    config = quickstart("--config", str(CONFIGS / f"taper/{overlay}.yaml"), f"--model.taper={dial}")
    assert slots(config) == running(dial, overlay in ANCHORED)


def quickstart(*args, **options):
    return parse("--config", str(CONFIGS / "quickstart.yaml"), *args, **options)


def test_the_anchor_is_the_other_dial():
    for off in ("false", "null"):
        config = quickstart(f"--taper.anchor={off}")
        assert slots(config) == running("internal", False)
    own = "{class_path: taperlit.ScaleAnchor, init_args: {module: model.head, weight: 0.3}}"
    assert quickstart("--taper.anchor", own).taper.anchor.init_args.module == "model.head"
    assert quickstart("--taper.anchor=true").taper.anchor == quickstart().taper.anchor
    assert "anchor" not in slots(quickstart("--taper.anchor=true", "--model.taper=none"))
    with_overlay = quickstart("--config", str(CONFIGS / "taper/all_aux.yaml"), "--taper.anchor.weight=0.3")
    assert with_overlay.taper.anchor.init_args.weight == 0.3


def test_flags_reach_into_the_default_slots_and_into_a_configs():
    config = quickstart("--taper.gate.warmup=10", "--taper.guard.skip=true")
    assert (config.taper.gate.init_args.warmup, config.taper.gate.init_args.end) == (10, 0.5)
    assert config.taper.guard.init_args.skip
    config = parse("--model.preset=small_1m", "--model.taper=all", "--taper.gate.warmup=10")
    assert (config.taper.gate.init_args.warmup, config.taper.gate.init_args.end) == (10, 0.5)


@pytest.mark.parametrize("slot", [name for name, slot in SLOTS.items() if not slot.on])
def test_an_option_of_a_slot_that_is_off_turns_it_on(slot):
    kind = SLOTS[slot].kind
    option = next(iter(inspect.signature(kind).parameters.values()))
    config = quickstart(f"--taper.{slot}.{option.name}={yaml.safe_dump(option.default).split()[0]}")
    assert config.taper[slot] == quickstart(f"--taper.{slot}=true").taper[slot]
    assert config.taper[slot].class_path == f"taperlit.{kind.__name__}"


BEFORE = [["=true"], ["=false"], ["=null"], ["=true", ".multiple=5"], ["=TailPenalty"], [".weight=3"], []]


@pytest.mark.parametrize("before", BEFORE)
def test_an_option_counts_wherever_the_slot_stood(tmp_path, before):
    """What was given before stays, but for what it turned off; a file leaves off what was turned off."""
    given = [f"--taper.tail{one}" for one in before]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("taper: {tail: {init_args: {random_every: 4}}}")
    for option in (["--taper.tail.random_every=4"], ["--config", str(overlay)]):
        if "=false" in before and "--config" in option:
            assert quickstart(*given, *option).taper.tail is None
            continue
        got = quickstart(*given, *option).taper.tail.init_args
        assert got.random_every == 4
        assert got.multiple == (5 if ".multiple=5" in before else 3)
        assert got.weight == (3 if ".weight=3" in before else 1)
        assert got.residual == (None if "=TailPenalty" in before else "model.final_norm")
        assert quickstart(*given, *option, "--taper.tail=false").taper.tail is None


@pytest.mark.parametrize("off", ["null", "false"])
def test_an_anchor_that_is_off_is_turned_on_by_an_option_and_not_by_an_overlay(tmp_path, off):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("taper: {anchor: {init_args: {weight: 0.3}}}")
    named = ["--config", str(CONFIGS / "taper/internal_aux.yaml"), "--config", str(overlay)]
    for on in (["--taper.anchor.weight=0.3"], ["--taper.anchor=true", "--config", str(overlay)], named):
        anchor = quickstart(f"--taper.anchor={off}", *on).taper.anchor.init_args
        assert (anchor.module, anchor.fade, anchor.weight) == ("model.final_norm", 0.5, 0.3)
    args = ["--config", str(CONFIGS / "quickstart.yaml"), f"--taper.anchor={off}", f"--config={overlay}"]
    assert parse(*args).taper.anchor is None
    (line,) = stays_off(args)
    assert line.startswith(f"taper.anchor is off, so that its options in --config {overlay}")


def test_an_option_that_a_slots_callback_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit):
        quickstart("--taper.tail.bogus=4")
    assert "'bogus' is not accepted" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--taper.ema_r=0.2", "--taper.tai.multiple=4", "--trainer.max_step=4"])
def test_an_abbreviated_option_is_refused(capsys, option):
    with pytest.raises(SystemExit):
        quickstart(option)
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "rates"),
    [
        (["--taper.ema_rate=0.2"], (0.2, 0.2)),
        (["--taper.ema_rate=0.2", "--taper.anchor.ema_rate=0.3"], (0.2, 0.3)),
        (["--taper.anchor.ema_rate=0.3", "--taper.ema_rate=0.2"], (0.2, 0.2)),
        (["--taper.alignment.ema_rate=0.01"], (0.01, 0.05)),  # also one's default
        (["--taper.anchor.ema_rate=0.3", "--taper.anchor=true"], (0.05, 0.05)),
        ([f"--config={CONFIGS / 'taper/paper.yaml'}"], (0.01, 0.01)),
    ],
)
def test_of_the_rate_for_both_averages_and_a_slots_own_the_last_one_counts(tmp_path, args, rates):
    for config in (str(CONFIGS / "quickstart.yaml"), saved(tmp_path, plain("quickstart.yaml"))):
        taper = parse("--config", config, *args).taper
        assert (taper.alignment.init_args.ema_rate, taper.anchor.init_args.ema_rate) == rates


def test_in_one_file_a_slots_own_rate_counts(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("taper: {anchor: {init_args: {ema_rate: 0.01}}, ema_rate: 0.2}")
    taper = quickstart("--taper.alignment.ema_rate=0.3", "--config", str(overlay)).taper
    assert (taper.alignment.init_args.ema_rate, taper.anchor.init_args.ema_rate) == (0.2, 0.01)
    assert quickstart("--taper.ema_rate=null").taper.anchor.init_args.ema_rate == 0.01


def test_a_gate_that_nothing_would_move_is_refused():
    for off in ("null", "false"):
        with pytest.raises(TaperlitError, match=r"taper\.gate is off.*--taper\.gate=true"):
            quickstart(f"--taper.gate={off}")
    on = ["--taper.gate=true", "--taper.alignment=true", "--taper.fold=true"]
    off = ["--taper.gate=null", "--taper.alignment=null", "--taper.fold=null"]
    assert slots(quickstart(*off, *on)) == running("internal", True)  # as it advises
    for dial in ("none", "fakeln", "dyt", "derf"):  # these have no gate to move
        assert "gate" not in slots(quickstart("--taper.gate=false", f"--model.taper={dial}"))


def test_a_schedule_of_fakeln_that_is_off_is_refused():
    with pytest.raises(TaperlitError, match=r"taper\.fakeln is off.*--taper\.fakeln=true --taper\.fold=true"):
        quickstart("--taper.fakeln=null", "--model.taper=fakeln")
    own = "{class_path: taperlit.FakeLNSchedule, init_args: {start: 7}}"
    assert slots(quickstart("--model.taper=fakeln", "--trainer.callbacks+", own)) == {*ALWAYS, "fold"}


def test_nothing_runs_twice():
    mine = "{class_path: taperlit.GateSchedule, init_args: {warmup: 7}}"
    config = quickstart("--trainer.callbacks+", mine, "--trainer.callbacks+=RunCheckpoint")
    assert slots(config) == running("internal", True) - {"gate"}
    assert sorted(listed(config)) == sorted({*EVERY, "GateSchedule"})
    single = quickstart("--trainer.callbacks", "{class_path: taperlit.RngState}")  # no list
    assert sorted(listed(single)) == sorted(EVERY)
    own = quickstart("--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks+=ModelCheckpoint")
    assert sorted(listed(own)) == sorted(
        EVERY - {"StepProgressBar", "RunCheckpoint"} | {"TQDMProgressBar", "ModelCheckpoint"}
    )


def saved(folder, config):
    """The file that a run of this config leaves."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.as_dict().items() if k != "config"}))
    return str(path)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--model.taper=none"],
        ["--model.taper=fakeln"],
        ["--model.taper=all", "--taper.anchor=false"],
        ["--taper.fold=null", "--taper.gate.warmup=3", "--trainer.enable_progress_bar=false"],
        ["--trainer.callbacks+", "{class_path: taperlit.GateSchedule, init_args: {warmup: 7}}"],
    ],
)
def test_a_settled_config_is_settled(tmp_path, args):
    first = quickstart(*args)
    config = saved(tmp_path, first)
    again = parse("--config", config)
    assert again.taper == first.taper
    assert again.trainer == first.trainer
    # an option that turns a callback off still does, and the dial still turns
    off = parse("--config", config, "--trainer.enable_progress_bar=false", "--model.taper=none")
    assert "StepProgressBar" not in listed(off)
    assert not slots(off) & (TAPERING | {"anchor"})


@pytest.mark.parametrize(
    ("dial", "other"),
    [
        ("none", "--config={}/all_aux.yaml"),
        ("none", "--model.taper=internal"),
        ("internal", "--config={}/fakeln.yaml"),
        ("fakeln", "--model.taper=attention"),
        ("dyt", "--config={}/internal.yaml"),
    ],
)
def test_a_saved_config_with_another_dial_is_the_run_with_that_dial(tmp_path, dial, other):
    other = other.format(CONFIGS / "taper")
    first = quickstart(f"--model.taper={dial}")
    assert slots(first) == first.taper.as_dict().keys() & {name for name, slot in SLOTS.items() if slot.on}
    again = parse("--config", saved(tmp_path, first), other)
    assert "gate" in slots(again) or "fakeln" in slots(again)
    assert again.taper == quickstart(other).taper


def test_what_was_turned_off_stays_off_with_another_dial(tmp_path):
    config = saved(tmp_path, quickstart("--model.taper=none", "--taper.anchor=null", "--taper.fakeln=false"))
    assert slots(parse("--config", config, "--model.taper=all")) == running("all", False)
    with pytest.raises(TaperlitError, match=r"taper\.fakeln is off"):
        parse("--config", config, "--model.taper=fakeln")


def test_predict_has_a_writer():
    assert sorted(listed(quickstart(command="predict"))) == sorted({*EVERY, "PredictionWriter"})
    assert quickstart(command="predict").return_predictions is False


def test_run_configs_repeat_nothing_of_the_slots():
    defaults = parse("--model.preset=small_1m", "--model.taper=internal").taper
    for run in RUNS:
        for slot, given in (yaml.safe_load((CONFIGS / run).read_text()).get("taper") or {}).items():
            if slot in SLOTS:
                assert given.keys() == {"init_args"}
                repeated = {k for k, v in given["init_args"].items() if defaults[slot].init_args[k] == v}
                assert not repeated, (run, slot)


def test_no_overlay_is_forgotten():
    assert {path.stem for path in (CONFIGS / "taper").glob("*.yaml")} == {*OVERLAYS, *PEERS, "paper"}


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml")))
@pytest.mark.parametrize("run", KINDS)
def test_every_strategy_composes_with_every_kind_of_run(run, strategy):
    before = plain(run)
    config = parse("--config", str(CONFIGS / run), "--config", str(CONFIGS / f"strategy/{strategy}.yaml"))
    assert config.trainer.strategy != before.trainer.strategy
    assert config.trainer.max_steps == before.trainer.max_steps
    assert config.model == before.model
