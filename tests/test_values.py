"""Values: errors within the promised roundings, and exactness where it is provable."""

import doctest
import itertools
import math
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    COMPLEX,
    DTYPES,
    HALVES,
    KINDS,
    LENGTHS,
    ROWS,
    SHORT_LENGTHS,
    assert_same_bits,
    data,
    dtypes,
    halves,
    lengths,
    normal,
    rng,
    rows_for,
)
from oracle import HAS_WIDE_FLOAT64, bound, dense, error_in_roundings, round_to, transform

from jax_hadacore import hadamard

FLOAT64 = np.dtype(np.float64)


def assert_within_bound(y, x, scale=None, axis=-1):
    x = np.moveaxis(np.asarray(x), axis, -1)
    y = np.moveaxis(np.asarray(y), axis, -1)
    assert y.shape == x.shape
    if y.dtype == FLOAT64 and not HAS_WIDE_FLOAT64:
        np.testing.assert_allclose(y, transform(x, scale), rtol=0, atol=1e-15 * math.sqrt(np.sum(x * x)))
        return
    assert error_in_roundings(y, transform(x, scale), y.dtype) <= bound(y.dtype, x.shape[-1])


@dtypes
@lengths(*LENGTHS)
def test_error_is_within_the_bound(n, dtype):
    x = normal((rows_for(n), n), dtype)
    assert_within_bound(hadamard(x), x)


@dtypes
@lengths(8, 128, 2048)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_the_bound_for_other_data(kind, n, dtype):
    x = data(kind, (max(257, rows_for(n)), n), dtype)
    assert_within_bound(hadamard(x), x)


@pytest.mark.parametrize("rows", ROWS)
@dtypes
@lengths(2, 64, 512)
def test_any_number_of_rows(rows, n, dtype):
    x = rng("rows", rows, n).integers(-8, 9, (rows, n)).astype(dtype)
    y = hadamard(x, scale=1)
    assert y.dtype == dtype
    np.testing.assert_array_equal(np.asarray(y, np.float64), round_to(transform(x, scale=1), dtype).astype(np.float64))


class TestExact:
    """What has to be right to the last bit."""

    @dtypes
    @lengths(*SHORT_LENGTHS, 1024)
    def test_one_hot_rows_are_rows_of_the_matrix(self, n, dtype):
        y = hadamard(np.eye(n, dtype=np.float32).astype(dtype), scale=1)
        assert_same_bits(np.asarray(y), dense(n).astype(dtype))

    @dtypes
    @lengths(4096, 32768, 2**17)
    def test_one_hot_in_a_long_row(self, n, dtype):
        positions = np.array([0, 1, n // 2 - 1, n // 2, 3 * n // 4 + 5, n - 1])
        x = np.zeros((len(positions), n), dtype)
        x[np.arange(len(positions)), positions] = 1
        expected = 1 - 2 * (np.bitwise_count(positions[:, None] & np.arange(n)) & 1).astype(np.int8)
        assert_same_bits(np.asarray(hadamard(x, scale=1)), expected.astype(dtype))

    @dtypes
    @lengths(2, 16, 256, 4096, 65536, 2**20)
    @pytest.mark.parametrize("scale", [1, 2.0**-3], ids=["one", "eighth"])
    def test_integers_are_rounded_once(self, n, dtype, scale):
        # Every partial sum is an integer below 2^24, so the one rounding is the one at the end.
        x = rng("integers", n).integers(-3, 4, (rows_for(n), n)).astype(dtype)
        y = np.asarray(hadamard(x, scale=scale))
        expected = round_to(transform(x, scale), dtype)
        np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))

    @dtypes
    @lengths(1, 32, 4096)
    def test_twice_is_n_times(self, n, dtype):
        x = rng("twice", n).integers(-3, 4, (5, n)).astype(np.float32)
        x[:, 3:] = 0  # three entries at most: sums stay below 2^8, which bfloat16 holds
        once = hadamard(x.astype(dtype), scale=1)
        np.testing.assert_array_equal(np.asarray(hadamard(once, scale=1 / n), np.float32), x)

    @dtypes
    def test_a_row_of_one_element_is_scaled(self, dtype):
        x = normal((257, 1), dtype)
        assert_same_bits(np.asarray(hadamard(x)), x)
        assert_same_bits(np.asarray(hadamard(x, scale=-0.5)), (x * dtype.type(-0.5)).astype(dtype))

    def test_zeros_and_constants(self):
        assert_same_bits(np.asarray(hadamard(np.zeros((3, 256), np.float32))), np.zeros((3, 256), np.float32))
        y = np.asarray(hadamard(np.full((3, 256), 0.1, np.float32)))
        assert (y[:, 0] == np.float32(0.1) * 16).all()
        assert not y[:, 1:].any()


