"""Times the CUDA kernels against copies of the same bytes, in one process, by replayed graphs.

    python benchmarks/kernels.py [--out FILE.json] [--quick]

Cold: launches take buffers in turn that together exceed the L2 cache several times. Warm: the same buffers every time.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_hadacore
from jax_hadacore import _cuda
from jax_hadacore._measure import definition, error_in_roundings

COLD_BYTES = 1 << 30  # of operands and results together
# elements -> (launches in a graph, replays)
SIZES = {
    1 << 28: (4, 12),
    1 << 25: (16, 15),
    1 << 23: (48, 15),
    1 << 21: (200, 15),
    1 << 15: (500, 9),
    1 << 12: (500, 9),
}
WARM = {1 << 21, 1 << 15, 1 << 12}


def measure(dtype, n: int, elements: int, x: jax.Array, y: jax.Array) -> dict | None:
    """Medians in microseconds, the ratio of the better copy to the transform, and the error of the last row."""
    if elements < n:
        return None
    size = elements * np.dtype(dtype).itemsize
    sets = 1 if elements in WARM else max(1, min(COLD_BYTES // (2 * size), x.nbytes // size))
    launches, replays = SIZES[elements]
    problem = _cuda.Problem(getattr(_cuda.Dtype, np.dtype(dtype).name), n, elements // n, n**-0.5)
    times = _cuda.measure(problem, x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer(), 0, sets, launches, replays)
    micros = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    _cuda.transform(problem, x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())
    rows = max(1, 65536 // n)
    sample = slice(max(0, elements - rows * n), elements)
    exact = definition(np.asarray(x[sample]).reshape(-1, n))
    error = error_in_roundings(np.asarray(y[sample]).reshape(-1, n), exact)
    ratio = min(micros["copy kernel"], micros["cudaMemcpyAsync"]) / micros["transform"]
    return {
        "dtype": np.dtype(dtype).name,
        "n": n,
        "elements": elements,
        "sets": sets,
        **micros,
        "ratio": ratio,
        "error": error,
    }


def environment() -> dict:
    """What the numbers depend on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    return {
        "gpu": gpu,
        "driver": driver,
        "toolkit": _cuda.toolkit,
        "jax": jax.__version__,
        "jax_hadacore": jax_hadacore.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Prints a table of ratios for each dtype and stores everything measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="bfloat16 and float32, fewer lengths")
    arguments = parser.parse_args()
    dtypes = [jnp.bfloat16, jnp.float32] if arguments.quick else [jnp.bfloat16, jnp.float16, jnp.float32]
    bits = [1, 3, *range(4, 16)]
    results = []
    for dtype in dtypes:
        most = 1 << 28
        x = jax.random.normal(jax.random.key(0), (most,), dtype)
        y = jnp.zeros_like(x) + 1
        jax.block_until_ready((x, y))
        print(f"\n{np.dtype(dtype).name}: copy / transform (error in roundings)")
        print("       n " + "".join(f"{f'2^{e.bit_length() - 1}':>14}" for e in SIZES))
        for b in bits:
            cells = []
            for elements in SIZES:
                result = measure(dtype, 1 << b, elements, x, y)
                if result:
                    results.append(result)
                cells.append(f"{result['ratio']:6.3f} ({result['error']:5.3f})" if result else "")
            print(f"{1 << b:8} " + "".join(f"{cell:>14}" for cell in cells), flush=True)
        del x, y
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
