"""A row's bits depend on that row alone: not on the batch, the position, the transformation or the instruction set."""

import jax
import numpy as np
import pytest
from cases import (
    DTYPES,
    KINDS,
    assert_same_bits,
    bits,
    data,
    dtypes,
    lengths,
    normal,
    rows_for,
)
from oracle import HAS_WIDE_FLOAT64, bound, dense, error_in_roundings, round_to, transform

from jax_hadacore import _ffi, hadamard


def _available():
    """The instruction sets that this processor has, widest last."""
    native = _ffi.CPU.module
    if native is None:
        return []
    current = native.isa()
    found = [name for name in ("baseline", "avx2", "avx512") if native.select_isa(name)]
    native.select_isa(current)
    return found


ISAS = _available()
every_isa = pytest.mark.parametrize("isa", ISAS)


@dtypes
@lengths(1, 4, 32, 128, 1024, 16384)
def test_batch_size_and_position(n, dtype):
    rows = 1000 if n <= 128 else 130 if n <= 1024 else 9
    x = normal((rows, n), dtype)
    whole = np.asarray(hadamard(x))
    for size in (1, 2, 3, 7, 64):
        for first in {0, rows // 3, rows - size}:
            if 0 <= first <= rows - size:
                assert_same_bits(np.asarray(hadamard(x[first : first + size])), whole[first : first + size])
    order = np.argsort(np.sin(np.arange(rows)))
    assert_same_bits(np.asarray(hadamard(x[order])), whole[order])


@dtypes
@lengths(2, 64, 4096)
def test_neighbours_do_not_matter(n, dtype):
    row = normal((1, n), dtype)
    alone = np.asarray(hadamard(row))
    for kind in KINDS:
        company = data(kind, (6, n), dtype)
        company[4] = row
        assert_same_bits(np.asarray(hadamard(company))[4:5], alone)


@dtypes
@lengths(16, 256)
def test_every_way_to_call(n, dtype):
    x = normal((3, 5, n), dtype)
    expected = np.asarray(hadamard(x))
    ways = {
        "again": hadamard(x),
        "jit": jax.jit(hadamard)(x),
        "vmap": jax.vmap(hadamard)(x),
        "vmap of vmap": jax.jit(jax.vmap(jax.vmap(hadamard), in_axes=1, out_axes=1))(x),
        "vmap over the last axis": jax.vmap(hadamard, in_axes=-1, out_axes=1)(np.moveaxis(x, 1, -1)),
        "map": jax.lax.map(hadamard, x),
        "one row at a time": np.stack([[hadamard(row) for row in rows] for rows in x]),
        "another axis": np.moveaxis(np.asarray(hadamard(np.moveaxis(x, -1, 0), axis=0)), 0, -1),
        "in place": hadamard(x, inplace=True),
        "reshaped": hadamard(x.reshape(15, n)).reshape(x.shape),
        "producer": jax.jit(lambda x: hadamard(-x))(-x),
    }
    for way, y in ways.items():
        assert np.array_equal(bits(np.asarray(y)), bits(expected)), way


def test_some_instruction_set_is_available():
    assert "baseline" in ISAS
    assert _ffi.CPU.module.isa() == ISAS[-1]  # the widest by default
    assert not _ffi.CPU.module.select_isa("no such set")
    assert _ffi.CPU.module.isa() == ISAS[-1]


class TestInstructionSets:
    """Each instruction set on the CPU, wherever the default device is."""

    @pytest.fixture(autouse=True)
    def _restore(self):
        current = _ffi.CPU.module.isa()
        yield
        assert _ffi.CPU.module.select_isa(current)

    @pytest.fixture
    def run(self, cpu_devices):
        def run(isa, x, **options):
            assert _ffi.CPU.module.select_isa(isa)
            assert _ffi.CPU.module.isa() == isa
            return np.asarray(hadamard(jax.device_put(x, cpu_devices[0]), **options))

        return run

    @pytest.mark.parametrize("rows", [1, 3, 67, 1001])
    @dtypes
    @lengths(1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    def test_all_give_the_same_bits(self, run, n, dtype, rows):
        # Row counts that leave every kind of tail behind the vector groups (32 to 128 elements).
        x = normal((rows, n), dtype)
        expected = run("baseline", x)
        for isa in ISAS:
            assert_same_bits(run(isa, x), expected)

    @dtypes
    @lengths(1024, 2048, 4096, 8192, 16384, 32768, 2**17)
    def test_all_give_the_same_bits_in_long_rows(self, run, n, dtype):
        # One to several passes over memory, of every radix.
        x = normal((2, n), dtype)
        expected = run("baseline", x)
        for isa in ISAS:
            assert_same_bits(run(isa, x), expected)

    @every_isa
    @dtypes
    @lengths(2, 64, 1024, 32768)
    def test_error_is_within_the_bound(self, run, isa, dtype, n):
        x = normal((rows_for(n), n), dtype)
        if dtype != np.float64 or HAS_WIDE_FLOAT64:
            assert error_in_roundings(run(isa, x), transform(x), dtype) <= bound(dtype, n)

    @every_isa
    @dtypes
    @lengths(1, 8, 128, 512)
    def test_one_hot_rows_are_rows_of_the_matrix(self, run, isa, dtype, n):
        assert_same_bits(run(isa, np.eye(n, dtype=np.float32).astype(dtype), scale=1), dense(n).astype(dtype))

    @every_isa
    @dtypes
    @lengths(1, 2, 16, 128, 2048)
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
    def test_non_finite_values_stay_in_their_row(self, run, isa, dtype, n, value):
        x = normal((35, n), dtype)
        clean = run(isa, x)
        bad = [0, 17, 34]
        spoilt = x.copy()
        spoilt[bad, [0, n // 2, n - 1]] = value
        y = run(isa, spoilt)
        assert not np.isfinite(y[bad].astype(np.float64)).any()
        assert_same_bits(np.delete(y, bad, 0), np.delete(clean, bad, 0))

    @every_isa
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_every_16_bit_value_is_read_and_written(self, run, isa, dtype):
        x = np.arange(2**16, dtype=np.uint16).view(dtype)[:, None]
        nan = np.isnan(x.astype(np.float32))
        y = run(isa, x)
        assert_same_bits(y[~nan], x[~nan])
        assert np.isnan(y[nan].astype(np.float32)).all()

    @every_isa
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize("scale", [2.0**-14, 0.75, 3.0])
    def test_every_16_bit_value_is_rounded_once(self, run, isa, dtype, scale):
        # An operand's product with such a scale is exact in float32: subnormal, normal and overflowing results.
        x = np.arange(2**16, dtype=np.uint16).view(dtype)
        x = x[np.isfinite(x.astype(np.float32))][:, None]
        with np.errstate(over="ignore"):
            product = x.astype(np.float32) * np.float32(scale)
        keep = np.isfinite(product[:, 0])
        if dtype.name == "bfloat16":  # products below float32's range are rounded before they get here
            keep &= (product[:, 0] == 0) | (np.abs(product[:, 0]) >= 2.0**-120)
        expected = round_to(x[keep].astype(np.float64) * scale, dtype)
        np.testing.assert_array_equal(run(isa, x[keep], scale=scale).astype(np.float64), expected)
