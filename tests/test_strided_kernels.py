"""The CUDA kernels of columns, emulated and, with --require-gpu, on the GPU: an axis that is not the last."""

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, lengths, normal
from kernels import Request
from oracle import paley

from jax_hadacore._primitive import _CUDA_COLUMNS

FLOAT16, BFLOAT16, FLOAT32, _ = DTYPES
LENGTHS = {FLOAT16: (8, 16, 32, 64, 128, 256), BFLOAT16: (8, 16, 32, 64, 128, 256), FLOAT32: (8, 16, 32, 64, 128)}
CASES = pytest.mark.parametrize(("dtype", "n"), [(d, n) for d, ns in LENGTHS.items() for n in ns], ids=str)
# Whole pieces and parts of one, aligned and not, with neighbours of another tile.
STRIDES = (2, 7, 8, 32, 40, 63, 64, 104, 128, 200)
REVERSE = 1


def as_rows(tiles):
    """Tiles (tiles, n, stride) as the rows that their columns are."""
    return np.ascontiguousarray(np.moveaxis(tiles, 1, -1)).reshape(-1, tiles.shape[1])


def columns_of(rows, shape):
    tiles, n, stride = shape
    return np.moveaxis(rows.reshape(tiles, stride, n), -1, 1)


@CASES
def test_a_column_has_the_bits_of_a_row(kernel, dtype, n):
    for stride in STRIDES:
        x = normal((3, n, stride), dtype)
        assert_same_bits(kernel(x), columns_of(kernel(as_rows(x)), x.shape))


@CASES
def test_way_to_run(kernel, dtype, n):
    for stride in (31, 72):
        x = normal((5, n, stride), dtype)
        expected = kernel(x, scale=0.3)
        for order in (REVERSE, 2):
            assert_same_bits(kernel(x, scale=0.3, order=order), expected)
        assert_same_bits(kernel(x, scale=0.3, inplace=True, order=REVERSE), expected)
        for offsets in ((0, 1), (1, 0), (3, 5)):
            assert_same_bits(kernel(x, scale=0.3, offsets=offsets), expected)
        assert_same_bits(kernel(x, scale=0.3, inplace=True, offsets=(1, 1)), expected)


@CASES
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_non_finite_values_stay_in_their_column(kernel, dtype, n, value):
    for stride in (136, 63, 7):
        x = normal((2, n, stride), dtype)
        bad = np.arange(0, stride, 3)
        clean = kernel(x)
        x[0, 5 * bad % n, bad] = value
        y = kernel(x, scale=-0.3)
        assert_same_bits(y, columns_of(kernel(as_rows(x), scale=-0.3), x.shape))
        assert not np.isfinite(y[0][:, bad].astype(np.float32)).any()
        y = kernel(x)
        assert_same_bits(y[1], clean[1])
        assert_same_bits(np.delete(y[0], bad, -1), np.delete(clean[0], bad, -1))


@CASES
def test_zeros_keep_their_sign(kernel, dtype, n):
    for stride in (40, 7):
        x = np.zeros((1, n, stride), dtype)
        assert_same_bits(kernel(x, scale=-0.3), columns_of(kernel(as_rows(x), scale=-0.3), x.shape))


def test_calls_are_given_what_the_kernels_take(emulator):
    for dtype in DTYPES:
        least, most = _CUDA_COLUMNS.get(dtype.itemsize, (0, -1))
        for n in (2**k for k in range(12)):
            assert emulator.takes_stride(Request(dtype, n, 64, stride=64)) == (least <= n <= most)
    assert not emulator.takes_stride(Request(FLOAT32, 64, 64, stride=64, signs=np.ones(64)))
    assert not emulator.takes_stride(Request(FLOAT32, 24, 64, stride=64, factors=(paley(12),)))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@lengths(8, 64, 128)
def test_launches(emulator, dtype, n):
    for stride in (32, 100, 128, 2**20):
        for tiles in (1, 1000):
            (launch,) = emulator.plan(dtype, n, tiles * stride, stride=stride)
            assert (launch.n, launch.stride, launch.count) == (n, stride, tiles * stride)
            assert launch.shared_bytes <= 48 * 1024
            assert 0 < launch.blocks < 2**31
