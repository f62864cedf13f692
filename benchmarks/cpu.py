"""Times the transform on the CPU against what XLA offers instead: a dense product, two factors, a butterfly, a copy.

    python benchmarks/cpu.py [--out FILE.json]

Every number is the median time of a jitted call on warm data, in milliseconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment

from jax_hadacore import hadamard
from jax_hadacore._measure import sign_matrix

ELEMENTS = 1 << 22


def alternatives(n: int, dtype: np.dtype) -> dict[str, Callable]:
    """Jitted functions of (rows, n) arrays that compute the transform, and a copy for scale."""
    low = 1 << n.bit_length() // 2
    whole, outer, inner = (jnp.asarray(sign_matrix(k) * k**-0.5, dtype) for k in (n, n // low, low))

    def butterfly(x):
        y, h = x.astype(jnp.float32), 1
        while h < n:
            y = y.reshape(-1, 2, h)
            y = jnp.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], axis=1)
            h *= 2
        return (y.reshape(x.shape) * n**-0.5).astype(dtype)

    def two_factors(x):
        y = jnp.einsum("rab,ac,bd->rcd", x.reshape(-1, n // low, low), outer, inner)
        return y.reshape(x.shape)

    return {
        "hadamard": hadamard,
        "copy": jnp.negative,
        "dense": lambda x: x @ whole,
        "two factors": two_factors,
        "butterfly": butterfly,
    }


def median_time(function: Callable, x: jax.Array) -> float:
    """Milliseconds."""
    function = jax.jit(function)
    function(x).block_until_ready()
    times = []
    while len(times) < 7 or (len(times) < 50 and sum(times) < 500):
        start = time.perf_counter()
        function(x).block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Prints a table for each dtype and stores what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for dtype in map(np.dtype, (jnp.float32, jnp.bfloat16)):
        print(f"\n{dtype.name}, {ELEMENTS:,} elements, milliseconds")
        for n in (1 << bits for bits in range(6, 14)):
            x = jax.random.normal(jax.random.key(n), (ELEMENTS // n, n), dtype)
            times = {name: median_time(f, x) for name, f in alternatives(n, dtype).items()}
            results.append({"dtype": dtype.name, "n": n, "elements": ELEMENTS, **times})
            if n == 64:
                print(f"{'n':>6}" + "".join(f"{name:>13}" for name in times))
            print(f"{n:6}" + "".join(f"{value:13.2f}" for value in times.values()), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
