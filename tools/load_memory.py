#!/usr/bin/env python3
"""Peak memory of loading a model of 350M parameters, relative to its weights; each load in a process of its own.

tools/load_memory.py --out docs/results/load_memory.md
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch.distributed.checkpoint import save

from taperlit import Transformer, TransformerConfig, fold, write_folded
from taperlit.checkpoint.reader import CHECKPOINT_FORMAT
from taperlit.checkpoint.sharded import DIGEST, META, digest
from taperlit.norm import shared_gate
from taperlit.training.policy import apply_policy

LOAD = """
import sys, time
from taperlit import load_model
def memory(key):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])
now = memory("VmRSS")
start = time.perf_counter()
model = load_model(sys.argv[1]).model
seconds = time.perf_counter() - start
peak = memory("VmHWM")  # of this process; getrusage's would be its parent's where that is larger
weights = sum(parameter.nbytes for parameter in model.parameters())
print(weights, peak - now, seconds)
"""


def write(folder: Path, preset: str) -> Iterator[tuple[str, Path]]:
    """Write random weights in each form that a model is loaded from, one at a time; the next takes its place."""
    model = Transformer(TransformerConfig.from_preset(preset))
    apply_policy(model, "internal")
    content = {"hyper_parameters": {"preset": preset, "taper": "internal"}, "taperlit": {"format": CHECKPOINT_FORMAT}}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    moments = {name: {"exp_avg": p.detach(), "exp_avg_sq": p.detach() + 1} for name, p in model.named_parameters()}
    optimizer = {"state": moments, "param_groups": [{"params": list(moments)}]}

    path = folder / "float32.ckpt"
    torch.save(content | {"state_dict": state, "optimizer_states": [optimizer]}, path)
    yield "checkpoint with AdamW's moments, float32", path
    path.unlink()

    half = {name: value.bfloat16() if value.ndim > 1 else value for name, value in state.items()}
    half["model.head.weight"] = half["model.tok_embed.weight"]
    path = folder / "bfloat16.ckpt"
    torch.save(content | {"state_dict": half}, path)
    yield "checkpoint, its matrices in bfloat16", path
    path.unlink()
    del half

    path = folder / "sharded.ckpt"
    save({"state_dict": state, "optimizer_0": optimizer}, checkpoint_id=path)
    torch.save(content, path / META)
    (path / DIGEST).write_text(digest(path))
    yield "sharded checkpoint with AdamW's moments, float32", path
    del state, moments, optimizer

    shared_gate(model).set(0.0)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    structure = fold(model.eval(), lambda: model(tokens))
    yield "folded model, float32", write_folded(folder / "folded", model, structure)


def main() -> None:
    """Print a table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_350m")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("load_memory.py: the memory after the imports is read from /proc, which only Linux has.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    lines = [
        f"| {args.preset} from | weights (GB) | peak above the imports (GB) | peak / weights | seconds |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for form, path in write(Path(folder), args.preset):
            load = [sys.executable, "-c", LOAD, str(path)]
            weights, peak, seconds = map(float, subprocess.check_output(load, text=True).split())
            line = f"| {form} | {weights / 1e9:.2f} | {peak / 1e9:.2f} | {peak / weights:.2f} | {seconds:.1f} |"
            lines.append(line)
            print(line, flush=True)
    lines += [
        "",
        f"`tools/load_memory.py --preset {args.preset}`  ",
        f"on Python {platform.python_version()}, torch {torch.__version__}, safetensors {safetensors.__version__}, "
        f"{platform.system()}, {os.cpu_count()} CPU cores; the files in the page cache.",
    ]
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
