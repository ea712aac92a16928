"""Every peer's overlay through the command line: trained, and folded or refused by name."""

import pytest
import torch
import yaml
from integration.small import CONFIGS, error_of, fit

from taperlit.baselines import Derf, DyT
from taperlit.checkpoint.folded import load_checkpoint, load_model
from taperlit.cli import main
from taperlit.norm import shared_gate


@pytest.mark.slow
def test_every_peer_trains_end_to_end(tmp_path, corpus, capsys):
    for peer in ("fakeln", "dyt", "derf"):
        overlay = ("--config", str(CONFIGS / f"taper/{peer}.yaml"))
        folder = fit(tmp_path / peer, f"{corpus}/*.py", *overlay)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["taper"] == peer
        last = folder / "checkpoints/last.ckpt"
        tokens = torch.arange(32)[None]
        if peer == "fakeln":
            trained = load_checkpoint(last).model
            assert shared_gate(trained).value == 0
            assert main(["fold", "--ckpt", str(last), "--out", str(tmp_path / "folded")]) == 0
            for folded in (tmp_path / "folded", folder / "folded"):
                model = load_model(folded).model
                torch.testing.assert_close(model(tokens), trained(tokens), rtol=1e-4, atol=1e-4)
        else:
            trained = load_checkpoint(last).model
            assert sum(isinstance(module, DyT | Derf) for module in trained.modules()) == 5
            assert trained.final_norm.alpha.item() != trained.final_norm.alpha_init  # it was trained
            assert not (folder / "folded").exists()
            layer, function = {"dyt": ("DyT", "tanh"), "derf": ("Derf", "erf")}[peer]
            line = error_of(capsys, "fold", "--ckpt", str(last))
            assert f"is a {layer}, whose {function} stays at inference" in line
            assert f"is a {layer}" in error_of(capsys, "generate", "--model", str(last), "--prompt", "the")
