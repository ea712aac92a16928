"""What a measurement was made with: versions, device, commit, command, and how fast the memory is read."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import taperlit
from taperlit.errors import TaperlitError

PACKAGES = ("taperlit", "torch", "transformers", "onnxruntime", "lightning")
# Far more than a last-level cache holds; what of it is in one is read faster than memory.
READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}
READS = 5


def about(command: str, device: torch.device) -> dict[str, Any]:
    """What a measurement was made with, as plain data.

    Args:
        command: the command line.
        device: that was measured.

    Returns:
        ``versions`` (None where a package is not installed), ``device``, ``commit`` and ``command``.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__  # with what it was built for
    return {
        "versions": versions,
        "device": name_of(device),
        "commit": commit(),
        "command": command,
    }


def command_line(name: str, args: list[str]) -> str:
    """A command as it would be typed."""
    return shlex.join(["taperlit", *name.split(), *args])


def pick_device(name: str) -> torch.device:
    """The device of a name, or for ``auto`` a GPU if there is one.

    Raises:
        TaperlitError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise TaperlitError(f"No device {name!r} here ({reason}); give --device auto, cpu or cuda.") from error
    if device.type not in READ_BYTES:
        raise TaperlitError(f"bench measures on cpu and cuda, not on {device.type}.")
    return device


def name_of(device: torch.device) -> str:
    """The model of a device, and of a CPU how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found = platform.processor() or platform.machine()
    return f"{found}, {os.cpu_count()} CPU cores, torch.get_num_threads() {torch.get_num_threads()}"


def commit() -> str:
    """The commit of the checkout that is running, marked where it was changed; or the version that is installed."""
    folder = Path(taperlit.__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # it may lie in somebody else's repository, untracked
        return git("rev-parse", "HEAD") + ("-changed" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"taperlit {taperlit.__version__}"


def read_bandwidth(device: torch.device) -> float:
    """How fast all threads together read memory, in GB/s: the best of several reductions over a large buffer."""
    buffer = torch.ones(READ_BYTES[device.type] // 4, device=device)
    whole = buffer.view(torch.int64)
    best = float("inf")
    for work in (whole.max, lambda: torch.dot(buffer, buffer)):
        for turn in range(-1, READS):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best / 1e9


def resident_bytes(key: str = "VmRSS") -> int:
    """Bytes of this process's memory by the name that Linux has for them: ``VmRSS`` now, ``VmHWM`` at most so far.

    Raises:
        TaperlitError: the system has no ``/proc``.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise TaperlitError(f"{sys.platform} has no /proc, from which memory is read; measure on Linux.") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
