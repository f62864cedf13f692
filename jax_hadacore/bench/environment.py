"""What the numbers of a benchmark depend on."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

import jax_hadacore

from .. import _ffi


def environment(command: str) -> dict:
    """Versions, device, and the commit where the library or this folder is a checkout of it."""
    found = {
        **(_gpu() if jax.default_backend() == "gpu" else _cpu()),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "jax_hadacore": jax_hadacore.__version__,
        "python": platform.python_version(),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if commit := _commit():
        found["commit"] = commit
    return found


def _cpu() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "platform": "cpu",
        "device": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": _ffi.CPU.module.isa() if _ffi.CPU.module else "reference",
    }


def _gpu() -> dict:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return {
        "platform": "gpu",
        "device": jax.devices()[0].device_kind,
        "driver": driver[0] if driver else "unknown",
        "toolkit": _ffi.CUDA.module.toolkit if _ffi.CUDA.module else "reference",
    }


def _commit() -> str:
    for folder in (Path(__file__).parents[2], Path.cwd()):
        # Another project's repository may surround the installation, or be the current folder.
        if (folder / "jax_hadacore").is_dir() and (folder / ".git").exists():
            commit = _output("git", "-C", str(folder), "rev-parse", "--short", "HEAD")
            changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
            return commit + ("-changed" if commit and changed else "")
    return ""


def _output(*command: str) -> str:
    """What a program prints, or '' where it is absent or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
