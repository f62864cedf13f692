"""Measures the error of the transform in roundings, for every length and type, on the default device.

    python benchmarks/errors.py [--out FILE.json]

The exact results are computed by the definition in float64, and for float64 in extended precision.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment

import jax_hadacore
from jax_hadacore._measure import definition, error_bound, error_in_roundings

ELEMENTS = 1 << 20  # at least, where a row is shorter
DTYPES = [jnp.dtype(name) for name in ("float16", "bfloat16", "float32", "float64")]


def measure(dtype: np.dtype, bits: int) -> dict:
    """The error of random rows of 2^bits elements."""
    n = 1 << bits
    x = np.random.default_rng(bits).standard_normal((max(1, ELEMENTS // n), n)).astype(dtype)
    exact = definition(x, np.longdouble if dtype == np.float64 else np.float64)
    error = error_in_roundings(np.asarray(jax_hadacore.hadamard(x)), exact)
    return {"dtype": dtype.name, "n": n, "error": error, "bound": error_bound(dtype, n)}


def main() -> None:
    """Prints a table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cases = [(dtype, bits) for bits in reversed(range(25)) for dtype in reversed(DTYPES)]
    with ThreadPoolExecutor() as pool:  # NumPy computes without the interpreter's lock
        results = list(pool.map(lambda case: measure(*case), cases))[::-1]
    print("       n" + "".join(f"{dtype.name:>18}" for dtype in DTYPES))
    for bits in range(25):
        row = results[len(DTYPES) * bits : len(DTYPES) * (bits + 1)]
        print(f"{1 << bits:8}" + "".join(f"{r['error']:10.3f} <= {r['bound']:.2f}" for r in row))
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    sys.exit(any(r["error"] > r["bound"] for r in results))


if __name__ == "__main__":
    main()
