"""The CUDA kernels of lengths that are no powers of two, and of signs, emulated and, with --require-gpu, on the GPU."""

import math

import numpy as np
import pytest
from cases import DTYPES, HALVES, MODEL_DIMENSIONS, assert_same_bits, dtypes, halves, normal, rng
from kernels import LEAST_SHARED, MOST_SHARED, Request
from oracle import HAS_WIDE_FLOAT64, decompose, dense, error_in_roundings, wide
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
lengths = pytest.mark.parametrize(("orders", "power"), [*FUSED, *COMPOSED], ids=str)
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

    @dtypes
    @pytest.mark.parametrize(
        ("orders", "power"), [((6,), 1), ((12,), 1), ((20,), 4), ((28,), 32), ((12,), 128), ((36, 76), 4)], ids=str
    )
    @pytest.mark.parametrize("signs_last", [False, True], ids=["first", "last"])
    def test_signs_of_unaligned_rows(self, kernel, orders, power, dtype, signs_last):
        n = int(np.prod(orders)) * power
        x, how = problem(orders, power, dtype, rows_for(n))
        how |= {"signs": random_signs(n), "signs_last": signs_last}
        plain = {name: how[name] for name in ("factors", "scale")}
        signs = how["signs"].astype(dtype)
        expected = kernel(x, **plain) * signs if signs_last else kernel(x * signs, **plain)
        assert_same_bits(kernel(x, **how), expected)
        assert_same_bits(kernel(x, **how, offsets=(1, 3)), expected)


class TestMemory:
    @halves
    @fused_lengths
    def test_in_place_unaligned_and_in_any_order(self, kernel, orders, power, dtype):
        x, how = problem(orders, power, dtype, 3)
        expected = kernel(x, **how)
        assert_same_bits(kernel(x, **how, inplace=True, order=REVERSE), expected)
        assert_same_bits(kernel(x, **how, offsets=(1, 3)), expected)

    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
    @pytest.mark.parametrize(("orders", "power"), [((28,), 32), ((12,), 2), ((44,), 16), ((12, 36), 4)], ids=str)
    def test_in_place_and_unaligned_in_wide_types(self, kernel, orders, power, dtype):
        x, how = problem(orders, power, dtype, 5)
        expected = kernel(x, **how)
        assert_same_bits(kernel(x, **how, inplace=True), expected)
        assert_same_bits(kernel(x, **how, offsets=(1, 1)), expected)


