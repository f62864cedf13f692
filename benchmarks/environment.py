"""What the numbers of a benchmark depend on."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib

import jax_hadacore
from jax_hadacore import _ffi


def environment() -> dict:
    """Versions, device and command."""
    return {
        **(_gpu() if jax.default_backend() == "gpu" else _cpu()),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax_hadacore": jax_hadacore.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def _cpu() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": name or platform.processor(),
        "cores": os.cpu_count(),
        "kernel": _ffi.CPU.module.isa() if _ffi.CPU.module else "reference",
    }


def _gpu() -> dict:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": jax.devices()[0].device_kind,
        "driver": subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0],
        "toolkit": _ffi.CUDA.module.toolkit if _ffi.CUDA.module else "reference",
    }
