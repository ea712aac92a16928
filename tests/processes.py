"""Runs of the command line in processes of their own, forked from one that has imported everything already."""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIGS = Path(__file__).parents[1] / "configs"
PRELOADED = "taperlit.cli.train"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([PRELOADED])  # it is one for all that this process forks so

FSDP2 = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}"  # noqa: E501
TENSOR = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: 1, tensor_parallel_size: 2}}"  # noqa: E501


def fit_args(folder, corpus, *extra: str, name: str = "run") -> list[str]:
    """A small run of 24 steps through all phases: warm-up to 8, taper to 16; validation, and a checkpoint, every 4."""
    return [
        "fit", "--config", str(CONFIGS / "pile_350m.yaml"), "--data.files", f"{corpus}/*.py",
        "--model.overrides=null",  # nothing of the config's shape
        "--model.overrides", "{vocab_size: 300, block_size: 32, n_layer: 2, n_head: 2, d_model: 32, d_ff: 64}",
        "--model.compile=false", "--data.tokenizer=null", "--data.vocab_size=300", "--data.block_size=32",
        "--data.batch_size=4", "--data.val_fraction=0.03", "--data.num_workers=0", "--trainer.max_steps=24",
        "--trainer.accumulate_grad_batches=1", "--trainer.precision=32-true", "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false", "--taper.gate.warmup=8", "--taper.gate.end=16",
        "--taper.monitor.every=1", f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={name}", *extra,
    ]  # fmt: skip


def _child(args: list[str], rank: int, environment: dict[str, str], log: str, setup: Callable | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    assert PRELOADED in sys.modules, "something else has set what is imported before a fork: every run imports all"
    os.environ.update(environment)
    gc.freeze()  # as conftest.py
    torch.set_num_threads(1)
    if setup is not None:
        setup(rank)
    from taperlit.cli import main

    status = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as good as the interpreter's own end, and no pytest of the parent's runs in it


class Forked(DDPStrategy):
    """DDP on processes that are forked as a :class:`Run`'s are: Lightning's "ddp_spawn" has each import everything.

    Nor do they end with C++'s static destructors. With torch 2.13 these abort one in ten processes that end after DDP
    over gloo ("terminate called without an active exception"), when all that counts is done.
    """

    def __init__(self, **options) -> None:
        super().__init__(start_method="forkserver", **options)

    def setup_environment(self) -> None:
        """Copy the weights, which the processes would share: they came to each through shared memory."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.data.clone()
        super().setup_environment()


def join_two(worker: Callable, *args) -> None:
    """Call ``worker(rank, *args)`` in two such processes, and raise what one of them raises."""
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method="forkserver")


def on_two(**options) -> dict:
    """A trainer's options for two processes, which deal out the batches themselves."""
    return {"devices": 2, "strategy": Forked(**options), "use_distributed_sampler": False}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trace_only(rank: int) -> None:
    """Let torch.compile trace and differentiate, but write no code, which takes most of its time."""
    compile = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **options: compile(module, **{**options, "backend": "aot_eager"})


class Run:
    """One run of ``taperlit``, on one or more processes that torchrun's variables join."""

    def __init__(self, args: Sequence[str], folder, ranks: int = 1, setup: Callable | None = None) -> None:
        self.log = Path(folder) / f"{os.urandom(4).hex()}.log"
        port = str(_free_port())
        self.processes = []
        for rank in range(ranks):
            environment = {"TAPERLIT_CACHE": os.environ["TAPERLIT_CACHE"], "PYTHONWARNINGS": "ignore"}
            if ranks > 1:
                environment |= {
                    "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                    "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }  # fmt: skip
            child = (list(args), rank, environment, str(self.log), setup)
            self.processes.append(CONTEXT.Process(target=_child, args=child, daemon=True))
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """The exit statuses, by rank; killed ones as minus the signal's number."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Kill -9 those that are left."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it may end just now
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
        self.wait()

    def succeed(self) -> None:
        """Wait, and show the log if any failed."""
        statuses = self.wait()
        assert not any(statuses), f"{statuses}\n{self.log.read_text()[-6000:]}"

    def errors(self) -> list[str]:
        """The lines that tell an error."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("taperlit: error:")]


def scalars(run) -> dict[str, list[tuple[int, float]]]:
    """What a run logged, by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def differences(a, b, path=""):
    """Where two trees of plain data and tensors differ, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [f"{path}: {a} and {b}"]