class TestRows:
    @halves
    @pytest.mark.parametrize(
        ("orders", "power"), [((12,), 1), ((20,), 4), ((28,), 32), ((12,), 128), ((36, 76), 4)], ids=str
    )
    def test_do_not_depend_on_the_batch(self, kernel, orders, power, dtype):
        n = math.prod(orders) * power
        x, how = problem(orders, power, dtype, rows_for(n))
        whole = kernel(x, **how, processors=1)
        for rows in (1, 2, len(x) - 1):
            assert_same_bits(kernel(x[:rows], **how), whole[:rows])
        assert_same_bits(kernel(x[1:], **how, processors=1, shared_bytes=LEAST_SHARED), whole[1:])

    @dtypes
    @pytest.mark.parametrize(
        ("orders", "power"),
        [((12,), 1), ((20,), 4), ((12,), 8), ((28,), 32), ((12,), 128), ((36, 76), 4), ((12, 52), 32)],
        ids=str,
    )
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_that_are_not_finite_leave_others_alone(self, kernel, orders, power, dtype, bad):
        n = math.prod(orders) * power
        x, how = problem(orders, power, dtype, 20 if n < 2000 else 3)
        clean = kernel(x, **how, processors=1)
        spoilt = x.copy()
        spoilt[1::3, n // 3] = bad
        y = kernel(spoilt, **how, processors=1)
        assert not np.isfinite(y[1::3].astype(np.float64)).any()
        assert_same_bits(np.delete(y, np.s_[1::3], 0), np.delete(clean, np.s_[1::3], 0))


# Of order_ring.cuh, in 16, 8 and 4 columns: whole tiles, and 1 to 3 quarters of one; 344 has its matrix as words. And
# of pair_ring.cuh.
RING = (
    ((28,), 256),
    ((12,), 1024),
    ((36,), 256),
    ((100,), 64),
    ((140,), 64),
    ((344,), 32),
    ((36, 76), 4),
    ((44, 84), 8),
    ((12, 52), 16),
    ((12, 52), 32),
)
# So much shared memory has room for two or three parts of most rings.
NARROW = 100 * 1024


@halves
@pytest.mark.parametrize(("orders", "power"), RING, ids=str)
class TestRing:
    def test_error_is_within_the_bound(self, kernel, orders, power, dtype):
        x, how = problem(orders, power, dtype, 5)
        assert_within_bound(kernel(x, **how, warp_groups=True, processors=2), x, **how)

    def test_rows_do_not_depend_on_the_batch(self, kernel, orders, power, dtype):
        x, how = problem(orders, power, dtype, 9)
        how["warp_groups"] = True
        whole = kernel(x, **how)
        assert_same_bits(kernel(x, **how, processors=1, order=2), whole)
        assert_same_bits(kernel(x[4:5], **how), whole[4:5])

    def test_in_place_and_unaligned(self, kernel, orders, power, dtype):
        x, how = problem(orders, power, dtype, 5)
        how["warp_groups"] = True
        expected = kernel(x, **how)
        assert_same_bits(kernel(x, **how, processors=1, inplace=True, order=REVERSE), expected)
        assert_same_bits(kernel(x, **how, processors=1, offsets=(1, 3)), expected)

    @pytest.mark.parametrize("signs_last", [False, True], ids=["first", "last"])
    def test_signs(self, kernel, orders, power, dtype, signs_last):
        x, how = problem(orders, power, dtype, 5)
        how["warp_groups"] = True
        signs = random_signs(x.shape[1])
        flipped = signs.astype(dtype)
        expected = kernel(x, **how) * flipped if signs_last else kernel(x * flipped, **how)
        how |= {"signs": signs, "signs_last": signs_last}
        assert_same_bits(kernel(x, **how, processors=1), expected)
        assert_same_bits(kernel(x, **how, processors=1, signs_on_device=True, offsets=(3, 1)), expected)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_rows_that_are_not_finite_leave_others_alone(self, kernel, orders, power, dtype, bad):
        x, how = problem(orders, power, dtype, 9)
        how |= {"warp_groups": True, "processors": 1}
        clean = kernel(x, **how)
        spoilt = x.copy()
        spoilt[1::3, -1] = bad
        y = kernel(spoilt, **how)
        assert not np.isfinite(y[1::3].astype(np.float64)).any()
        assert_same_bits(np.delete(y, np.s_[1::3], 0), np.delete(clean, np.s_[1::3], 0))


@halves
def test_a_ring_whose_results_leave_in_halves(kernel, dtype):
    x, how = problem((28,), 1024, dtype, 3)
    assert_within_bound(kernel(x, **how, warp_groups=True, processors=1), x, **how)


@halves
@pytest.mark.parametrize(("orders", "power", "shared_bytes"), [((28,), 256, NARROW), ((12, 52), 16, 132 * 1024)])
def test_a_ring_of_few_parts_is_used_again(kernel, orders, power, shared_bytes, dtype):
    x, how = problem(orders, power, dtype, 20)
    how["warp_groups"] = True
    assert_same_bits(kernel(x, **how, processors=1, shared_bytes=shared_bytes, order=2), kernel(x, **how))


# Of order_floats.cuh: orders of each instance, with powers that come straight from memory, and all numbers of spans.
FLOATS = (((4,), 32), ((12,), 128), ((20,), 64), ((28,), 256), ((36,), 32), ((44,), 512), ((60,), 64), ((76,), 32))
FLOATS += (((84,), 32), ((100,), 32), ((116,), 32), ((140,), 32), ((148,), 64), ((172,), 32), ((180,), 32))


@pytest.mark.parametrize(("orders", "power"), FLOATS, ids=str)
class TestFloats:
    def test_error_is_within_the_bound(self, kernel, orders, power):
        x, how = problem(orders, power, FLOAT32, 3)
        assert_within_bound(kernel(x, **how, processors=1), x, **how)

    def test_rows_depend_neither_on_the_batch_nor_on_alignment(self, kernel, orders, power):
        x, how = problem(orders, power, FLOAT32, 4)
        whole = kernel(x, **how, processors=1)
        assert_same_bits(kernel(x[2:3], **how), whole[2:3])
        assert_same_bits(kernel(x, **how, processors=1, offsets=(1, 3), order=REVERSE), whole)
        assert_same_bits(kernel(x, **how, processors=1, inplace=True), whole)

    @pytest.mark.parametrize("signs_last", [False, True], ids=["first", "last"])
    def test_signs(self, kernel, orders, power, signs_last):
        x, how = problem(orders, power, FLOAT32, 2)
        signs = random_signs(x.shape[1])
        expected = kernel(x, **how) * signs.astype(x.dtype) if signs_last else kernel(x * signs.astype(x.dtype), **how)
        how |= {"signs": signs, "signs_last": signs_last}
        assert_same_bits(kernel(x, **how), expected)
        assert_same_bits(kernel(x, **how, signs_on_device=True, offsets=(1, 1)), expected)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("orders", "power"), [((12,), 2), ((20,), 8), ((28,), 32), ((60,), 32)], ids=str)
