"""What the tests run over: lengths, types, row counts and kinds of data."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from jax_hadacore.bench.models import BY_ORDERS, MODELS

DTYPES = tuple(np.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))
HALVES = DTYPES[:2]
COMPLEX = (np.dtype(np.complex64), np.dtype(np.complex128))
LENGTHS = (*(2**k for k in range(18)), 2**20)
MODEL_DIMENSIONS = tuple(sorted(MODELS))
ORDERS = tuple(sorted({k for orders in BY_ORDERS for k in orders}))
# A few lengths for quick tests: with and without a power of two, one order and two, small, large and of both types.
ORDER_LENGTHS = (12, 24, 80, 576, 768, 2880, 3584, 5504, 9984, 10944)
# Around what one vector group holds: 128 float32 elements, or 64 of float64, with the widest instruction set.
SHORT_LENGTHS = (1, 2, 8, 16, 64, 128, 256)
ROWS = (0, 1, 2, 3, 7, 257)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def lengths(*values):
    """Parametrises a test over transform lengths."""
    return pytest.mark.parametrize("n", values, ids="n{}".format)


def rng(*key):
    """A generator that depends on nothing but the key, so that a test draws the same numbers alone and in company."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def normal(shape, dtype, *key):
    return rng("normal", shape, str(dtype), *key).standard_normal(shape).astype(dtype)


def rows_for(n):
    """Rows enough for an error to be a statistic, in an odd number where that leaves a tail."""
    return 4096 // n + 3 if n <= 4096 else 1


def _student(generator, shape):
    return np.clip(generator.standard_t(2, shape), -100, 100)


def _outliers(generator, shape):
    """Two channels of every row 100 times as large, as language models' activations have them."""
    x = generator.standard_normal(shape)
    x[..., generator.integers(shape[-1], size=2)] *= 100
    return x


def _constant(generator, shape):
    return np.broadcast_to(generator.standard_normal((*shape[:-1], 1)), shape)


def _one_hot(generator, shape):
    x = np.zeros(shape)
    one = (*shape[:-1], 1)
    np.put_along_axis(x, generator.integers(shape[-1], size=one), generator.standard_normal(one), -1)
    return x


def _dc(generator, shape):
    return generator.standard_normal(shape) * 0.01 + generator.uniform(1, 2, (*shape[:-1], 1))


def _wide_range(generator, shape):
    """Magnitudes over three decades in every row."""
    return generator.standard_normal(shape) * 10.0 ** generator.uniform(-2, 1, shape)


KINDS = {
    "heavy-tailed": _student,
    "outlier-channels": _outliers,
    "constant": _constant,
    "one-hot": _one_hot,
    "dc-heavy": _dc,
    "wide-range": _wide_range,
}


def data(kind, shape, dtype):
    """An array of one of KINDS."""
    return np.asarray(KINDS[kind](rng(kind, shape, str(dtype)), shape)).astype(dtype)


def bits(x):
    """The bit patterns of an array, for comparisons that tell -0 from 0 and one NaN from another."""
    x = np.ascontiguousarray(x)
    if np.iscomplexobj(x):
        x = x.view(x.real.dtype)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(bits(actual), bits(expected))
