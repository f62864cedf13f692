"""Threads on the CPU: their number never shows in the result, and the measurement runs what serves."""

import jax
import numpy as np
import pytest
from cases import assert_same_bits, dtypes, lengths, normal

from jax_hadacore import _ffi, hadamard

CPU = _ffi.CPU.module


def measure(x, y, **options):
    """Times the transform of x into y, which holds the result afterwards."""
    rows, n = x.shape
    problem = CPU.Problem(getattr(CPU.Dtype, x.dtype.name), n, rows, n**-0.5)
    return CPU.measure(problem, x.ctypes.data, y.ctypes.data, **options)


def transform(x, threads):
    y = np.full_like(x, np.nan)
    measure(x, y, threads=threads, repetitions=1)
    return y


@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2**15),  # one row: parts and columns, in two phases, or in three for more than eight threads
        (1, 2**18),
        (2, 2**17),
        (3, 2**16),  # slices of rows, where there are rows enough for two thirds of the threads
        (7, 2**14),
        (999, 64),
        (50000, 2),
    ],
    ids=str,
)
def test_any_number_gives_the_same_bits(shape, dtype):
    x = normal(shape, dtype)
    expected = transform(x, 1)
    assert np.isfinite(expected.astype(np.float64)).all()
    for threads in (2, 3, 5, 8, 9, 17):
        assert_same_bits(transform(x, threads), expected)


@dtypes
@lengths(2**15, 2**18)
def test_one_row_is_as_in_a_batch(n, dtype, cpu_devices):
    x = jax.device_put(normal((9, n), dtype), cpu_devices[0])
    batch = np.asarray(hadamard(x))
    assert_same_bits(np.asarray(hadamard(x[4:5])), batch[4:5])
    assert_same_bits(transform(np.asarray(x)[4:5], 3), batch[4:5])


@dtypes
@pytest.mark.parametrize("shape", [(1, 2**18), (300, 512)], ids=str)
def test_in_place(shape, dtype):
    x = normal(shape, dtype)
    y = x.copy()
    measure(y, y, threads=5, repetitions=1)
    for _ in range(3):  # to warm up, to see how long it takes, and the one that is timed
        x = transform(x, 1)
    assert_same_bits(y, x)


def test_measures_each_repetition():
    x = normal((64, 256), np.float32)
    times = measure(x, np.empty_like(x), threads=2, repetitions=7)
    assert set(times) == {"transform", "memcpy"}
    for values in times.values():
        assert len(values) == 7
        assert all(value > 0 for value in values)
    assert {len(values) for values in measure(x, np.empty_like(x)).values()} == {10}


def test_calls_of_a_fast_problem_are_timed_together():
    x = normal((1, 16), np.float32)
    assert max(measure(x, np.empty_like(x))["memcpy"]) < 1e-3


@pytest.mark.parametrize("options", [{"threads": 0}, {"repetitions": 0}], ids=str)
def test_a_measurement_needs_something_to_do(options):
    x = normal((1, 16), np.float32)
    with pytest.raises(ValueError, match="one element, thread and repetition or more"):
        measure(x, x, **options)
    with pytest.raises(ValueError, match="0 bytes"):
        measure(x[:0], x)
