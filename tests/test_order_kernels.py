"""The CUDA kernels of lengths that are no powers of two, and of signs, emulated and, with --require-gpu, on the GPU."""

import math

import numpy as np
import pytest
from cases import DTYPES, HALVES, assert_same_bits, dtypes, halves, normal, rng
from kernels import LEAST_SHARED, Request
from oracle import HAS_WIDE_FLOAT64, dense, error_in_roundings, wide
from oracle import bound as oracle_bound

FLOAT32, FLOAT64 = DTYPES[2:]
REVERSE = 1


def factor(order, *key):
    """A matrix of random signs: a kernel multiplies by what it is given."""
    return rng("factor", order, *key).choice(np.array([-1, 1], np.int8), (order, order))


def random_signs(n):
    return rng("signs", n).choice(np.array([-1, 1], np.int8), n)


def exact(x, factors, scale, signs=None, *, signs_last=False):
    """The transform in a wider type, one factor after the other."""
    kind = wide(x.dtype)
    signs = 1 if signs is None else signs.astype(kind)
    y = x.astype(kind) if signs_last else x.astype(kind) * signs
    power = x.shape[1] // math.prod(map(len, factors))
    factors = (*factors, *(dense(32),) * int(math.log(power, 32)), dense(power // 32 ** int(math.log(power, 32))))
    y = y.reshape(len(x), *map(len, factors))
    for axis, matrix in enumerate(factors, start=1):
        y = np.moveaxis(np.tensordot(y, matrix.astype(kind), (axis, 1)), -1, axis)
    y = y.reshape(x.shape) * kind(scale)
    return y * signs if signs_last else y


def bound(dtype, n):
    return 1.05 if dtype in HALVES else oracle_bound(dtype, n)


def assert_within_bound(y, x, factors, scale, **signs):
    expected = exact(x, factors, scale, **signs)
    if y.dtype == FLOAT64 and not HAS_WIDE_FLOAT64:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14 * abs(expected).max())
        return
    assert error_in_roundings(y, expected, y.dtype) <= bound(y.dtype, x.shape[1])


# (orders, power of two): every shape of a row that the fused kernels tell apart, and what they leave to others.
FUSED = (
    ((12,), 1),
    ((28,), 1),
    ((12,), 2),
    ((20,), 4),
    ((12,), 8),
    ((180,), 16),
    ((28,), 32),
    ((344,), 4),
    ((140,), 64),
    ((12,), 128),
    ((28,), 256),
    ((20,), 1024),
    ((36, 76), 4),
    ((44, 84), 8),
    ((12, 52), 32),
)
COMPOSED = (((36, 76), 1), ((524,), 2), ((52, 60), 2))
lengths = pytest.mark.parametrize(("orders", "power"), (*FUSED, *COMPOSED), ids=str)
fused_lengths = pytest.mark.parametrize(("orders", "power"), FUSED, ids=str)


def problem(orders, power, dtype, rows, *key):
    n = int(np.prod(orders)) * power
    factors = tuple(factor(order, i) for i, order in enumerate(orders))
    return normal((rows, n), dtype, *key), {"factors": factors, "scale": n**-0.5}


def rows_for(n):
    return 3 if n > 2000 else 4096 // n + 3


class TestValues:
    @dtypes
    @lengths
    def test_error_is_within_the_bound(self, kernel, orders, power, dtype):
        n = int(np.prod(orders)) * power
        x, how = problem(orders, power, dtype, rows_for(n))
        assert_within_bound(kernel(x, **how), x, **how)

    @dtypes
    @lengths
    @pytest.mark.parametrize("signs_last", [False, True], ids=["first", "last"])
    def test_signs(self, kernel, orders, power, dtype, signs_last):
        n = int(np.prod(orders)) * power
        x, how = problem(orders, power, dtype, rows_for(n))
        signs = random_signs(n)
        y = kernel(x, **how, signs=signs, signs_last=signs_last)
        expected = kernel(x, **how) * signs.astype(dtype) if signs_last else kernel(x * signs.astype(dtype), **how)
        assert_same_bits(y, expected)
        assert_same_bits(kernel(x, **how, signs=signs, signs_last=signs_last, signs_on_device=True), expected)
