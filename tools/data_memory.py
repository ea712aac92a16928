#!/usr/bin/env python3
"""Peak memory of preparing text, by its size: each size is read, tokenized, packed and opened in a process of its own.

tools/data_memory.py --megabytes 50 1000
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import zstandard

from taperlit.data.sources import python_files

PREPARE = """
import sys, torch
from taperlit.data import TextDataModule
data = TextDataModule(files=sys.argv[1], vocab_size=4096, cache_dir=sys.argv[2], val_fraction=0.01)
data.prepare_data()
data.setup("fit")
for count, batch in zip(range(200), data.train_dataloader()):
    pass
print(sum(data._meta["tokens"].values()))
"""


def write_shards(folder: Path, megabytes: int) -> None:
    """Documents in the Pile's format, 100 MB of text a shard: Python files, their lines shuffled, never twice alike."""
    rng = random.Random(0)
    files = python_files()
    written = shard = 0
    while written < megabytes * 1_000_000:
        goal = min(written + 100_000_000, megabytes * 1_000_000)
        with zstandard.open(folder / f"{shard:03}.jsonl.zst", "wt") as out:
            while written < goal:
                lines = Path(rng.choice(files)).read_text(errors="replace").splitlines()
                rng.shuffle(lines)
                text = "\n".join(lines)
                written += len(text.encode())
                out.write(json.dumps({"text": text, "meta": {"pile_set_name": "Github"}}) + "\n")
        shard += 1


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[50, 1000])
    args = parser.parse_args()
    print("| text (MB) | tokens | seconds | peak memory (MB) |\n|---|---|---|---|")
    peak = 0
    for megabytes in sorted(args.megabytes):  # the peak of all children so far: sizes must grow
        with tempfile.TemporaryDirectory() as directory:
            write_shards(Path(directory), megabytes)
            command = [sys.executable, "-c", PREPARE, f"{directory}/*.jsonl.zst", f"{directory}/cache"]
            start = time.perf_counter()
            tokens = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
            seconds = time.perf_counter() - start
        peak = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        print(f"| {megabytes} | {tokens} | {seconds:.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
