"""What the command line measures: the error against the definition, and how far values spread within their row."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ._orders import decompose, order_matrix
from ._transform import hadamard

_CHUNK = 1 << 24  # values on the device at a time
_VERIFIED = 1 << 20  # values of an array, about, that are compared with the definition
_FACTOR_BITS = 6


class UnmeasurableError(Exception):
    """Why the rows of an array cannot be measured."""


@dataclass(frozen=True)
class Spread:
    """How far values spread within their row: `peak` = max|x| / rms(x), mean over the rows; `int4` = the relative rms
    error of rounding to int4 with one symmetric scale, max|x| / 7, for each row.
    """

    peak: float
    int4: float


@dataclass(frozen=True)
class Rotation:
    """The spread before and after the transform, and whether the transform agrees with its definition."""

    before: Spread
    after: Spread
    verified: bool


@functools.cache
def sign_matrix(n: int) -> np.ndarray:
    """(-1)**popcount(i & j) as a float64 matrix of order n = 2^m: the definition, shared with nothing else."""
    index = np.arange(n)
    return 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)


def definition(rows: np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """The orthonormal transform of each row, computed and returned in `dtype`.

    popcount(i & j) is the sum over fields of bits of i and j, so the sign matrix of order 2^m is the Kronecker product
    of small ones.
    """
    n = rows.shape[-1]
    *orders, power = decompose(n)
    matrices = [
        sign_matrix(min(1 << _FACTOR_BITS, power >> bits)) for bits in range(0, power.bit_length() - 1, _FACTOR_BITS)
    ]
    y = rows.astype(dtype)
    done = 1
    for matrix in matrices + [order_matrix(k) for k in reversed(orders)]:
        y = matrix.astype(dtype) @ y.reshape(-1, len(matrix), done)
        done *= len(matrix)
    return y.reshape(rows.shape) / np.sqrt(dtype(n))


def error_in_roundings(y: np.ndarray, exact: np.ndarray) -> float:
    """rms(y - exact) in units of the rms error of rounding `exact` once to y's dtype."""
    rounding = _rms(exact.astype(y.dtype) - exact)
    error = _rms(y - exact)
    return error / rounding if rounding else math.inf if error else 0.0


def error_bound(dtype: np.dtype, n: int) -> float:
    """The largest error in roundings that the library promises (docs/numerics.md)."""
    power_of_two = n & (n - 1) == 0
    if dtype.itemsize == 2:
        return 1.02 if power_of_two else 1.05
    scale = 0.0
    if dtype == np.float64:
        scale = 2.4 if not power_of_two else 1.6 if math.log2(n) % 2 else 0.0
    return math.hypot(1.2 * math.sqrt(math.log2(n) + 1), scale)


def rotate(rows: np.ndarray) -> Rotation:
    """Transforms every row of a floating-point matrix, in float32 if it is float64, and measures both sides.

    Raises:
        UnmeasurableError: values or results are not finite, or all are zero.
    """
    count, n = rows.shape
    dtype = np.dtype(np.float32) if rows.dtype == np.float64 else rows.dtype.newbyteorder("=")
    step, stride = max(1, _CHUNK // n), -(-rows.size // _VERIFIED)
    before, after, verified = [], [], True
    for start in range(0, count, step):
        with np.errstate(over="ignore"):  # a float64 value beyond float32 is reported as not finite
            x = rows[start : start + step].astype(dtype)
        y, before_rows, after_rows = jax.device_get(_rotate(x))
        if not np.isfinite(before_rows).all():
            raise UnmeasurableError("values that are not finite")
        if not np.isfinite(after_rows).all():
            raise UnmeasurableError(f"results beyond the range of {dtype.name}")
        before.append(before_rows)
        after.append(after_rows)
        verified &= _agrees(y[::stride], definition(x[::stride]))
    before, after = np.concatenate(before), np.concatenate(after)
    if not before.any():
        raise UnmeasurableError("only zeros")
    return Rotation(_spread(before), _spread(after), verified)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _agrees(y: np.ndarray, exact: np.ndarray) -> bool:
    """Whether the error of y is within the bound, in units of the largest error that one rounding can make.

    Of real data a few results may hold all the energy, and may happen to be exact: the rounding error of the exact
    result itself would be no yardstick.
    """
    limits = jnp.finfo(y.dtype)
    largest = float(limits.eps) / 2 * np.maximum(np.abs(exact), float(limits.smallest_normal))
    return _rms(y - exact) <= error_bound(y.dtype, y.shape[-1]) * _rms(largest)


@jax.jit
def _rotate(x):
    y = hadamard(x)
    return y, _row_statistics(x), _row_statistics(y)


def _row_statistics(x):
    """max|x|, mean square and mean square of the int4 error of each row, the squares in units of max|x|**2.

    In these units no square overflows.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=-1)
    x = x / jnp.where(peak > 0, peak, 1)[:, None]
    int4 = jnp.round(x * 7) / 7
    return jnp.stack([peak, jnp.mean(x**2, axis=-1), jnp.mean((x - int4) ** 2, axis=-1)], axis=-1)


def _spread(statistics: np.ndarray) -> Spread:
    statistics = statistics[statistics[:, 1] > 0].astype(np.float64)  # rows of zeros have no peak
    peak, square, error = statistics.T
    return Spread(
        peak=float(np.mean(square**-0.5)),
        int4=math.sqrt(np.sum(peak**2 * error) / np.sum(peak**2 * square)),
    )
