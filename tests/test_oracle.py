"""The oracle itself: its fast path against the definition, and its rounding against hardware conversions."""

import math

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, dtypes, halves, lengths, normal, rng
from oracle import dense, error_in_roundings, round_to, signs, transform


def test_dense_is_the_definition():
    expected = [[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert dense(16).tolist() == expected


@lengths(1, 2, 32, 64, 2048, 12, 80, 864)
def test_fast_path_is_the_dense_product(n):
    x = rng("integers", n).integers(-1000, 1000, (3, n)).astype(np.float64)
    np.testing.assert_array_equal(transform(x, scale=1), x @ dense(n).astype(np.float64))


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
def test_options_are_those_of_the_dense_product(transpose):
    generator = rng("options", transpose)
    x, matrix = generator.standard_normal((3, 4 * 24)), generator.standard_normal((6, 6))
    flips = 2 * generator.integers(2, size=24) - 1
    for slow, options in ((None, {}), (matrix, {"matrix": matrix})):
        map_ = (dense(24) if slow is None else np.kron(slow, dense(4))) * flips
        map_ = map_.T if transpose else map_
        y = transform(x, 0.3, length=24, signs=flips, transpose=transpose, **options)
        np.testing.assert_allclose(y.reshape(3, 4, 24), 0.3 * x.reshape(3, 4, 24) @ map_.T, atol=1e-12)


def test_the_default_scale_keeps_lengths():
    x = rng("norm").standard_normal((3, 48))
    orthogonal = np.linalg.qr(rng("orthogonal").standard_normal((6, 6)))[0]
    for options in ({}, {"length": 24}, {"matrix": 5 * orthogonal}):
        np.testing.assert_allclose(np.linalg.norm(transform(x, **options), axis=1), np.linalg.norm(x, axis=1))


def test_fast_path_has_the_elements_of_a_long_row():
    n = 2**20
    x = rng("long").integers(-1000, 1000, n).astype(np.float32)
    y = transform(x, scale=1)
    index = np.arange(n)
    for i in (0, 1, 2, 524287, 524288, 987654, n - 1):
        assert y[i] == np.sum(signs(i, index) * x.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
def test_rounding_is_that_of_the_hardware(dtype):
    edges = [0.0, 65503.9, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 3.4028235677973366e38, 3.5e38, 1e-45]
    magnitudes = 10.0 ** rng("rounding").uniform(-50, 45, 10000)
    y = np.concatenate([magnitudes, edges, np.negative(edges)])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_to(y, dtype), y.astype(dtype).astype(np.float64))


def test_rounding_to_bfloat16_is_one_rounding():
    y = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8, 3.4e38, -(2.0**-134), -1.5 * 2.0**-133])
    expected = [1, 1 + 2.0**-7, 1 + 2.0**-6, np.inf, 0, -(2.0**-132)]
    np.testing.assert_array_equal(round_to(y, ml_dtypes.bfloat16), expected)
    single = normal((10000,), np.float32)
    np.testing.assert_array_equal(
        round_to(single.astype(np.float64), ml_dtypes.bfloat16), single.astype(ml_dtypes.bfloat16).astype(np.float64)
    )


@halves
def test_a_result_rounded_once_has_error_one(dtype):
    exact = rng("one").standard_normal(1000)
    assert error_in_roundings(round_to(exact, dtype).astype(dtype), exact, dtype) == 1
    unit = 2.0 ** -ml_dtypes.finfo(dtype).nmant
    assert error_in_roundings(round_to(exact * (1 + unit), dtype).astype(dtype), exact, dtype) > 1.5


@dtypes
def test_where_nothing_is_to_be_rounded_only_exact_results_pass(dtype):
    y = np.ones(4, dtype)
    assert error_in_roundings(y, np.ones(4, np.longdouble), dtype) == 0
    assert error_in_roundings(y, np.full(4, 2, np.longdouble), dtype) == math.inf


def test_every_type_of_the_library_has_a_rounding():
    for dtype in DTYPES:
        assert round_to(np.longdouble(1) / 3, dtype) == pytest.approx(1 / 3, rel=0.01)
