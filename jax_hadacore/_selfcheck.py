"""The command line's main job: checks the transform on this machine, and times it."""

import importlib.util
import os
import platform
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import __version__, _ffi
from ._measure import definition, error_bound, error_in_roundings, rotate, sign_matrix
from ._table import plural, table
from ._transform import hadamard

_WIDTH = 100
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_LENGTHS = (128, 1024, 4096)
_CHECKED = 1 << 18  # values compared with the definition
_TIMED_CPU = 1 << 20  # values in a timed call
_TIMED_OTHER = 1 << 26  # an accelerator's work must outlast its launch


@dataclass(frozen=True)
class Check:
    """One line of the check: errors in roundings, times in seconds."""

    dtype: np.dtype
    n: int
    errors: tuple[float, float, float]
    bound: float
    time: float
    dense_time: float

    @property
    def passed(self) -> bool:
        """Whether every error is within the bound."""
        return max(self.errors) <= self.bound


def run() -> int:
    """Prints the report; returns the exit status, 0 if every check passed."""
    _print_installation()
    passed = [*_print_checks(), _print_outliers()]
    if not all(passed):
        print(f"\nFAILED: in {passed.count(False)} of {len(passed)} checks the error exceeds what is allowed.")
        return 1
    print("\nAll checks passed.")
    return 0


def _print_installation() -> None:
    device = jax.devices()[0]
    kind = "" if device.device_kind == device.platform else f", {device.device_kind}"
    print(
        f"jax_hadacore {__version__}, jax {jax.__version__}, jaxlib {version('jaxlib')}, "
        f"Python {platform.python_version()}\n"
        f"Default device: {device.platform}{kind} ({plural(len(jax.devices()), 'device')})\n"
        "\nImplementations"
    )
    for name, implementation in _implementations():
        line = f"  {name:8}{implementation}"
        print(textwrap.fill(line, width=_WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False))
    if hidden := _hidden_gpu():
        print(f"\n{hidden}")


def _print_checks() -> list[bool]:
    """Prints the comparison with the definition; returns which lines passed."""
    timed = _TIMED_CPU if jax.default_backend() == "cpu" else _TIMED_OTHER
    print(
        "\nCheck against the definition (-1)**popcount(i & j), computed in float64\n"
        "  jit, vmap, grad: rms error of normally distributed values, in units of rounding the exact\n"
        "  result once. hadamard, x @ H: median time of a jitted call on "
        f"{timed:,} values; x @ H is XLA's\n  product with the dense matrix in the same dtype.\n",
        flush=True,  # what follows takes seconds
    )
    checks = [_check(np.dtype(dtype), n, timed) for dtype in _DTYPES for n in _LENGTHS]
    rows = [("dtype", "n", "jit", "vmap", "grad", "allowed", "", "hadamard", "x @ H", "faster by")]
    rows += [
        (
            check.dtype.name,
            str(check.n),
            *(f"{error:.3f}" for error in check.errors),
            f"{check.bound:.3f}",
            "ok" if check.passed else "FAIL",
            f"{check.time * 1e3:.3f} ms",
            f"{check.dense_time * 1e3:.3f} ms",
            f"{check.dense_time / check.time:.1f}x",
        )
        for check in checks
    ]
    print(table(rows, align="<>>>>><>>>"))
    return [check.passed for check in checks]


def _print_outliers() -> bool:
    """Prints what the transform does to a sample with outliers; returns whether it agrees with the definition."""
    sample = rotate(_activations())
    print(
        "\nOutliers, on a synthetic sample: 512 tokens of 4096 channels, 8 of them 10 to 40 times larger\n"
        "  peak/rms: max|x| / rms(x) of a token, mean over the tokens.\n"
        "  int4 error: relative rms error of rounding to int4, one scale max|x| / 7 for each token.\n\n"
        + table(
            [
                ("", "peak/rms", "int4 error"),
                ("before", f"{sample.before.peak:.1f}", f"{sample.before.int4:.1%}"),
                ("after", f"{sample.after.peak:.1f}", f"{sample.after.int4:.1%}"),
            ],
            align="<>>",
        )
        + "\n\n  jax-hadacore FILE shows the same of your own weights or activations."
    )
    return sample.verified


def _implementations() -> Iterator[tuple[str, str]]:
    """For each platform, what serves it."""
    reference = "plain-JAX reference"
    if _ffi.CPU.module is None:
        yield "cpu", f"{reference}: {_ffi.CPU.problem}"
    else:
        yield "cpu", f"native kernel, {_ffi.CPU.module.isa()}"
    if _ffi.CUDA.module is None:
        yield "cuda", f"{reference}: {_ffi.CUDA.problem}"
    else:
        major, minor = divmod(_ffi.CUDA.module.toolkit // 10, 100)
        reason = _ffi.problem("cuda")
        yield "cuda", f"native kernel, built with CUDA {major}.{minor}{reason and f'; not in use: {reason}'}"
    yield "others", reference


def _hidden_gpu() -> str:
    """What to do where this machine seems to have an NVIDIA GPU and JAX does not see it, or ''."""
    if _ffi.has_nvidia_gpu() or not _nvidia_traces():
        return ""
    found = "This machine seems to have an NVIDIA GPU, but JAX does not see it:"
    if setting := os.environ.get("JAX_PLATFORMS"):
        return f"{found} JAX_PLATFORMS is set to {setting}."
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return f"{found} its CUDA plugin is installed, so check\nthe driver (nvidia-smi) and CUDA_VISIBLE_DEVICES."
    return (
        f"{found} its CUDA plugin is missing.\n"
        "  pip install 'jax_hadacore[cuda13]'    (from a checkout: pip install '.[cuda13]')"
    )


def _nvidia_traces() -> bool:
    return (
        any(Path("/proc/driver/nvidia/gpus").glob("*"))
        or any(Path("/dev").glob("nvidia[0-9]*"))
        or shutil.which("nvidia-smi") is not None
    )


def _check(dtype: np.dtype, n: int, timed: int) -> Check:
    generator = np.random.default_rng(n)
    x, g = generator.standard_normal((2, _CHECKED // n, n)).astype(dtype)
    transform = jax.jit(hadamard)
    mapped = jax.jit(jax.vmap(hadamard, in_axes=1, out_axes=1))
    gradient = jax.jit(jax.grad(lambda x, g: jnp.vdot(hadamard(x), g)))
    exact = definition(x)
    errors = (
        error_in_roundings(np.asarray(transform(x)), exact),
        error_in_roundings(np.asarray(mapped(x.T)).T, exact),
        # The transform is its own adjoint: the gradient of <H x, g> is H g.
        error_in_roundings(np.asarray(gradient(x, g)), definition(g)),
    )
    dense = jnp.asarray((sign_matrix(n) * n**-0.5).astype(dtype))
    batch = jnp.resize(jnp.asarray(x), (timed // n, n))
    return Check(
        dtype,
        n,
        errors,
        error_bound(dtype, n),
        _median_time(transform, batch),
        _median_time(jax.jit(jnp.matmul), batch, dense),
    )


def _median_time(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    function(*arguments).block_until_ready()  # compiles
    times = []
    while len(times) < 5 or (len(times) < 25 and sum(times) < 0.1):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _activations() -> np.ndarray:
    """Heavy-tailed rows like a transformer's activations: a few channels carry most of the magnitude."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((512, 4096))
    x[:, generator.choice(4096, 8, replace=False)] *= generator.uniform(10, 40, 8)
    return x.astype(jnp.bfloat16)
