"""A model that no memory holds is refused before any of it is allocated."""

from pathlib import Path

import pytest
import torch

from taperlit import LanguageModel
from taperlit.checkpoint import sizes
from taperlit.checkpoint.sizes import check_memory, count_parameters
from taperlit.cli import main
from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer, TransformerConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = dict(vocab_size=300, block_size=32, n_layer=3, n_head=4, d_model=32, d_ff=64)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "tied": True},
        {"n_kv_head": 2, "qkv_bias": True},
        {"bias": True, "qkv_bias": False, "d_head": 16, "mlp": "glu", "n_kv_head": 1},
        {"mlp": "relu", "n_layer": 1, "d_ff": None},
    ],
)
def test_as_many_parameters_as_the_model_has(changes):
    config = TransformerConfig(**{**SMALL, **changes})
    assert count_parameters(config) == Transformer(config).num_parameters()


def test_the_memory_is_that_of_the_place_and_the_bytes_those_of_the_dtype(monkeypatch):
    config = TransformerConfig(**SMALL)
    count = Transformer(config).num_parameters()
    monkeypatch.setattr(sizes, "machine_memory", lambda: 4 * count)
    check_memory(config)
    monkeypatch.setattr(sizes, "machine_memory", lambda: 4 * count - 1)
    with pytest.raises(TaperlitError, match=rf"of {count:,} parameters .* d_model 32, .* GB in float32, and this"):
        check_memory(config)
    with torch.device("meta"):
        check_memory(config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        check_memory(config)
    finally:
        torch.set_default_dtype(torch.float32)


def test_building_it_is_refused_and_measuring_it_is_not():
    module = LanguageModel("small_1m", overrides={**SMALL, "d_model": 200_000})
    with pytest.raises(TaperlitError, match=r"takes [\d,]+\.\d GB in float32, and this machine has"):
        module.configure_model()
    assert module.flops_per_token(32) > 0  # on the meta device


def test_the_command_line_refuses_it_before_anything_is_written(tmp_path, capsys):
    args = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--model.overrides.d_model=200000"]
    assert main([*args, f"--trainer.logger.save_dir={tmp_path}/runs"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("taperlit: error: A model of 641,")
    assert line.endswith("; choose a smaller preset, or lower model.overrides.")
    assert list(tmp_path.iterdir()) == []  # the cache of tokens would be here too
