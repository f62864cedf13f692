"""What a JAX program offers instead of the kernel: a dense product, two factors, a butterfly; and a copy for scale."""

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable

import jax
import jax.numpy as jnp

from .._transform import hadamard
from .grid import Case

# elements * n of the largest dense product that is measured: seconds of work.
_DENSE = {"gpu": 1 << 43, "cpu": 1 << 35}
_MATRIX_BYTES = 1 << 31
_RUN = 0.02  # seconds of calls between two looks at the clock

# Functions of rows, and their arguments beside the rows, by name.
Operations = dict[str, tuple[Callable, tuple]]


def rows(platform: str, cases: Iterable[Case]) -> Generator[dict]:
    """The time of a call of each alternative, one call's result being the next one's operand."""
    for case in cases:
        yield {**case.row(cold=case.exceeds_caches), "microseconds": times(case, _operations(platform, case))}


def beside_dense(case: Case) -> dict[str, float]:
    """Microseconds of a call of the transform and of the dense product, for a length of any factors."""
    return times(case, {"hadamard": (hadamard, ()), "x @ H": (jnp.matmul, (_matrix(case.n, case.dtype),))})


def times(case: Case, operations: Operations, *, chained: bool = True) -> dict[str, float]:
    """Microseconds of a jitted call of each operation on random rows; see `microseconds`."""
    x = jax.random.normal(jax.random.key(0), (case.elements // case.n, case.n), case.dtype)
    return {
        name: microseconds(jax.jit(function), x, *arguments, chained=chained)
        for name, (function, arguments) in operations.items()
    }


def _operations(platform: str, case: Case) -> Operations:
    """Orthonormal operations on rows of a power of two."""
    n, dtype = case.n, case.dtype
    low = 1 << n.bit_length() // 2

    def butterfly(x):
        y, h = x.astype(jnp.float32), 1
        while h < n:
            y = y.reshape(-1, 2, h)
            y = jnp.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], axis=1)
            h *= 2
        return (y.reshape(x.shape) * n**-0.5).astype(dtype)

    def two_factors(x, outer, inner):
        return jnp.einsum("rab,ac,bd->rcd", x.reshape(-1, n // low, low), outer, inner).reshape(x.shape)

    operations = {
        "hadamard": (hadamard, ()),
        "elementwise": (jnp.negative, ()),
        "butterfly": (butterfly, ()),
        "two factors": (two_factors, (_matrix(n // low, dtype), _matrix(low, dtype))),
    }
    if case.elements * n <= _DENSE[platform] and n * n * dtype.itemsize <= _MATRIX_BYTES:
        operations["x @ H"] = (jnp.matmul, (_matrix(n, dtype),))
    return operations


def _matrix(n: int, dtype) -> jax.Array:
    """The orthonormal matrix, made on the device."""
    return jax.jit(lambda: hadamard(jnp.eye(n, dtype=dtype), inplace=True))()


def microseconds(function: Callable, x: jax.Array, *arguments, chained: bool = True) -> float:
    """The time of a call: chained, of one that works on the result of the one before; else of one on x.

    A GPU runs calls that do not depend on one another in sequence; on a CPU these are waited for singly.
    """
    waits = not chained and jax.default_backend() == "cpu"

    def run(calls: int) -> float:
        start, result = time.perf_counter(), x
        for _ in range(calls):
            result = function(result if chained else x, *arguments)
            if waits:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    run(1)  # compiles
    calls = max(1, min(10, math.ceil(_RUN / run(1))))  # not waiting between calls hides their dispatch
    return 1e6 * statistics.median(run(calls) for _ in range(5))
