"""Runs every kernel on small data, for the memory and race checkers.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py [TYPE]...
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_hadacore import _cuda, decompose
from jax_hadacore._orders import order_matrix
from jax_hadacore._signs import pack

BUFFER = 3 << 16  # elements
# Lengths and rows with which places of rings (order_ring.cuh, pair_ring.cuh) are used several times on 132
# multiprocessors, 16-bit.
RINGS = ((24576, 400), (9216, 1325), (11008, 1590), (9984, 664))
STRIDES = (7, 80, 128, 200)  # of columns
TYPES = ("float16", "bfloat16", "float32", "float64")
POWERS = tuple(1 << bits for bits in range(17))
# Every layout that the kernels of orders tell apart, and what is left to sums of a factor.
ORDERS = (12, 24, 80, 96, 2880, 896, 768, 1536, 3072, 18432, 28672, 53248, 10944, 29568, 19968, 688, 1048, 24576)
# Lengths that become codes, and rows; of the last two so many that places of the ring, or a block's buffers, are used
# several times.
ROWS_TO_CODES = (
    *((1 << bits, {1, 3, max(1, 5000 >> bits)}) for bits in range(5, 16)),
    *((n, {1, 3}) for n in (1536, 3072, 7168, 18944)),
    (24576, {1, 400}),
    (28672, {1, 300}),
)
CODES = (
    ("float8_e4m3fn", "float32", 0, False),
    ("float8_e5m2", "float32", 64, False),
    ("int8", "float32", 0, False),
    ("int8", "given", 0, False),
    ("int4", "float32", 0, True),
    ("int4", "float32", 32, True),
    ("float4_e2m1fn", "float8_e8m0fnu", 32, False),
    ("float4_e2m1fn", "float8_e4m3fn", 16, False),
)


def main(types: list[str]) -> None:
    """Transforms aligned and unaligned rows of every length, tails included, with and without signs."""
    jax.config.update("jax_enable_x64", True)
    workspace = jnp.zeros(BUFFER, jnp.float64)
    generator = np.random.default_rng(0)
    for dtype in map(jnp.dtype, types or TYPES):
        rings = RINGS if dtype.itemsize == 2 else ()
        x = jnp.asarray(generator.standard_normal(max([BUFFER, *map(math.prod, rings)]), np.float32).astype(dtype))
        y = jnp.zeros_like(x)
        jax.block_until_ready((x, y, workspace))
        for n in (*POWERS, *ORDERS, *(n for n, _ in rings)):
            orders, factors = factors_of(n)
            signs = pack(generator.random(n) < 0.5)
            for rows in sorted({1, 3, max(1, 5000 // n)} | {rows for length, rows in rings if length == n}):
                for with_signs in (False, True):
                    problem = _cuda.Problem(
                        getattr(_cuda.Dtype, dtype.name),
                        n,
                        rows,
                        orders=orders,
                        factors=factors.ctypes.data,
                        signs=signs.ctypes.data if with_signs else 0,
                        signs_last=rows == 3,
                    )
                    for offset in (0, dtype.itemsize) if rows * n < BUFFER else (0,):
                        _cuda.transform(
                            problem,
                            x.unsafe_buffer_pointer() + offset,
                            y.unsafe_buffer_pointer() + offset,
                            workspace.unsafe_buffer_pointer(),
                        )
        for n in (1 << bits for bits in range(3, {2: 9, 4: 8}.get(dtype.itemsize, 0))):
            for stride in STRIDES:
                problem = _cuda.Problem(getattr(_cuda.Dtype, dtype.name), n, 3 * stride, stride=stride)
                for offset in (0, dtype.itemsize):
                    _cuda.transform(problem, x.unsafe_buffer_pointer() + offset, y.unsafe_buffer_pointer() + offset)
        if dtype.itemsize == 2:
            quantize(dtype, x, y)
    print("done")


def factors_of(n: int) -> tuple[list[int], np.ndarray]:
    """The orders of a length, and the packed signs of their matrices."""
    *orders, _ = decompose(n)
    return orders, np.concatenate([pack(order_matrix(k) < 0).ravel() for k in orders] or [np.zeros(1, np.uint32)])


def quantize(dtype, x, y) -> None:
    """Turns the rows' results into codes of every kind."""
    scales, zero_points = jnp.zeros(x.size // 16), jnp.zeros(x.size // 16, jnp.int8)
    given = jnp.ones(1)
    jax.block_until_ready((scales, zero_points, given))
    for n, numbers in ROWS_TO_CODES:
        orders, factors = factors_of(n)
        for rows in sorted(numbers):
            problem = _cuda.Problem(
                getattr(_cuda.Dtype, dtype.name), n, rows, orders=orders, factors=factors.ctypes.data
            )
            for code, scale, group, asymmetric in CODES:
                quantization = _cuda.Quantization(
                    getattr(_cuda.Code, code),
                    getattr(_cuda.Scale, scale),
                    group or n,
                    asymmetric,
                    given.unsafe_buffer_pointer() if scale == "given" else 0,
                )
                if _cuda.fuses_codes(problem, quantization):
                    results = _cuda.QuantizedBuffers(
                        y.unsafe_buffer_pointer(),
                        scales.unsafe_buffer_pointer(),
                        zero_points.unsafe_buffer_pointer() if asymmetric else 0,
                    )
                    _cuda.quantize(problem, quantization, x.unsafe_buffer_pointer(), results)


if __name__ == "__main__":
    main(sys.argv[1:])