class TestFloatsOfAnySize:
    def test_subnormal_numbers_are_kept(self, kernel, orders, power, offset):
        n = math.prod(orders) * power
        factors = (factor(*orders),)
        counts = rng("counts", n).integers(-9, 10, (5, n)).astype(FLOAT32)
        exact_counts = exact(counts, factors, 1)
        tiny = FLOAT32.type(2**-149)
        y = kernel(counts * tiny, factors=factors, scale=1, offsets=(offset, offset), processors=1)
        np.testing.assert_array_equal(y, (exact_counts * float(tiny)).astype(FLOAT32))

    def test_single_elements_come_out_as_signs(self, kernel, orders, power, offset):
        n = math.prod(orders) * power
        x = np.zeros((5, n), FLOAT32)
        x[range(5), [0, n // 3, n // 2, n - 2, n - 1]] = [1, 2**-149, -(2**-140), 2**127 / n, 1.7]
        factors = (factor(*orders),)
        y = kernel(x, factors=factors, scale=1, offsets=(offset, offset), processors=1)
        np.testing.assert_array_equal(y, exact(x, factors, 1).astype(FLOAT32))

    def test_rows_of_all_sizes_leave_each_other_alone(self, kernel, orders, power, offset):
        n = math.prod(orders) * power
        x, how = problem(orders, power, FLOAT32, 12)
        x[::3] *= FLOAT32.type(2**-120)
        x[1::3] *= FLOAT32.type(2**126 / n)
        how["scale"] = 1
        y = kernel(x, **how, offsets=(offset, offset), processors=1)
        assert np.isfinite(y).all()
        for i, row in enumerate(x):
            assert_same_bits(kernel(row[None], **how), y[i : i + 1])


@pytest.mark.parametrize("dtype", [np.dtype("bfloat16"), FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize(("order", "power"), [(12, 4), (172, 2), (60, 128)])
def test_a_matrix_of_other_values(kernel, order, power, dtype):
    matrix = np.linalg.qr(rng("matrix", order).standard_normal((order, order)))[0]
    if dtype != FLOAT64:
        matrix = matrix.astype(np.float32)
    n = order * power
    x = normal((5, n), dtype)
    y = kernel(x, factors=(matrix,), scale=power**-0.5)
    assert error_in_roundings(y, exact(x, (matrix,), power**-0.5), dtype) <= np.hypot(bound(dtype, n), 2)


# Of every dimension that the kernels are for, on every architecture.
ARCHITECTURES = {"sm_80": 163 * 1024, "sm_86, 89 and 120": LEAST_SHARED, "sm_90 and 100": 227 * 1024}


class TestPlans:
    @halves
    @pytest.mark.parametrize("shared_bytes", ARCHITECTURES.values(), ids=ARCHITECTURES)
    @pytest.mark.parametrize("rows", [1, 7, 100_000])
    def test_are_within_the_limits_and_one_pass(self, emulator, shared_bytes, rows, dtype):
        for n in MODEL_DIMENSIONS:
            orders = decompose(n)[:-1]
            if not orders:
                continue
            factors = tuple(factor(order) for order in orders)
            for signs in (None, random_signs(n)):
                launches = emulator.plan(dtype, n, rows, 132, shared_bytes, factors=factors, signs=signs)
                for launch in launches:
                    assert launch.words <= launch.most_words
                    assert launch.shared_bytes <= shared_bytes
                    assert launch.threads <= 1024
                    assert launch.blocks >= 1
                one_pass = 2 * n + 512 <= shared_bytes
                assert (len(launches) == 1) == one_pass
                needs = emulator.needs_workspace(Request(dtype, n, rows, factors=factors, signs=signs))
                assert needs == (2 * n + 512 > LEAST_SHARED)

    @halves
    @pytest.mark.parametrize("rows", [1, 7, 100_000])
    def test_of_a_ring_do_not_depend_on_the_rows(self, emulator, rows, dtype):
        rings = []
        for n in MODEL_DIMENSIONS:
            orders = decompose(n)[:-1]
            if not orders or 2 * n + 512 > MOST_SHARED:
                continue
            factors = tuple(factor(order) for order in orders)
            (launch,) = emulator.plan(dtype, n, rows, 132, warp_groups=True, factors=factors)
            assert launch.words <= launch.most_words
            assert launch.shared_bytes <= MOST_SHARED
            if launch.threads == 512 and launch.runs:
                assert launch.blocks == min(-(-rows // launch.per_block), 132)
                rings.append(n)
        assert {7168, 9984, 10944, 11008, 14336, 19968, 28672, 29568} < set(rings)
        assert not {3072, 53248} & set(rings)

    def test_of_a_ring_have_a_part_for_each_warp_group_that_waits(self, emulator):
        factors = (factor(12), factor(52))  # a part is one tile
        for shared_bytes, serves in (132 * 1024, True), (110 * 1024, False):
            (launch,) = emulator.plan(HALVES[0], 9984, 100, 132, shared_bytes, warp_groups=True, factors=factors)
            assert bool(launch.runs) == serves

    @pytest.mark.parametrize("shared_bytes", ARCHITECTURES.values(), ids=ARCHITECTURES)
    @pytest.mark.parametrize("rows", [1, 100_000])
    def test_of_float32_are_within_the_limits(self, emulator, shared_bytes, rows):
        for n in MODEL_DIMENSIONS:
            orders = decompose(n)[:-1]
            if len(orders) != 1 or orders[0] > 192:
                continue
            launches = emulator.plan(FLOAT32, n, rows, 132, shared_bytes, factors=(factor(*orders),))
            assert (len(launches) == 1) == (4 * n <= shared_bytes)
            if len(launches) == 1:
                assert launches[0].words <= launches[0].most_words
                assert launches[0].shared_bytes <= shared_bytes
                assert launches[0].threads <= 384
                assert launches[0].threads % 32 == 0

    @pytest.mark.parametrize(("orders", "power"), FUSED, ids=str)
    def test_of_float32_with_one_order_are_one_pass(self, emulator, orders, power):
        n = math.prod(orders) * power
        launches = emulator.plan(FLOAT32, n, 100, factors=tuple(factor(order) for order in orders))
        assert (len(launches) == 1) == (len(orders) == 1 and orders[0] <= 192)
