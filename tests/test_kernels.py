"""The CUDA kernels alone, emulated and, with --require-gpu, on the GPU: values, bits, memory, launch geometry."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, HALVES, KINDS, assert_same_bits, data, dtypes, halves, lengths, normal, rng, rows_for
from kernels import LEAST_SHARED, MOST_SHARED
from oracle import HAS_WIDE_FLOAT64, bound, dense, error_in_roundings, round_to, signs, transform

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = DTYPES
LENGTHS = tuple(2**k for k in range(18))
SHORT = LENGTHS[:12]  # rows that one warp holds
REVERSE = 1
ORDERS = (REVERSE, 2, 3)  # of an emulated block's threads: the reverse of the default, and shuffled
# GPUs on which problems are small, and large, the latter also where blocks cannot meet and have little shared memory.
OLD_GPU = {"processors": 1, "shared_bytes": LEAST_SHARED, "clusters": False}
GPUS = ({}, {"processors": 1}, {"clusters": False}, OLD_GPU)


def assert_within_bound(y, x, scale=None):
    if y.dtype == FLOAT64 and not HAS_WIDE_FLOAT64:
        np.testing.assert_allclose(y, transform(x, scale), rtol=0, atol=1e-15 * math.sqrt(np.sum(x * x)))
        return
    assert error_in_roundings(y, transform(x, scale), y.dtype) <= bound(y.dtype, x.shape[-1])


class TestValues:
    @dtypes
    @lengths(*LENGTHS)
    def test_error_is_within_the_bound(self, kernel, n, dtype):
        x = normal((rows_for(n), n), dtype)
        assert_within_bound(kernel(x), x)

    @dtypes
    @lengths(8, 128, 512)
    @pytest.mark.parametrize("kind", KINDS)
    def test_error_is_within_the_bound_for_other_data(self, kernel, kind, n, dtype):
        x = data(kind, (max(257, rows_for(n)), n), dtype)
        assert_within_bound(kernel(x), x)

    @halves
    @lengths(2048, 4096, 32768, 65536)
    @pytest.mark.parametrize("kind", KINDS)
    def test_error_is_within_the_bound_for_other_data_in_long_rows(self, kernel, kind, n, dtype):
        x = data(kind, (rows_for(n), n), dtype)
        assert_within_bound(kernel(x), x)

    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
    @lengths(*LENGTHS)
    def test_sums_are_butterflies_in_the_order_of_their_strides(self, kernel, n, dtype):
        x = normal((2048 // n + 3, n), dtype)
        expected = x
        for h in (2**k for k in range(n.bit_length() - 1)):
            pairs = expected.reshape(-1, 2, h)
            expected = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        assert_same_bits(kernel(x), expected.reshape(x.shape) * dtype.type(n**-0.5))

    @pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
    @lengths(2**18, 2**19, 2**20, 2**21)
    def test_very_long_rows(self, kernel, n, dtype):
        x = normal((1, n), dtype)
        y = kernel(x)
        assert_within_bound(y, x)
        assert_same_bits(kernel(x, offsets=(0, 1)), y)

    @dtypes
    @lengths(*(n for n in LENGTHS if n <= 256))
    def test_one_hot_rows_are_rows_of_the_matrix(self, kernel, n, dtype):
        y = kernel(np.eye(n, dtype=np.float32).astype(dtype), scale=1)
        assert_same_bits(y, dense(n).astype(dtype))

    @dtypes
    @lengths(*(n for n in LENGTHS if n > 256))
    def test_one_hot_in_a_long_row(self, kernel, n, dtype):
        # Every bit of the position, so that every butterfly stage moves one.
        positions = np.array([0, n - 1, *(2**k for k in range(n.bit_length() - 1))])[: 2**19 // n]
        x = np.zeros((len(positions), n), dtype)
        x[np.arange(len(positions)), positions] = 1
        assert_same_bits(kernel(x, scale=1), signs(positions[:, None], np.arange(n)[None, :]).astype(dtype))

    @dtypes
    @lengths(*LENGTHS)
    def test_integers_are_rounded_once(self, kernel, n, dtype):
        x = rng("integers", n).integers(-3, 4, (rows_for(n), n)).astype(dtype)
        expected = round_to(transform(x, 0.125), dtype)
        np.testing.assert_array_equal(kernel(x, scale=0.125).astype(expected.dtype), expected)

    @lengths(*LENGTHS)
    def test_float16_sums_may_exceed_its_range(self, kernel, n):
        generator = rng("large", n)
        x = generator.uniform(40000, 65504, (rows_for(n), n)).astype(FLOAT16)
        assert_within_bound(kernel(x, scale=1 / n), x, 1 / n)
        x = np.full((2, n), 65504, FLOAT16)
        x[1] *= 1 - 2 * (np.arange(n) % 2).astype(FLOAT16)
        assert_same_bits(kernel(x, scale=1 / n), (transform(x, 1 / n)).astype(FLOAT16))

    @dtypes
    @lengths(1, 2, 32, 256, 1024, 4096, 16384, 65536)
    def test_subnormals_are_kept(self, kernel, n, dtype):
        # Of the wide types, so few units that all sums are exact.
        units = {FLOAT16: 2**10, BFLOAT16: 2**7}.get(dtype, 2**6)
        x = rng("subnormal", n, str(dtype)).integers(0, units, (rows_for(n), n), f"u{dtype.itemsize}").view(dtype)
        expected = transform(x, 1)
        assert expected.any()
        y = kernel(x, scale=1)
        if dtype in HALVES:
            assert_within_bound(y, x, 1)
        else:
            np.testing.assert_array_equal(y, expected.astype(dtype))

    @halves
    def test_every_16_bit_value_is_read_and_written(self, kernel, dtype):
        x = np.arange(2**16, dtype=np.uint16).view(dtype)[:, None]
        finite = np.isfinite(x.astype(np.float32))
        y = kernel(x)
        np.testing.assert_array_equal(y[finite].astype(np.float32), x[finite].astype(np.float32))
        assert not np.isfinite(y[~finite].astype(np.float32)).any()


class TestBitsDependOnTheRowAlone:
    @dtypes
    @lengths(*SHORT)
    def test_number_and_position_of_short_rows(self, kernel, emulator, n, dtype):
        (launch,) = emulator.plan(dtype, n, 1)
        block = launch.per_block
        warp = block // (launch.threads // 32) or 1
        x = normal((block + warp + 3, n), dtype)
        whole = kernel(x)
        around = (warp - 1, warp, warp + 1, block - 1, block, block + 1)
        for rows in {1, 2, 3, 5, *around} - {0}:
            assert_same_bits(kernel(x[:rows]), whole[:rows])
        for first in (1, warp + 1, block):
            assert_same_bits(kernel(x[first:]), whole[first:])

    @dtypes
    @lengths(*LENGTHS[12:])
    def test_number_and_position_of_long_rows(self, kernel, n, dtype):
        x = normal((5 if n <= 32768 else 2, n), dtype)
        whole = kernel(x)
        for rows in (1, 2, 3):
            assert_same_bits(kernel(x[:rows]), whole[:rows])
        assert_same_bits(kernel(x[1:]), whole[1:])

    @dtypes
    @lengths(*LENGTHS)
    def test_way_to_run(self, kernel, n, dtype):
        x = normal((2048 // n + 3 if n <= 4096 else 2 if n <= 32768 else 1, n), dtype)
        expected = kernel(x)
        # Where blocks cannot meet, rows of 65536 take two passes, whose order of sums is another.
        one_pass = dtype in HALVES and n == 65536
        for gpu in [gpu for gpu in GPUS if gpu.get("clusters", True)] if one_pass else GPUS:
            for order in (0, *ORDERS):
                assert_same_bits(kernel(x, order=order, **gpu), expected)
            assert_same_bits(kernel(x, inplace=True, **gpu), expected)
        for offsets in ((0, 1), (1, 0), (3, 5)):
            assert_same_bits(kernel(x, offsets=offsets, order=REVERSE), expected)
        assert_same_bits(kernel(x, inplace=True, offsets=(1, 1), order=REVERSE), expected)

    @dtypes
    @lengths(*SHORT[:11])
    def test_number_of_rows_on_a_small_gpu(self, kernel, n, dtype):
        # Every tail of a warp and a block: few rows, and as many as go to the kernel for many.
        x = normal((3000 // n + 3, n), dtype)
        expected = kernel(x)
        for rows in {len(x), len(x) - 1, len(x) - 2, 2048 // n, 2048 // n + 1}:
            assert_same_bits(kernel(x[:rows], processors=1), expected[:rows])

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @lengths(16384, 32768)
    def test_several_rows_to_a_block(self, emulator, n, dtype):
        plans = [emulator.plan(dtype, n, rows, 1)[0] for rows in range(1, 20)]
        assert [plans[0].per_block, max(plan.per_block for plan in plans)] == [1, 2]
        assert any(plan.run_rows > 2 for plan in plans) == (n == 32768 or dtype in HALVES)
        for rows in (2, 3, 4, 7):
            x = normal((rows, n), dtype)
            expected = emulator(x)
            assert_same_bits(emulator(x, processors=1), expected)
            assert_same_bits(emulator(x, processors=1, inplace=True, order=REVERSE), expected)

    @halves
    @lengths(4096, 8192, 16384, 32768, 65536)
    def test_two_blocks_to_a_row(self, emulator, n, dtype):
        (plan,) = emulator.plan(dtype, n, 2)
        assert plan.blocks == 2 * plan.blocks_per_row == 4
        in_place = emulator.plan(dtype, n, 2, clusters=False, inplace=True)
        assert all(launch.blocks_per_row == 1 for launch in in_place[-1:])  # of the halves of a row in one array
        x = normal((2, n), dtype)
        expected = emulator(x)
        for order in ORDERS:
            assert_same_bits(emulator(x, inplace=True, order=order), expected)

    @halves
    def test_rows_of_65536_in_two_passes(self, emulator, dtype):
        x = normal((2, 65536), dtype)
        y = emulator(x, **OLD_GPU)
        assert_within_bound(y, x)
        assert_same_bits(emulator(x, inplace=True, **OLD_GPU), y)


@dtypes
@lengths(*LENGTHS[:16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_non_finite_values_stay_in_their_row(kernel, n, dtype, value):
    x = normal((4096 // n + 3, n), dtype)
    clean = kernel(x)
    spoilt = x.copy()
    bad = np.arange(0, len(x), 3)
    # Every column of a fragment over the rows, with now and then a second one in the row.
    spoilt[bad, 5 * bad % n] = value
    spoilt[bad[::2], (bad[::2] + n // 2) % n] = value
    for way in ({}, {"offsets": (1, 1)}, {"processors": 1}):
        y = kernel(spoilt, **way)
        assert not np.isfinite(y[bad].astype(np.float64)).any()
        assert_same_bits(np.delete(y, bad, 0), np.delete(clean, bad, 0))


@dtypes
@lengths(*SHORT)
def test_small_rows_among_large_ones(kernel, n, dtype):
    # The smallest subnormals beside rows that are as large as their own sums allow.
    info = ml_dtypes.finfo(dtype)
    x = (rng("small", n).integers(-100, 101, (4096 // n + 3, n)) * float(info.smallest_subnormal)).astype(dtype)
    clean = kernel(x, scale=1)
    x[::3] = info.max if dtype == FLOAT16 else dtype.type(float(info.max) / (2 * n))
    for processors in (1, 1000):
        y = kernel(x, scale=1, processors=processors)
        assert_same_bits(np.delete(y, np.s_[::3], 0), np.delete(clean, np.s_[::3], 0))


@dtypes
@lengths(*SHORT)
def test_sums_beyond_float32_stay_in_their_row(kernel, n, dtype):
    x = normal((4096 // n + 3, n), dtype)
    clean = kernel(x)
    x[::3] = ml_dtypes.finfo(dtype).max
    for processors in (1, 1000):
        assert_same_bits(np.delete(kernel(x, processors=processors), np.s_[::3], 0), np.delete(clean, np.s_[::3], 0))


@lengths(*SHORT)
def test_the_largest_rows_of_the_domain(kernel, n):
    x = normal((4096 // n + 3, n), BFLOAT16)
    clean = kernel(x)
    x[::3] = (np.clip(x[::3].astype(np.float64), -3.9, 3.9) * (2.0**125 / n)).astype(BFLOAT16)
    y = kernel(x)
    assert_same_bits(np.delete(y, np.s_[::3], 0), np.delete(clean, np.s_[::3], 0))
    assert error_in_roundings(y[::3], transform(x[::3]), BFLOAT16) <= bound(BFLOAT16, n)
    for row in range(0, len(x), 3):  # alone it has the same bits
        assert_same_bits(kernel(x[row : row + 1]), y[row : row + 1])


@dtypes
@lengths(*(2**k for k in range(25)))
def test_launches_are_possible(emulator, n, dtype):
    for elements in (n, 3 * n, 2**24 + n, 2**33):
        rows = elements // n
        ways = itertools.product((1, 132, 10**6), (LEAST_SHARED, MOST_SHARED), (False, True), (False, True))
        for processors, shared_bytes, clusters, inplace in ways:
            launches = emulator.plan(dtype, n, rows, processors, shared_bytes, clusters=clusters, inplace=inplace)
            assert math.prod(launch.n for launch in launches) == n
            for launch in launches:
                assert launch.count * launch.n == rows * n
                assert 0 <= launch.shared_bytes <= shared_bytes
                assert 0 < launch.threads <= 1024
                assert launch.threads % 32 == 0
                assert launch.per_block > 0
                assert 0 < launch.blocks < 2**31
                assert launch.blocks % launch.blocks_per_row == 0
                blocks = launch.blocks // launch.blocks_per_row
                in_runs = launch.runs * launch.run_rows
                assert 0 <= in_runs <= launch.count
                assert in_runs == 0 or launch.run_rows > 1
                left = launch.count - in_runs
                assert (blocks - launch.runs - 1) * launch.per_block < left <= (blocks - launch.runs) * launch.per_block
                # A block's columns are in one tile, whose columns are shared out evenly.
                assert launch.stride == 1 or launch.stride % launch.per_block == 0
