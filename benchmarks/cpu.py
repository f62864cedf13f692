"""Times the transform on the CPU: against memcpy, on more threads, and against what XLA offers instead.

    python benchmarks/cpu.py [--tables memcpy threads programs factors quantized] [--out FILE.json]

`memcpy`: the kernel on one thread beside memcpy of the same bytes, in turn; the share is the best time of
memcpy / the best of the transform, because other tenants of a machine only ever add time. `threads`: the best time on
one thread / on several. `programs`: medians of jitted calls, in turn, of the transform and of XLA's alternatives.
`factors`: lengths that are no powers of two, the kernel on one thread and on all beside memcpy and a dense product.
`quantized`: best times of jitted calls, in turn, of the transform alone, quantised by the kernel, and quantised by XLA.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_hadacore import _ffi, decompose, hadamard, hadamard_quantize
from jax_hadacore._measure import sign_matrix
from jax_hadacore.bench.device import problem
from jax_hadacore.bench.environment import environment
from jax_hadacore.bench.grid import Case

DTYPES = tuple(np.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64))
OUT_OF_CACHE, IN_L2 = 1 << 24, 1 << 15  # elements of an array
SWEEPS = 8  # over all sizes
LONGEST_DENSE = 4096  # the sign matrix of longer rows alone takes seconds
CALLS = 50  # in a program of many


def measure(x: np.ndarray, y: np.ndarray, **options) -> dict[str, list[float]]:
    """Milliseconds of the transform of x into y and of memcpy."""
    native = _ffi.CPU.module
    asked = problem(native, Case(x.dtype, x.shape[-1], x.size))
    return native.measure(asked, x.ctypes.data, y.ctypes.data, **options)


def memcpy_shares() -> list[dict]:
    """One thread, n from 1 to 65536: an array beyond the caches, one in L2, and few rows."""
    results = []
    for dtype in DTYPES:
        memory = np.random.default_rng(0).standard_normal(OUT_OF_CACHE).astype(dtype), np.zeros(OUT_OF_CACHE, dtype)
        lengths = [1 << bits for bits in range(17)]
        shapes = [(rows, n) for n in lengths for rows in sorted({1, 3, 64, IN_L2 // n, OUT_OF_CACHE // n} - {0})]
        best = {}
        for _ in range(SWEEPS):  # another tenant stays for seconds
            for rows, n in shapes:
                x, y = (part[: rows * n].reshape(rows, n) for part in memory)
                for way, result in (("out of place", y), ("in place", x)):
                    for name, values in measure(x, result, repetitions=6).items():
                        key = rows, n, way, name
                        best[key] = min(best.get(key, values[0]), *values)
        for rows, n in shapes:
            entry = {"dtype": dtype.name, "n": n, "rows": rows}
            for way in ("out of place", "in place"):
                transform, memcpy = (best[rows, n, way, name] for name in ("transform", "memcpy"))
                entry[way] = {"transform": transform, "memcpy": memcpy, "share": memcpy / transform}
            results.append(entry)
        show(f"{dtype.name}, share of memcpy", [e for e in results if e["dtype"] == dtype.name], shares_of)
    return results


def shares_of(entry: dict) -> dict[str, float] | None:
    """Of the two arrays of a fixed size."""
    elements = entry["n"] * entry["rows"]
    if elements not in (OUT_OF_CACHE, IN_L2):
        return None
    return {"elements": elements, **{way: entry[way]["share"] for way in ("out of place", "in place")}}


def thread_scaling() -> list[dict]:
    """The best of many calls on one thread / on every number of threads up to the cores."""
    results = []
    for dtype in DTYPES:
        memory = np.random.default_rng(0).standard_normal(OUT_OF_CACHE).astype(dtype), np.zeros(OUT_OF_CACHE, dtype)
        for rows, n in ((1 << 12, 256), (1 << 16, 256), (1 << 8, 4096), (1, 1 << 16), (1, 1 << 20), (1, 1 << 24)):
            x, y = (part[: rows * n].reshape(rows, n) for part in memory)
            for threads in range(2, min(os.cpu_count() or 1, 16) + 1):
                best = {}
                for _ in range(10):  # in turn
                    for count in (1, threads):
                        for name, values in measure(x, y, threads=count, repetitions=3).items():
                            best[name, count] = min(best.get((name, count), values[0]), *values)
                speedup, of_memcpy = (best[name, 1] / best[name, threads] for name in ("transform", "memcpy"))
                entry = {"dtype": dtype.name, "n": n, "rows": rows, "threads": threads}
                entry |= {"milliseconds": best["transform", threads], "speedup": speedup, "of memcpy": of_memcpy}
                results.append(entry)
    show("speedup on threads", results, lambda e: {k: e[k] for k in ("rows", "threads", "speedup", "of memcpy")})
    return results


def alternatives(n: int, dtype: np.dtype) -> dict[str, Callable]:
    """Functions of (rows, n) arrays that compute the transform, and a copy for scale."""
    low = 1 << n.bit_length() // 2
    outer, inner = (jnp.asarray(sign_matrix(k) * k**-0.5, dtype) for k in (n // low, low))

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

    functions = {"hadamard": hadamard, "copy": jnp.negative, "two factors": two_factors, "butterfly": butterfly}
    if n <= LONGEST_DENSE:
        whole = jnp.asarray(sign_matrix(n) * n**-0.5, dtype)
        functions["dense"] = lambda x: x @ whole
    return functions


def repeated(function: Callable) -> Callable:
    """The function CALLS times, one after the other."""

    def program(x):
        for _ in range(CALLS):
            x = function(x)
        return x

    return program


def call_times(
    functions: dict[str, Callable], x: jax.Array, statistic: Callable = statistics.median
) -> dict[str, float]:
    """Milliseconds, of jitted calls in turn, in random order: threads of the call before may still be awake. A slow
    function has fewer turns.
    """
    order = np.random.default_rng(0)
    functions = {name: jax.jit(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(x))
    for turn in range(300):
        for name in order.permutation(list(functions)):
            function = functions[name]
            if turn < 3 or sum(times[name]) < 100:
                start = time.perf_counter()
                jax.block_until_ready(function(x))
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistic(values) for name, values in times.items()}


def programs() -> list[dict]:
    """The grid: n from 16 to 32768; 1, 8 and 128 rows, and as many as make 2^22 elements; one row, many times over."""
    results = []
    for dtype in DTYPES[:3]:
        for n in (1 << bits for bits in range(4, 16)):
            functions = alternatives(n, dtype)
            for rows in (1, 8, 128, (1 << 22) // n):
                x = jax.random.normal(jax.random.key(n), (rows, n), dtype)
                entry = {"dtype": dtype.name, "n": n, "rows": rows}
                results.append({**entry, "calls": 1, "milliseconds": call_times(functions, x)})
                if rows == 1 and n <= 256:
                    many = {name: repeated(function) for name, function in functions.items()}
                    results.append({**entry, "calls": CALLS, "milliseconds": call_times(many, x)})
        show(
            f"{dtype.name}, milliseconds of jitted calls",
            [e for e in results if e["dtype"] == dtype.name],
            lambda e: {"rows": e["rows"], "calls": e["calls"], **e["milliseconds"]},
        )
    return results


FACTORED = ((3072, 1), (3072, 512), (14336, 64), (11008, 64), (10944, 64), (2880, 256), (12, 4096), (80, 4096))


def factors() -> list[dict]:
    """Few and many rows; `jax-hadacore bench dims` has all lengths of models at one size."""
    results = []
    for dtype in DTYPES[:2]:
        entries = [
            {"dtype": dtype.name, "n": n, "orders": decompose(n)[:-1], "rows": rows, "milliseconds": {}}
            for n, rows in FACTORED
        ]
        for sweep in range(SWEEPS):
            for entry in entries:
                rows, n, best = entry["rows"], entry["n"], entry["milliseconds"]
                x = np.random.default_rng(0).standard_normal((rows, n)).astype(dtype)
                y = np.empty_like(x)
                for threads in (1, os.cpu_count() or 1):
                    for name, values in measure(x, y, threads=threads, repetitions=10).items():
                        key = f"{name}, threads: {threads}"
                        best[key] = min(best.get(key, values[0]), *values)
                if sweep < 2:
                    best["dense"] = min(best.get("dense", math.inf), dense_time(x))
        results += entries
        show(f"{dtype.name}, milliseconds", entries, lambda e: {"rows": e["rows"], **e["milliseconds"]})
    return results


def dense_time(x: np.ndarray) -> float:
    """Milliseconds of the fastest of three jitted products with an n x n matrix."""
    whole = jnp.full((x.shape[-1], x.shape[-1]), x.shape[-1] ** -0.5, x.dtype)
    product, x = jax.jit(jnp.matmul), jnp.asarray(x)
    product(x, whole).block_until_ready()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(x, whole).block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


# Options of hadamard_quantize; the code, its largest number, the type of the scales, and how many elements share one; 0
# for a row.
QUANTIZED = {
    "int8, row": ({"qtype": "int8"}, "int8", 127, "float32", 0),
    "float8_e4m3fn, row": ({"qtype": "float8_e4m3fn"}, "float8_e4m3fn", 448, "float32", 0),
    "float8_e4m3fn, 32": (
        {"qtype": "float8_e4m3fn", "granularity": ("block", 32)},
        "float8_e4m3fn",
        448,
        "float32",
        32,
    ),
    "mxfp8": ({"qtype": "mxfp8"}, "float8_e4m3fn", 448, "float8_e8m0fnu", 32),
}


def quantizers(name: str, x: jax.Array) -> dict[str, Callable]:
    """Functions of x that return codes and scales: one call of the kernel, and the kernel's transform and XLA."""
    options, code, largest, scale_type, group = QUANTIZED[name]
    rows, n = x.shape
    group = group or n

    def by_xla(x):
        w = hadamard(x.astype(jnp.float32)).reshape(rows, n // group, group)
        amax = jnp.abs(w).max(-1)
        scales = jnp.where(amax == 0, 1, amax / largest)
        if scale_type != "float32":
            scales = jnp.exp2(jnp.floor(jnp.log2(amax)) - math.floor(math.log2(largest)))
        codes = jnp.clip(w * (1 / scales)[..., None], -largest, largest)
        if code == "int8":
            codes = jnp.round(codes)
        return codes.astype(code).reshape(x.shape), scales.astype(scale_type)

    def by_kernel(x):
        q = hadamard_quantize(x, **options)
        return q.values, q.scales

    return {"transform": hadamard, "kernel": by_kernel, "xla": by_xla}


def quantized() -> list[dict]:
    """2^22 elements, all cores."""
    choice = itertools.product(DTYPES[:2], QUANTIZED, (128, 1024, 4096, 32768))
    entries = [{"dtype": dtype.name, "format": name, "n": n, "milliseconds": {}} for dtype, name, n in choice]
    for _ in range(SWEEPS):
        for entry in entries:
            x = jax.random.normal(jax.random.key(0), ((1 << 22) // entry["n"], entry["n"]), entry["dtype"])
            for way, value in call_times(quantizers(entry["format"], x), x, min).items():
                entry["milliseconds"][way] = min(entry["milliseconds"].get(way, value), value)
    show("milliseconds of jitted calls", entries, lambda e: {k: e[k] for k in ("dtype", "format")} | e["milliseconds"])
    return entries


def show(title: str, results: list[dict], columns: Callable[[dict], dict | None]) -> None:
    """Prints the columns of each result that has any."""
    rows = [{"n": entry["n"], **cells} for entry in results if (cells := columns(entry))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n{title}\n" + "".join(f"{name:>22}" for name in names))
    for row in rows:
        cells = (row.get(name, "") for name in names)
        print("".join(f"{cell:22.4f}" if isinstance(cell, float) else f"{cell:>22}" for cell in cells), flush=True)


def main() -> None:
    """Prints tables and stores what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "memcpy": memcpy_shares,
        "threads": thread_scaling,
        "programs": programs,
        "factors": factors,
        "quantized": quantized,
    }
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {name: tables[name]() for name in arguments.tables}
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"environment": environment(" ".join(["python", *sys.argv])), **results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
