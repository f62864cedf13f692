"""Times the CUDA kernels against copies of the same bytes, in one process, by replayed graphs.

    python benchmarks/kernels.py [--out FILE.json] [--quick]

Cold: launches take buffers in turn that together exceed the L2 cache several times. Warm: the same buffers every time.
"""

import argparse
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment

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


def measure(dtype, n: int, elements: int, buffers: tuple[jax.Array, ...]) -> dict | None:
    """Medians in microseconds, the ratio of the better copy to the transform, and the error of the last row."""
    if elements < n:
        return None
    x, y, workspace = buffers
    size = elements * np.dtype(dtype).itemsize
    del workspace
    sets = 1 if elements in WARM else max(1, min(COLD_BYTES // (2 * size), x.nbytes // size))
    launches, replays = SIZES[elements]
    problem = _cuda.Problem(getattr(_cuda.Dtype, np.dtype(dtype).name), n, elements // n, n**-0.5)
    addresses = [buffer.unsafe_buffer_pointer() for buffer in buffers]
    times = _cuda.measure(problem, *addresses, sets, launches, replays)
    micros = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    _cuda.transform(problem, *addresses)
    sample = slice(elements - max(n, min(elements, 65536)), elements)
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


def main() -> None:
    """Prints a table of ratios for each dtype and stores everything measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="bfloat16 and float32, fewer lengths")
    arguments = parser.parse_args()
    dtypes = [jnp.bfloat16, jnp.float32] if arguments.quick else [jnp.bfloat16, jnp.float16, jnp.float32]
    bits = [*range(1, 18), 20]
    results = []
    for dtype in dtypes:
        most = 1 << 28
        x = jax.random.normal(jax.random.key(0), (most,), dtype)
        y = jnp.zeros_like(x) + 1
        workspace = jnp.zeros(most, jnp.float32)
        buffers = jax.block_until_ready((x, y, workspace))
        print(f"\n{np.dtype(dtype).name}: copy / transform (error in roundings)")
        print("       n " + "".join(f"{f'2^{e.bit_length() - 1}':>14}" for e in SIZES))
        for b in bits:
            cells = []
            for elements in SIZES:
                result = measure(dtype, 1 << b, elements, buffers)
                if result:
                    results.append(result)
                cells.append(f"{result['ratio']:6.3f} ({result['error']:5.3f})" if result else "")
            print(f"{1 << b:8} " + "".join(f"{cell:>14}" for cell in cells), flush=True)
        del x, y, workspace, buffers
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
