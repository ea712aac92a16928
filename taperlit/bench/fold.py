"""``taperlit bench fold``: seconds and peak memory of ``taperlit fold`` on a checkpoint of a preset."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from taperlit.bench.machine import resident_bytes
from taperlit.bench.models import random_model, tapered
from taperlit.bench.results import Row
from taperlit.bench.turns import spread
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.errors import TaperlitError
from taperlit.training.policy import Policy
from taperlit.transformer import TransformerConfig

COLUMNS = {
    "variant": "variant",
    "preset": "preset",
    "taper": "taper",
    "seconds": "seconds",
    "seconds_low": "fastest",
    "seconds_high": "slowest",
    "peak_gb": "peak GB",
    "weights_gb": "weights GB",
    "peak_ratio": "peak/weights",
}
SAMPLE = (4, 513)  # blocks of validation text, as a run keeps

# In a process of its own: what folding is given anew is all that its peak holds above what was imported.
MEASURED = """
import sys, time
import taperlit.checkpoint.folded, taperlit.folding, taperlit.stress.probe
from taperlit.bench.machine import resident_bytes
from taperlit.cli.fold import fold_checkpoint
before = resident_bytes()
start = time.perf_counter()
fold_checkpoint(*sys.argv[1:])
seconds = time.perf_counter() - start
print("measured", seconds, resident_bytes("VmHWM") - before)
"""
WRITTEN = """
import sys
from pathlib import Path
from taperlit.bench.fold import write_checkpoint
print(write_checkpoint(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
"""


def write_checkpoint(preset: str, taper: Policy, path: Path) -> int:
    """Write a checkpoint of random weights whose gate is 0, with AdamW's moments, as a run leaves it.

    Args:
        preset: of the model.
        taper: which norms are tapered.
        path: of the file.

    Returns:
        The bytes of the model's weights.
    """
    model = tapered(random_model(TransformerConfig.from_preset(preset)), taper)
    moments = {
        name: {"exp_avg": p.detach() * 0.1, "exp_avg_sq": p.detach() ** 2} for name, p in model.named_parameters()
    }
    generator = torch.Generator().manual_seed(0)
    blocks = (SAMPLE[0], min(SAMPLE[1], model.config.block_size + 1))
    content = {
        "hyper_parameters": {"preset": preset, "taper": taper},
        "taperlit": {"format": CHECKPOINT_FORMAT},
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "optimizer_states": [{"state": moments, "param_groups": [{"params": list(moments)}]}],
        "TextDataModule": {"sample": torch.randint(model.config.vocab_size, blocks, generator=generator).int()},
    }
    torch.save(content, path)
    return sum(parameter.nbytes for parameter in model.parameters())


def fold_rows(preset: str, taper: Policy, rounds: int) -> Iterator[Row]:
    """Fold a checkpoint of random weights some times, each in a process of its own.

    The checkpoint and the folded model lie in the folder for temporary files, and are deleted.

    Args:
        preset: of the model.
        taper: which norms are tapered.
        rounds: times that it is folded.

    Yields:
        One row.

    Raises:
        TaperlitError: as ``taperlit fold``, or there is no ``/proc`` to read memory from.
    """
    resident_bytes()  # refuses where it cannot be read
    with TemporaryDirectory(prefix="taperlit-bench-") as folder:
        checkpoint = Path(folder) / "last.ckpt"
        # In another process, which gives its memory back.
        (weights,) = _python(WRITTEN, preset, taper, str(checkpoint))
        times, peaks = [], []
        for turn in range(rounds):
            seconds, peak = _python(MEASURED, str(checkpoint), str(Path(folder) / f"folded-{turn}"))
            times.append(seconds)
            peaks.append(peak)
    time, peak = spread(times), max(peaks)
    yield {
        "preset": preset,
        "taper": taper,
        "dtype": "float32",
        "variant": "fold",
        "rounds": rounds,
        "seconds": time.median,
        "seconds_low": time.low,
        "seconds_high": time.high,
        "peak_gb": peak / 1e9,
        "weights_gb": weights / 1e9,
        "peak_ratio": peak / weights,
    }


def _python(program: str, *args: Any) -> list[float]:
    """Run a program and return the numbers in its last line."""
    run = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"status {run.returncode}"
        raise TaperlitError(f"the process that was measured failed: {reason[:300]}")
    return [float(word) for word in run.stdout.strip().splitlines()[-1].split() if word != "measured"]
