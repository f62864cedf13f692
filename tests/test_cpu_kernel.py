"""The CPU kernel alone: orders that are no powers of two, real matrices and signs, against float64 sums."""

import itertools
import math

import jax
import numpy as np
import oracle
import pytest
from cases import HALVES, assert_same_bits, bits, dtypes, normal, rng
from cpu_kernel import CPU, FEW, few, over, transform

from jax_hadacore import _ffi

# The order 172 has no Paley matrix: the kernel takes what it is given. 1, 6 and 9 are no multiples of four.
ORDERS = (1, 6, 9, 12, 20, 28, 36)
LARGE_ORDERS = (76, 172, 344, 524, 1020)
PAIRS = ((36, 76), (12, 52), (9, 5))
POWERS = (1, 2, 4, 16, 32, 256, 1024)


def bound(t, dtype):
    """The error in roundings; a real matrix's entries and products are rounded too, by half a unit or less each."""
    if dtype in HALVES:
        return 1.05
    return math.hypot(oracle.bound(dtype, t.n), 2 if t.real else 0)


def assert_right(t, x, y):
    if x.dtype == np.float64 and not oracle.HAS_WIDE_FLOAT64:
        np.testing.assert_allclose(y, t.exact(x), rtol=0, atol=1e-12)
        return
    assert oracle.error_in_roundings(y, t.exact(x), x.dtype) <= bound(t, x.dtype)


def rows_for(n):
    return 4096 // n + 3 if n <= 4096 else 2


@over(
    *(transform((order,), power) for order, power in itertools.product(ORDERS, POWERS)),
    *(transform((order,), power) for order, power in itertools.product(LARGE_ORDERS, (1, 4, 32))),
    *(transform(pair, power) for pair, power in itertools.product(PAIRS, (1, 4, 32))),
    *(transform((order,), power, real=True) for order, power in itertools.product((1, 6, 12, 172, 524), (1, 4, 64))),
)
@dtypes
def test_any_order(t, dtype):
    x = normal((rows_for(t.n), t.n), dtype)
    assert_right(t, x, t.run(x))


@dtypes
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize(
    ("orders", "power"), [((), 1), ((), 16), ((), 128), ((), 4096), ((), 1 << 16), ((20,), 2), ((28,), 512)], ids=str
)
def test_signs(orders, power, where, dtype):
    t = transform(orders, power, signs=where)
    x = normal((rows_for(t.n), t.n), dtype)
    plain = t._replace(signs=None)
    signs = t.signs.astype(dtype)
    expected = plain.run(x) * signs if t.signs_last else plain.run(x * signs)
    assert_same_bits(t.run(x), expected)


@few
@dtypes
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_threads_rows_and_place_never_show(t, dtype, inplace):
    x = normal((257 if t.n < 4096 else 17, t.n), dtype)
    expected = t.run(x)
    assert_right(t, x, expected)
    for rows, threads in itertools.product((0, 1, 3, len(x)), (1, 2, 5)):
        assert_same_bits(t.run(x[:rows], threads, inplace=inplace), expected[:rows])
    assert_same_bits(t.run(x[5:6]), expected[5:6])


@few
@dtypes
def test_instruction_sets_agree(t, dtype, isas):
    x = normal((19 if t.n < 4096 else 3, t.n), dtype)
    results = []
    for name in isas:
        assert CPU.select_isa(name)
        results.append(t.run(x))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@few
@dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_nan_and_infinity_stay_in_their_row(t, dtype, bad):
    x = normal((7, t.n), dtype)
    expected = t.run(x)
    x[3, t.n // 2] = bad
    y = t.run(x)
    assert not np.isfinite(y[3].astype(np.float64)).any()
    for part in (slice(3), slice(4, None)):
        assert_same_bits(y[part], expected[part])


@over(*(t for t in FEW if not t.real))  # whose sums are exact
def test_subnormal_numbers_are_kept(t):
    x = rng("subnormal", t.n).integers(-9, 10, (2, t.n)).astype(np.float32) * np.float32(2**-149)
    y = t.run(x)
    np.testing.assert_allclose(y, t.exact(x), rtol=0, atol=2**-149)
    assert (bits(y) & 0x7FFFFFFF).any()


def test_one_rows_error_grows_like_the_logarithm():
    """Where a sum in sequence would be off by more than the bound."""
    t = transform((1020,), 1)
    x = np.abs(normal((200, t.n), np.float32)) + 1
    assert_right(t, x, t.run(x))


@few
@dtypes
@pytest.mark.parametrize("shape", [(3,), (2, 2), (40,)], ids=str)
def test_the_handler_reads_what_the_kernel_is_given(t, dtype, shape, cpu_devices):
    """A last dimension of two transforms, threads, and signs as an attribute or an operand."""
    x = normal((*shape[:-1], shape[-1], 2 * t.n), dtype)
    attributes, operands = t.native_call()
    call = jax.ffi.ffi_call(_ffi.HADAMARD_TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    with jax.default_device(cpu_devices[0]):
        y = np.asarray(call(x, *operands, **attributes))
    assert_same_bits(y.reshape(-1, t.n), t.run(x.reshape(-1, t.n)))
