#!/usr/bin/env python3
"""One run, one meaning, on this machine's devices: the same run under every strategy and precision that it can do, and
once killed with kill -9 and resumed. Prints a table; --out also writes it, with the command, the device and versions.

tools/device_checks.py --out docs/results/device_checks.md
"""

import argparse
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from traces import scalars

from taperlit.checkpoint.reader import read_checkpoint

CONFIG = Path(__file__).parents[1] / "configs/pile_350m.yaml"
PARALLEL = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: %d, tensor_parallel_size: %d}}"  # noqa: E501
FSDP = "{class_path: lightning.pytorch.strategies.FSDPStrategy, init_args: {auto_wrap_policy: [taperlit.transformer.Block]}}"  # noqa: E501
SHAPE = "{vocab_size: 384, block_size: 128, n_layer: 4, n_head: 4, d_model: 128, d_ff: 384}"
BATCH = 8


def command(folder: Path, name: str, precision: str, options: list[str]) -> list[str]:
    """A ``taperlit fit`` of 50 steps through all phases."""
    return [
        sys.executable, "-W", "ignore", "-m", "taperlit", "fit", "--config", str(CONFIG), "--data.files",
        f"{folder}/corpus/*.py", "--model.overrides=null", "--model.overrides", SHAPE,
        "--model.compile=false", "--data.tokenizer=null",
        "--data.vocab_size=384", "--data.block_size=128", f"--data.batch_size={BATCH}", "--data.val_fraction=0.1",
        "--data.num_workers=0", f"--data.cache_dir={folder}/cache", "--trainer.max_steps=50",
        "--trainer.accumulate_grad_batches=1", f"--trainer.precision={precision}", "--trainer.val_check_interval=10",
        "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--taper.gate.warmup=10", "--taper.gate.end=25",
        f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={name}", *options,
    ]  # fmt: skip


def losses(folder: Path, name: str) -> list[float]:
    """The loss of each of its steps."""
    return [*dict(scalars(folder / name / "version_0")["train/loss"]).values()]


def ways(accelerator: str, devices: int) -> dict[str, list[str]]:
    """Options of every strategy that this machine can do."""
    on = [f"--trainer.accelerator={accelerator}"]
    many = [*on, f"--trainer.devices={devices}", f"--data.batch_size={BATCH // devices}"]
    found = {
        "accumulated, 4 micro-batches": [
            *on, "--trainer.devices=1", f"--data.batch_size={BATCH // 4}", "--trainer.accumulate_grad_batches=4",
            "--trainer.val_check_interval=40",
        ],
        "activation checkpointing": [*on, "--trainer.devices=1", "--model.activation_checkpointing=true"],
        "compiled": [*on, "--trainer.devices=1", "--model.compile=true"],
        f"ddp, {devices} processes": [*many, "--trainer.strategy=ddp"],
        f"fsdp2, {devices} processes": [*many, "--trainer.strategy", PARALLEL % (devices, 1)],
    }  # fmt: skip
    if accelerator == "cuda":
        found[f"fsdp, {devices} processes"] = [*many, "--trainer.strategy", FSDP]
    if devices > 1:
        tensor = [*many, f"--data.batch_size={BATCH}", "--trainer.strategy", PARALLEL % (1, devices)]
        found[f"tensor parallel, {devices} processes"] = tensor
    return found


def kill_and_resume(folder: Path, reference: str, options: list[str]) -> str:
    """Kill -9 after the first checkpoint, resume, and compare every weight and moment bit by bit."""
    args = command(folder, "killed", "32-true", options)
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = folder / "killed/version_0/checkpoints/last.ckpt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = read_checkpoint(last)["global_step"]
    subprocess.run([*args, "--ckpt_path", "last"], check=True, capture_output=True)
    mine, theirs = (
        read_checkpoint(folder / name / "version_0/checkpoints/last.ckpt") for name in (reference, "killed")
    )
    moments = [[v for s in c["optimizer_states"][0]["state"].values() for v in s.values()] for c in (mine, theirs)]
    pairs = zip([*mine["state_dict"].values(), *moments[0]], [*theirs["state_dict"].values(), *moments[1]], strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    return f"resumed from step {at}: {'bit-identical' if same else 'NOT the same'}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() if cuda else 2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    accelerator = "cuda" if cuda else "cpu"
    one = [f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    lines = [
        f"`{shlex.join(['tools/device_checks.py', *sys.argv[1:]])}`",
        "",
        f"{device}, Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}.",
        "Largest relative difference of a step's loss, over 50 steps through all phases, from the same precision on",
        "one device.",
        "",
        "| precision | way | largest difference |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "corpus").mkdir()
        for i in range(60):
            text = "\n".join(f"def function_{i}_{j}(x):\n    return x * {j} + {i * j % 17}\n" for j in range(60))
            (folder / f"corpus/{i:02}.py").write_text(text)
        for precision in ("32-true", "bf16-mixed", "bf16-true", *(["16-mixed"] if cuda else [])):
            subprocess.run(command(folder, precision, precision, one), check=True, capture_output=True)
            expected = losses(folder, precision)
            assert len(expected) == 50, json.dumps(expected)
            for number, (way, extra) in enumerate(ways(accelerator, options.devices).items()):
                name = f"{precision}-{number}"
                done = subprocess.run(command(folder, name, precision, extra), capture_output=True, text=True)
                if done.returncode:
                    result = "FAILED: " + (done.stderr.strip().splitlines() or ["no word"])[-1][:120]
                else:
                    pairs = zip(losses(folder, name), expected, strict=True)
                    result = f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}"
                lines.append(f"| {precision} | {way} | {result} |")
                print(lines[-1], flush=True)
        lines.append(f"| 32-true | killed with kill -9 | {kill_and_resume(folder, '32-true', one)} |")
    print("\n".join(["", *lines]))
    if options.out:
        options.out.write_text("# Device checks\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
