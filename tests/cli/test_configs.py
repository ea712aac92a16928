import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from taperlit.cli.train import TaperlitCLI, build_cli
from taperlit.norm import tapered_norms
from taperlit.training.module import LanguageModel

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SIZES = {"1m": 1e6, "3m": 3e6, "9m": 9e6, "30m": 30e6, "124m": 124e6, "350m": 350e6}
OVERLAYS = {"baseline": "none", "internal": "internal", "internal_aux": "internal", "all": "all", "all_aux": "all"}


def parse(*args):
    """What the command line makes of its arguments, before anything is built."""
    nothing = {"instantiate_classes": lambda self: None, "_run_subcommand": lambda self, name: None}
    with mock.patch.object(sys, "argv", ["taperlit", "fit", *args]), mock.patch.multiple(TaperlitCLI, **nothing):
        return build_cli().config.fit


@pytest.mark.parametrize("run", RUNS)
def test_every_run_builds_with_the_size_in_its_name(run):
    config = parse("--config", str(CONFIGS / run))
    with torch.device("meta"):
        module = LanguageModel(**{k: v for k, v in config.model.as_dict().items() if k != "compile"})
        module.configure_model()
    size = SIZES.get(run.removesuffix(".yaml").split("_")[1 if "gpt2" in run else -1])
    if size is not None:
        assert module.model.num_parameters() == pytest.approx(size, rel=0.08)
    assert module.config.block_size >= config.data.block_size
    assert len(tapered_norms(module)) == 2 * module.config.n_layer
    assert [slot for slot, callback in vars(config.taper).items() if callback] == [
        "gate", "alignment", "anchor", "fold", "monitor", "guard",
    ]  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("run", RUNS)
def test_every_overlay_composes_with_every_run(run, overlay):
    before = parse("--config", str(CONFIGS / run))
    config = parse("--config", str(CONFIGS / run), "--config", str(CONFIGS / f"taper/{overlay}.yaml"))
    assert config.model.taper == OVERLAYS[overlay]
    assert (config.taper.gate is None) == (overlay == "baseline")
    assert (config.taper.anchor is not None) == overlay.endswith("_aux")
    if overlay != "baseline":
        assert config.taper.gate == before.taper.gate  # an overlay chooses what, the run says when
    config.model.taper = before.model.taper
    assert {**config.model.as_dict(), "taper": 0} == {**before.model.as_dict(), "taper": 0}
    assert config.data.as_dict() == before.data.as_dict()


def test_no_overlay_is_forgotten():
    assert {path.stem for path in (CONFIGS / "taper").glob("*.yaml")} == set(OVERLAYS)


@pytest.mark.parametrize("strategy", sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml")))
@pytest.mark.parametrize("run", RUNS)
def test_every_strategy_composes_with_every_run(run, strategy):
    before = parse("--config", str(CONFIGS / run))
    config = parse("--config", str(CONFIGS / run), "--config", str(CONFIGS / f"strategy/{strategy}.yaml"))
    assert config.trainer.strategy != before.trainer.strategy
    assert config.trainer.max_steps == before.trainer.max_steps
    assert config.model == before.model
