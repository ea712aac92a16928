"""A small run of 20 steps in this process: warm-up to 5, taper to 10, validation every 10."""

import re
from pathlib import Path

from taperlit.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--model.overrides=null",  # nothing of the config's shape
    "--model.overrides", "{vocab_size: 300, block_size: 32, n_layer: 2, n_head: 2, d_model: 32, d_ff: 64}",
    "--model.compile=false", "--data.tokenizer=null", "--data.vocab_size=300", "--data.block_size=32",
    "--data.batch_size=4", "--data.val_fraction=0.05", "--data.num_workers=0",
    "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=1", "--trainer.precision=32-true",
    "--trainer.accelerator=cpu", "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=1",
    "--trainer.enable_model_summary=false", "--taper.gate.warmup=5", "--taper.gate.end=10",
    "--taper.monitor.every=1",
]  # fmt: skip


def fit_command(folder: Path, text: str, *extra: str, config: str = "pile_350m.yaml") -> list[str]:
    """The arguments of the run; its versions are in ``folder/runs/run``."""
    args = ["fit", "--config", str(CONFIGS / config), "--data.files", text, *SMALL]
    return [*args, f"--trainer.logger.save_dir={folder}/runs", "--trainer.logger.name=run", *extra]


def versions(folder: Path) -> list[Path]:
    """The folders of its runs, oldest first."""
    return sorted((folder / "runs/run").iterdir(), key=lambda path: int(path.name.split("_")[1]))


def fit(folder: Path, text: str, *extra: str, config: str = "pile_350m.yaml") -> Path:
    """Run it to its end; the newest folder."""
    assert main(fit_command(folder, text, *extra, config=config)) == 0
    return versions(folder)[-1]


def error_of(capsys, *args: str, status: int = 1) -> str:
    """The one line that a command ends in."""
    capsys.readouterr()
    try:
        code = main(list(args))
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == status, err
    lines = re.findall("taperlit: error: .*", err)  # a progress bar may stand before it
    assert len(lines) == 1, err
    return lines[0]
