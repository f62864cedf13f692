"""Every dimension of a model through `hadamard`: values, the inverse, derivatives, and batches of any size."""

import math

import jax
import numpy as np
import pytest
from cases import DTYPES, MODEL_DIMENSIONS, assert_same_bits, normal
from oracle import bound, decompose, error_in_roundings, round_to, transform

from jax_hadacore import hadamard

_, BFLOAT16, FLOAT32, _ = DTYPES

dtypes = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)


def _dimensions():
    """All of them; the shortest and the longest of each combination of orders are enough for a short call on a GPU."""
    by_orders = {}
    for n in MODEL_DIMENSIONS:
        by_orders.setdefault(decompose(n)[:-1], []).append(n)
    few = {n for some in by_orders.values() for n in (some[0], some[-1])}
    return [pytest.param(n, id=f"n{n}", marks=[pytest.mark.gpu_small] if n in few else []) for n in MODEL_DIMENSIONS]


dimensions = pytest.mark.parametrize("n", _dimensions())


def draw(name, n, dtype):
    """Rows in an odd number, of short ones so many that an error is a statistic."""
    return normal((4096 // n + 3 | 1, n), dtype, name)


def assert_is_the_transform(y, x, **options):
    y = np.asarray(y)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert error_in_roundings(y, transform(x, **options), x.dtype) <= bound(x.dtype, x.shape[-1])


@dimensions
@dtypes
def test_values_and_the_inverse(n, dtype):
    x = draw("x", n, dtype)
    y = hadamard(x)
    assert_is_the_transform(y, x)
    # The two errors are independent, and of the size that values like these are rounded with.
    exact = transform(x)
    rounding = np.sqrt(np.mean((round_to(exact, dtype) - exact) ** 2))
    error = np.sqrt(np.mean((np.asarray(hadamard(y)).astype(exact.dtype) - x.astype(exact.dtype)) ** 2))
    assert 0 < error <= math.sqrt(2) * bound(dtype, n) * rounding


@dimensions
@dtypes
def test_derivatives(n, dtype):
    x, tangent, cotangent = (draw(name, n, dtype) for name in ("x", "tangent", "cotangent"))
    y, pull = jax.vjp(hadamard, x)
    assert_is_the_transform(pull(cotangent)[0], cotangent, transpose=True)
    value, pushed = jax.jvp(hadamard, (x,), (tangent,))
    assert_is_the_transform(pushed, tangent)
    assert_same_bits(np.asarray(value), np.asarray(y))


@dimensions
@dtypes
def test_a_row_does_not_depend_on_the_batch(n, dtype):
    x = draw("x", n, dtype)
    y = np.asarray(hadamard(x))
    assert hadamard(x[:0]).shape == (0, n)
    assert_same_bits(np.asarray(hadamard(x[-1:])), y[-1:])