@dtypes
@lengths(2, 512, 4096)
def test_the_default_undoes_itself(n, dtype):
    x = normal((rows_for(n), n), dtype)
    y = np.asarray(hadamard(hadamard(x)), np.float64)
    unit = 2.0**-8 if dtype in HALVES else np.finfo(dtype).eps * math.sqrt(math.log2(n) + 1)
    assert np.sqrt(np.mean((y - x.astype(np.float64)) ** 2)) < unit


class TestScale:
    @dtypes
    @lengths(8, 256)
    @pytest.mark.parametrize("scale", [1, 0.1, -0.3, -1.0, 3, 2.0**-9, 1 / 3])
    def test_any_number(self, scale, n, dtype):
        x = normal((rows_for(n), n), dtype)
        # The scale is a float64, and is rounded to the type that is accumulated in.
        assert_within_bound(hadamard(x, scale=scale), x, scale if dtype == FLOAT64 else np.float32(scale))

    @lengths(1, 2, 4, 8, 2048, 32768)
    def test_default_is_orthonormal(self, n):
        x = np.zeros((1, n))
        x[0, 0] = 1
        np.testing.assert_allclose(hadamard(x), np.full((1, n), 1 / math.sqrt(n)), rtol=4e-16)

    def test_is_applied_in_float64_to_float64(self):
        x = np.array([[1.0, 0.0]])
        assert np.asarray(hadamard(x, scale=0.1)).tolist() == [[0.1, 0.1]]
        assert np.asarray(hadamard(x, scale=1e-300)).tolist() == [[1e-300, 1e-300]]

    def test_zero(self):
        assert not np.asarray(hadamard(normal((3, 16), np.float32), scale=0)).any()

    @pytest.mark.parametrize(
        "scale", [Fraction(1, 4), np.float32(0.25), np.float64(0.25), np.float16(0.25)], ids=lambda s: type(s).__name__
    )
    def test_any_real_type(self, scale):
        x = normal((3, 16), np.float32)
        assert_same_bits(np.asarray(hadamard(x, scale=scale)), np.asarray(hadamard(x)))

    @pytest.mark.parametrize("scale", [2, np.int8(2)], ids=["int", "int8"])
    def test_integers(self, scale):
        x = normal((3, 16), np.float32)
        assert_same_bits(np.asarray(hadamard(x, scale=scale)), np.asarray(hadamard(x, scale=2.0)))


class TestComplex:
    @pytest.mark.parametrize("dtype", COMPLEX, ids=str)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_both_parts_are_transformed(self, dtype, axis):
        part = np.float32 if dtype == np.complex64 else np.float64
        real, imag = normal((64, 16), part, "real"), normal((64, 16), part, "imag")
        y = np.asarray(hadamard((real + 1j * imag).astype(dtype), axis=axis, scale=0.3))
        assert y.dtype == dtype
        assert_same_bits(y.real, np.asarray(hadamard(real, axis=axis, scale=0.3)))
        assert_same_bits(y.imag, np.asarray(hadamard(imag, axis=axis, scale=0.3)))

    def test_one_part_does_not_leak_into_the_other(self):
        x = np.zeros((1, 4), np.complex64)
        x.real[0, 1] = np.inf
        assert not np.asarray(hadamard(x)).imag.any()


