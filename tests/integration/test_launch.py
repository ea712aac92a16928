"""The launch examples, on this machine: torchrun itself, and a stand-in for SLURM's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import fit_args

from taperlit.checkpoint.reader import open_checkpoint

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parents[2] / "tools"
SRUN = """#!/usr/bin/env bash
shift  # its own option
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_NTASKS=2 "$@" &
    pids+=($!)
    echo $! >"$OUT/task$rank"
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


def launch(tool, tmp_path, corpus, environment, *extra):
    args = fit_args(tmp_path, corpus, "--data.batch_size=2", "--trainer.strategy=ddp", *extra)[1:]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path), **environment}
    return subprocess.Popen(
        [str(TOOLS / tool), *args], env=environment, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_torchrun(tmp_path, corpus):
    process = launch("launch_torchrun.sh", tmp_path, corpus, {"NPROC": "2", "PORT": "0"}, "--trainer.max_steps=30")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert open_checkpoint(tmp_path / "run/version_0/checkpoints/last.ckpt")["global_step"] == 30


def test_slurm_requeues_a_job_that_was_told_to_stop(tmp_path, corpus):
    for name, text in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "$@" >"$OUT/requeued"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2",
           "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost"}  # fmt: skip
    long = ("--trainer.max_steps=100000", "--taper.fold=null")
    process = launch("launch_slurm.sh", tmp_path, corpus, job, *long)
    last = tmp_path / "run/version_0/checkpoints/last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"task{rank}").read_text()), signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert output.count("go on with --ckpt_path last") == 2
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert open_checkpoint(last)["global_step"] >= 5
