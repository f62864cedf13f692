"""The transform by its definition, (-1)**popcount(i & j), and the error of a result measured in roundings."""

import math

import ml_dtypes
import numpy as np

# Sylvester's matrix of 2^(p + q) is the Kronecker product of those of 2^p and 2^q, as popcount adds over bit fields.
_FACTOR = 32


def signs(i, j):
    """The sign (-1)**popcount(i & j) as int8, for arrays of row and column indices."""
    return (1 - 2 * (np.bitwise_count(np.asarray(i) & np.asarray(j)) & 1).astype(np.int8)).astype(np.int8)


def dense(n):
    """The n x n matrix of signs."""
    index = np.arange(n)
    return signs(index[:, None], index[None, :])


def wide(dtype):
    """The type that the oracle computes in for results of `dtype`."""
    return np.longdouble if np.dtype(dtype) == np.float64 else np.float64


# Where long double is no wider than float64, float64 results have no oracle here.
HAS_WIDE_FLOAT64 = np.finfo(np.longdouble).nmant > 60


def transform(x, scale=None):
    """Transforms the last axis in float64 (long double for float64); by default scale is n**-0.5."""
    x = np.asarray(x)
    n, kind = x.shape[-1], wide(x.dtype)
    y = x.astype(kind)
    done = 1
    while done < n:
        factor = min(_FACTOR, n // done)
        y = y.reshape(-1, factor, done)
        y = np.matmul(dense(factor).astype(kind), y)
        done *= factor
    scale = 1 / np.sqrt(kind(n)) if scale is None else kind(scale)
    return y.reshape(x.shape) * scale


def round_to(y, dtype):
    """y, rounded once to the nearest value of dtype, ties to even; the result is in y's wider type.

    Casting float64 to bfloat16 goes through float32 and rounds twice, so this counts in units of the last place.
    """
    y = np.asarray(y)
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(y)
    unit = np.maximum(exponent - (info.nmant + 1), info.minexp - info.nmant)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(y, -unit)), unit)
        return np.where(np.abs(rounded) > y.dtype.type(info.max), np.copysign(np.inf, y), rounded)


def error_in_roundings(y, exact, dtype):
    """rms(y - exact) / rms(rn(exact) - exact); where the latter is 0, 0 if y is exact too and else infinity."""
    exact = np.asarray(exact)
    assert np.asarray(y).dtype == np.dtype(dtype)
    error = _rms(np.asarray(y).astype(exact.dtype) - exact)
    rounding = _rms(round_to(exact, dtype) - exact)
    if rounding == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / rounding)


def bound(dtype, n):
    """The error in roundings that the library promises for a transform of length n."""
    if np.dtype(dtype).itemsize == 2:
        return 1.02
    summation = 1.2 * math.sqrt(math.log2(n) + 1)
    # The float64 nearest to sqrt(1/2) is 0.31 units off (float32's: 0.14), which a default scale passes on.
    scale = 1.6 if np.dtype(dtype) == np.float64 and math.log2(n) % 2 else 0
    return math.hypot(summation, scale)


def _rms(values):
    return np.sqrt(np.mean(np.square(values))) if values.size else values.dtype.type(0)