class TestRange:
    """The ends of each type's range."""

    @dtypes
    @lengths(1, 2, 16, 128, 1024)
    def test_subnormals_are_kept(self, n, dtype):
        smallest = float(jnp.finfo(dtype).smallest_subnormal)
        counts = rng("subnormal", n).integers(-3, 4, (5, n))
        # Exact in numpy: integer multiples of the smallest subnormal. Sums below the mantissa's width stay exact.
        counts[:, 4:] = 0
        x = (counts * smallest).astype(dtype)
        expected = (transform(counts.astype(np.float64), scale=1) * smallest).astype(dtype)
        assert_same_bits(np.abs(np.asarray(hadamard(x, scale=1))), np.abs(expected))

    @dtypes
    @lengths(2, 64, 256)
    def test_results_that_become_subnormal_are_rounded(self, n, dtype):
        smallest = np.longdouble(jnp.finfo(dtype).smallest_subnormal)
        counts = rng("become", n).integers(-40, 41, (7, n))
        x = (counts * smallest).astype(dtype)
        expected = round_to(transform(counts.astype(np.float64), scale=0.5) * smallest, dtype)
        np.testing.assert_array_equal(np.asarray(hadamard(x, scale=0.5)).astype(np.longdouble), expected)

    @lengths(32, 4096, 32768)
    @pytest.mark.parametrize("rows", [1, 5])
    def test_float16_sums_may_exceed_its_range(self, n, rows):
        x = np.full((rows, n), 60000, np.float16)
        scale = 1 / n
        y = np.asarray(hadamard(x, scale=scale))
        assert (y[:, 0] == 60000).all()
        assert not y[:, 1:].any()
        mixed = normal((rows, n), np.float16) * np.float16(8000)
        mixed[:, : n // 2] = 50000
        assert np.abs(transform(mixed, scale=1)).max() > 65504
        assert_within_bound(hadamard(mixed, scale=scale), mixed, scale)

    def test_float16_beyond_its_range_is_infinite(self):
        x = np.full((1, 4), 40000, np.float16)
        assert np.asarray(hadamard(x)).tolist() == [[np.inf, 0, 0, 0]]
        assert np.asarray(hadamard(-x)).tolist() == [[-np.inf, 0, 0, 0]]

    @lengths(2, 16, 128, 4096)
    def test_float16_rounds_to_its_largest_value(self, n):
        below, above = np.float32(65519), np.float32(65520)
        for value, expected in ((below, 65504), (above, np.inf)):
            x = np.zeros((1, n), np.float16)
            x[0, 0] = 32768
            y = np.asarray(hadamard(x, scale=float(value / 32768)))
            assert (y == expected).all()

    @pytest.mark.parametrize("dtype", [DTYPES[1], DTYPES[2]], ids=str)
    @lengths(2, 32, 1024, 32768)
    def test_up_to_the_promised_magnitude(self, n, dtype):
        x = (np.sign(normal((4, n), np.float32)) * np.float32(2.0**127 / n)).astype(dtype)
        x[0] = 2.0**127 / n
        y = hadamard(x)
        assert np.isfinite(np.asarray(y, np.float32)).all()
        assert_within_bound(y, x)
        assert np.asarray(hadamard(x, scale=1), np.float64)[0, 0] == 2.0**127


class TestNonFinite:
    """NaN and infinity spoil their own row and no other."""

    @dtypes
    @lengths(1, 2, 16, 64, 128, 512, 16384)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
    def test_stays_in_its_row(self, n, dtype, value):
        rows = 7 if n > 512 else 67
        x = normal((rows, n), dtype)
        clean = np.asarray(hadamard(x))
        bad = [0, rows // 2, rows - 1]
        spoilt = x.copy()
        spoilt[bad, [0, n // 2, n - 1]] = value
        y = np.asarray(hadamard(spoilt))
        assert not np.isfinite(y[bad].astype(np.float64)).any()
        assert_same_bits(np.delete(y, bad, 0), np.delete(clean, bad, 0))

    @halves
    def test_every_nan_stays_nan(self, dtype):
        exponent = 0x7C00 if dtype == np.float16 else 0x7F80
        payloads = np.arange(1, 0x10000 - 0x8000 - exponent, dtype=np.uint16)
        x = np.concatenate([exponent | payloads, 0x8000 | exponent | payloads]).view(dtype)[:, None]
        assert np.isnan(np.asarray(hadamard(x), np.float64)).all()


class TestShapes:
    @pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
    def test_every_axis_of_every_rank(self, rank):
        shape = (4, 8, 2, 16, 1)[:rank]
        x = rng("rank", rank).integers(-8, 9, shape).astype(np.float32)
        for axis in range(-rank, rank):
            y = np.asarray(hadamard(x, axis=axis, scale=1))
            np.testing.assert_array_equal(y, np.moveaxis(transform(np.moveaxis(x, axis, -1), scale=1), -1, axis))

    @pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (0, 0, 1), (2, 16, 0)], ids=str)
    @dtypes
    def test_arrays_without_elements(self, shape, dtype):
        axis = shape.index(16) if 16 in shape else -1
        y = hadamard(np.zeros(shape, dtype), axis=axis)
        assert (y.shape, y.dtype) == (shape, dtype)

    def test_more_dimensions_than_the_sharding_rule_has_letters(self):
        for rank in (18, 19, 21):
            x = normal((1,) * (rank - 2) + (3, 16), np.float32)
            assert_same_bits(np.asarray(hadamard(x)).reshape(3, 16), np.asarray(hadamard(x.reshape(3, 16))))

    def test_strided_views_of_numpy(self):
        x = normal((64, 96), np.float32)
        for view in (x.T, x[:, ::6], x[::-1, :64], np.broadcast_to(x[0, :32], (5, 32)), np.asfortranarray(x).T):
            assert_same_bits(np.asarray(hadamard(view)), np.asarray(hadamard(np.ascontiguousarray(view))))

    def test_transposed_arrays_inside_jit(self):
        x = normal((64, 128), np.float32)
        y = jax.jit(lambda x: hadamard(x.T))(x)
        assert_same_bits(np.asarray(y), np.asarray(hadamard(np.ascontiguousarray(x.T))))
        y = jax.jit(lambda x: hadamard(x.T).T)(x)
        assert_same_bits(np.asarray(y), np.asarray(hadamard(x, axis=0)))

    def test_numpy_jax_and_lists(self):
        x = normal((3, 8), np.float32)
        expected = np.asarray(hadamard(jnp.asarray(x)))
        assert isinstance(hadamard(x), jax.Array)
        assert_same_bits(np.asarray(hadamard(x)), expected)
        assert_same_bits(np.asarray(hadamard(x.tolist())), np.asarray(hadamard(x.astype(np.float64))))

    def test_the_result_is_not_weakly_typed(self):
        x = jnp.ones(4) * 1.0
        assert not hadamard(jax.lax.full_like(x, 2.0)).weak_type
        assert not jax.eval_shape(hadamard, jax.lax.full((4,), 2.0)).weak_type


@dtypes
def test_linear_on_integers(dtype):
    generator = rng("linear")
    a, b = (generator.integers(-4, 5, (9, 16)).astype(dtype) for _ in range(2))
    y = [np.asarray(hadamard(v, scale=1), np.float32) for v in (a, b, a + b)]
    np.testing.assert_array_equal(y[0] + y[1], y[2])


def test_pool_and_inline_agree():
    # Large arrays are shared out over threads, and rows are split unevenly where the count is odd.
    for rows, n in itertools.product((1, 2, 3, 1021), (512, 16384)):
        x = rng("pool", rows, n).integers(-8, 9, (min(rows, 301), n)).astype(np.float32)
        np.testing.assert_array_equal(hadamard(x, scale=1), transform(x, scale=1))


@pytest.mark.usefixtures("x64_off")
class TestWithout64Bits:
    def test_values(self):
        for dtype in DTYPES[:3]:
            x = normal((67, 64), dtype)
            assert_within_bound(hadamard(x), x)
            assert_within_bound(jax.jit(hadamard)(x), x)

    def test_docstring(self):
        module = sys.modules[hadamard.__module__]
        assert doctest.testmod(module).failed == 0
