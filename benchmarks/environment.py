"""What the numbers of a benchmark depend on."""

import platform
import subprocess
import sys

import jax
import jaxlib

import jax_hadacore


def environment() -> dict:
    """Versions, device and command."""
    device = jax.devices()[0]
    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax_hadacore": jax_hadacore.__version__,
        "python": platform.python_version(),
        "device": device.device_kind,
        "command": " ".join(["python", *(a for a in sys.argv if not a.startswith("/"))]),
    }
    if device.platform == "gpu":
        from jax_hadacore import _cuda  # noqa: PLC0415  only where there is a GPU

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
        versions["toolkit"] = _cuda.toolkit
    return versions
