"""The CUDA kernels of powers of two with signs, emulated and, with --require-gpu, on the GPU."""

import numpy as np
import pytest
from cases import DTYPES, HALVES, assert_same_bits, bits, dtypes, lengths, normal, rng
from kernels import LEAST_SHARED, MOST_SHARED
from oracle import HAS_WIDE_FLOAT64, bound, error_in_roundings, transform

FLOAT32, FLOAT64 = DTYPES[2:]
LENGTHS = tuple(2**k for k in range(16))  # of rows that one launch transforms, signs included
REVERSE = 1

fused_dtypes = pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
first_and_last = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def random_signs(n):
    """Both, unless there is one only: a minus."""
    signs = rng("signs", n).choice(np.array([-1, 1], np.int8), n)
    signs[n // 2], signs[0] = 1, -1
    return signs


def flip(x, signs):
    """Changes signs bit by bit, those of NaN as well."""
    raw = bits(x)
    return (raw ^ (signs < 0).astype(raw.dtype) << 8 * x.dtype.itemsize - 1).view(x.dtype)


def plainly(kernel, x, signs, *, last, **how):
    """A transform without signs, and the signs before it or after it."""
    return flip(kernel(x, **how), signs) if last else kernel(flip(x, signs), **how)


def rows_for(n):
    return 4096 // n + 3 if n <= 1024 else 2


class TestValues:
    @dtypes
    @lengths(1, 2, 4, 16, 32, 256, 1024, 4096)
    @first_and_last
    def test_error_is_within_the_bound(self, kernel, n, dtype, last):
        x, signs = normal((rows_for(n), n), dtype), random_signs(n)
        y = kernel(x, signs=signs, signs_last=last)
        exact = transform(x) * signs if last else transform(x * signs.astype(dtype))
        if dtype == FLOAT64 and not HAS_WIDE_FLOAT64:
            np.testing.assert_allclose(y, exact, rtol=0, atol=1e-14 * abs(exact).max())
        else:
            assert error_in_roundings(y, exact, dtype) <= bound(dtype, n)

    @dtypes
    @lengths(*LENGTHS)
    @first_and_last
    def test_signs_change_nothing_else(self, kernel, n, dtype, last):
        x, signs = normal((rows_for(n), n), dtype), random_signs(n)
        expected = plainly(kernel, x, signs, last=last)
        how = {"signs": signs, "signs_last": last}
        assert_same_bits(kernel(x, **how), expected)
        assert_same_bits(kernel(x, **how, signs_on_device=True, order=REVERSE), expected)
        assert_same_bits(kernel(x, **how, inplace=True), expected)

    @dtypes
    @lengths(1, 8, 64, 512, 2048)
    @first_and_last
    def test_unaligned_rows(self, kernel, n, dtype, last):
        x, signs = normal((3, n), dtype), random_signs(n)
        expected = plainly(kernel, x, signs, last=last)
        for offsets in ((1, 0), (0, 1)):
            assert_same_bits(kernel(x, signs=signs, signs_last=last, offsets=offsets), expected)

    @fused_dtypes
    @lengths(*LENGTHS[:11])
    @first_and_last
    def test_number_of_rows(self, kernel, n, dtype, last):
        # Every tail of a warp and a block.
        x, signs = normal((2048 // n + 3, n), dtype), random_signs(n)
        expected = plainly(kernel, x, signs, last=last)
        for rows in {1, 2, 2048 // n, 2048 // n + 1}:
            assert_same_bits(kernel(x[:rows], signs=signs, signs_last=last), expected[:rows])

    @fused_dtypes
    @lengths(16384, 32768)
    @first_and_last
    @pytest.mark.parametrize("shared_bytes", [LEAST_SHARED, MOST_SHARED])
    def test_several_rows_to_a_block(self, emulator, n, dtype, last, shared_bytes):
        x, signs = normal((4, n), dtype), random_signs(n)
        gpu = {"processors": 1, "shared_bytes": shared_bytes}
        how = {"signs": signs, "signs_last": last, "signs_on_device": last}
        assert_same_bits(emulator(x, **how, **gpu), plainly(emulator, x, signs, last=last))

    @fused_dtypes
    @lengths(*LENGTHS[:12])
    @first_and_last
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
    def test_non_finite_values(self, kernel, n, dtype, last, value):
        x, signs = normal((2048 // n + 3, n), dtype), random_signs(n)
        bad = np.arange(0, len(x), 3)
        x[bad, 5 * bad % n] = value
        x[bad[::2], (bad[::2] + n // 2) % n] = value
        y = kernel(x, signs=signs, signs_last=last)
        assert_same_bits(y, plainly(kernel, x, signs, last=last))
        assert np.isfinite(np.delete(y, bad, 0).astype(np.float64)).all()


class TestPlan:
    @fused_dtypes
    @lengths(*LENGTHS)
    def test_one_launch(self, emulator, n, dtype):
        for rows in (1, 3, 2**24 // n):
            for processors, shared_bytes in ((1, LEAST_SHARED), (132, MOST_SHARED)):
                for inplace in (False, True):
                    gpu = {"processors": processors, "shared_bytes": shared_bytes, "inplace": inplace}
                    (launch,) = emulator.plan(dtype, n, rows, **gpu, signs=random_signs(n))
                    assert (launch.n, launch.count) == (n, rows)
                    assert launch.words == launch.most_words == max(n // 32, 1)
                    assert launch.shared_bytes <= shared_bytes
                    (launch,) = emulator.plan(dtype, n, rows, **gpu, signs=random_signs(n), signs_on_device=True)
                    assert launch.words == 0

    @pytest.mark.parametrize(("dtype", "n"), [(FLOAT64, 64), (FLOAT32, 65536), *((half, 65536) for half in HALVES)])
    def test_a_launch_of_their_own(self, emulator, dtype, n):
        without, launches = emulator.plan(dtype, n, 3), emulator.plan(dtype, n, 3, signs=random_signs(n))
        assert len(launches) == len(without) + 1
