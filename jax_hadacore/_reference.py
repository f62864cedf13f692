"""The transform in plain jax.numpy: the definition, and the lowering for platforms without a kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ._orders import order_matrix, orders, sylvester

# XLA sums a product of matrices one term after the other, so the float32 error grows with the length of the sum
# (docs/numerics.md): longer products would be faster, but less exact.
_MAX_TERMS = 4
# So many rows of a larger matrix are worked on at a time.
_ROWS = 4

_dot = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)


def transform(
    x: jax.Array,
    *,
    scale: float,
    length: int | None = None,
    matrix: np.ndarray | None = None,
    signs: np.ndarray | jax.Array | None = None,
    transpose: bool = False,
) -> jax.Array:
    """Computes y = scale * T (x * signs), or with transpose y = scale * (T^T x) * signs, for blocks of the last axis.

    T is the Kronecker product of the matrices of `decompose(length)`, or of `matrix` and Sylvester's. It is applied one
    factor after the other, accumulated in float32 (float64 for float64) and rounded once.

    Args:
        x: an array of float16, bfloat16, float32 or float64.
        scale: a number.
        length: of the blocks that the last axis consists of; by default all of it.
        matrix: (k, k), where length = k * 2^m.
        signs: (length,), of +-1 in any real dtype.
        transpose: whether to apply the adjoint.
    """
    n = x.shape[-1] if length is None else length
    batch = (*x.shape[:-1], x.shape[-1] // n)
    accumulator = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    factors = [order_matrix(k) for k in orders(n)] if matrix is None else [matrix.T if transpose else matrix]
    factors += [sylvester(k) for k in _split(n // math.prod(map(len, factors)))]
    y = x.astype(accumulator).reshape(*batch, n)
    if signs is not None:
        signs = jnp.asarray(signs, accumulator).reshape((1,) * len(batch) + (n,))
        y = y if transpose else y * signs
    y = y.reshape(*batch, *map(len, factors))
    for axis, factor in enumerate(factors, start=len(batch)):
        multiply = _multiply if len(factor) <= _MAX_TERMS else _multiply_in_parts
        y = jnp.moveaxis(multiply(np.asarray(factor, accumulator), jnp.moveaxis(y, axis, 0)), 0, axis)
    y = y.reshape(*batch, n)
    y = _scaled(y, scale) if x.dtype == accumulator else y * np.asarray(scale, accumulator)
    if signs is not None and transpose:
        y = y * signs
    return y.reshape(x.shape).astype(x.dtype)


def _multiply(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """The product of a matrix (k, k) and an array (k, ...)."""
    return _dot(matrix, x, (((1,), (0,)), ((), ())))


def _multiply_in_parts(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """The same, as sums of few terms each, which are summed in pairs, these again in pairs, and so on.

    The sums for all rows of the matrix would take many times the memory of x, so there is a loop over a few rows.
    """
    k, *columns = x.shape
    parts = 1 << (-(-k // _MAX_TERMS) - 1).bit_length()
    terms = -(-k // parts)
    padding = (0, parts * terms - k)
    matrix = np.pad(matrix, ((0, -k % _ROWS), padding)).reshape(-1, _ROWS, parts, terms)
    x = jnp.pad(x, [padding] + [(0, 0)] * len(columns)).reshape(parts, terms, *columns)

    def multiply(rows):
        sums = _dot(rows, x, (((2,), (1,)), ((1,), (0,))))
        while len(sums) > 1:
            first, second = jnp.split(sums, 2)
            sums = first + second
        return sums[0]

    return jax.lax.map(multiply, jnp.asarray(matrix)).reshape(_ROWS * len(matrix), *columns)[:k]


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """The product with a float64 number, rounded once: a scale rounded to float32 may be 2.4 average roundings off.

    The products with the upper half of either factor's bits are exact, and the rest is small.
    """
    if x.dtype == jnp.float64:
        return x * scale
    upper = np.float32(scale).view(np.uint32) & np.uint32(0xFFFFF000)
    high = upper.view(np.float32)
    low = np.float32(scale - float(high))
    if not low:
        return x * high
    x_high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)
    return x_high * high + ((x - x_high) * high + x * low)


def _split(n: int) -> tuple[int, ...]:
    """Powers of two of at most _MAX_TERMS, as equal as possible, whose product is n = 2^m."""
    bits = n.bit_length() - 1
    count = -(-bits // (_MAX_TERMS.bit_length() - 1))
    return tuple(1 << (bits * (i + 1) // count - bits * i // count) for i in range(count))
