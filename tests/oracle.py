"""The transform by its definition, sharing no code with the library, and the error of results in roundings."""

import functools
import itertools
import math

import ml_dtypes
import numpy as np

# Sylvester's matrix of 2^(p + q) is the Kronecker product of those of 2^p and 2^q, as popcount adds over bit fields.
_FACTOR = 32


def signs(i, j):
    """Sylvester's sign (-1)**popcount(i & j) as int8, for arrays of row and column indices."""
    return (1 - 2 * (np.bitwise_count(np.asarray(i) & np.asarray(j)) & 1).astype(np.int8)).astype(np.int8)


def sylvester(n):
    """The n x n matrix of signs, n = 2^m."""
    index = np.arange(n)
    return signs(index[:, None], index[None, :])


def _multiply(a, b, p):
    """The product of two polynomials over the integers modulo p; coefficients start with the constant one."""
    product = [0] * (len(a) + len(b) - 1)
    for (i, u), (j, v) in itertools.product(enumerate(a), enumerate(b)):
        product[i + j] = (product[i + j] + u * v) % p
    return tuple(product)


def _polynomials(p, count):
    """All polynomials of `count` coefficients, in the order of the numbers with these digits in base p."""
    return [digits[::-1] for digits in itertools.product(range(p), repeat=count)]


def _irreducible(p, degree):
    """The first polynomial with leading coefficient 1 that is no product of two such polynomials."""
    monic = [[(*rest, 1) for rest in _polynomials(p, d)] for d in range(degree + 1)]
    reducible = {_multiply(a, b, p) for d in range(1, degree) for a in monic[d] for b in monic[degree - d]}
    return next(candidate for candidate in monic[degree] if candidate not in reducible)


def _squares(p, degree):
    """Which elements of GF(p^degree), numbered by their digits, are squares of other elements than 0."""
    modulus = _irreducible(p, degree)
    found = set()
    for element in _polynomials(p, degree)[1:]:
        square = list(_multiply(element, element, p))
        while len(square) > degree:
            top, shift = square[-1], len(square) - 1 - degree
            square = [(c - top * modulus[i - shift]) % p if i >= shift else c for i, c in enumerate(square)][:-1]
        found.add(sum(c * p**i for i, c in enumerate(square)))
    return found


def _prime_power(q):
    """The p and e of q = p^e, or None."""
    p = next((d for d in range(2, q + 1) if q % d == 0), q)
    e = round(math.log(q, p)) if q > 1 else 0
    return (p, e) if q > 1 and p**e == q else None


def _paley_type(k):
    """2 or 1 for the kind of Paley's matrix of order k, or None where there is none."""
    if k % 8 == 4 and _prime_power(k // 2 - 1):
        return 2
    return 1 if k % 4 == 0 and _prime_power(k - 1) else None


BASE_ORDERS = tuple(k for k in range(12, 1025) if _paley_type(k))


@functools.cache
def paley(k):
    """The symmetric matrix of a base order, entry by entry."""
    q = k // 2 - 1 if _paley_type(k) == 2 else k - 1
    p, e = _prime_power(q)
    squares = _squares(p, e)
    digits = np.unravel_index(np.arange(q), (p,) * e)
    chi = np.array([0 if i == 0 else 1 if i in squares else -1 for i in range(q)], np.int8)
    if q == k - 1:
        chi[0] = -1
        total = np.ravel_multi_index([np.add.outer(d, d) % p for d in digits], (p,) * e)
        return np.block([[np.ones((1, 1), np.int8), np.ones((1, q), np.int8)], [np.ones((q, 1), np.int8), chi[total]]])
    difference = np.ravel_multi_index([np.subtract.outer(d, d) % p for d in digits], (p,) * e)
    c = np.block([[np.zeros((1, 1), np.int8), np.ones((1, q), np.int8)], [np.ones((q, 1), np.int8), chi[difference]]])
    one = np.eye(q + 1, dtype=np.int8)
    m = np.empty((k, k), np.int8)
    m[0::2, 0::2], m[0::2, 1::2] = c + one, c - one
    m[1::2, 0::2], m[1::2, 1::2] = c - one, -c - one
    return m


# Every product of one or two base orders, with what it costs: the rule prefers the smallest sum, then product.
_CHOICES = [(k, k, (k,)) for k in BASE_ORDERS]
_CHOICES += [(a + b, a * b, (a, b)) for a, b in itertools.combinations_with_replacement(BASE_ORDERS, 2)]
_PRODUCTS = np.array([product for _, product, _ in _CHOICES])


@functools.cache
def decompose(n):
    """The factors of n, slowest first and the power of two last, or None where n has no transform."""
    if n.bit_count() == 1:
        return (n,)
    quotients, remainders = np.divmod(n, _PRODUCTS)
    fits = np.flatnonzero((remainders == 0) & (quotients & (quotients - 1) == 0))
    found = sorted(_CHOICES[i] for i in fits)
    small = [choice for choice in found if len(choice[2]) == 1 and choice[0] <= 256]
    if not found:
        return None
    _, product, factors = (small or found)[0]
    return (*factors, n // product)


def dense(n):
    """The n x n matrix of signs that a transform of length n multiplies by."""
    *orders, power = decompose(n)
    return functools.reduce(np.kron, [*map(paley, orders), sylvester(power)])


def wide(dtype):
    """The type that the oracle computes in for results of `dtype`."""
    return np.longdouble if np.dtype(dtype) == np.float64 else np.float64


# Where long double is no wider than float64, float64 results have no oracle here.
HAS_WIDE_FLOAT64 = np.finfo(np.longdouble).nmant > 60


def transform(x, scale=None, *, length=None, matrix=None, signs=None, transpose=False):
    """Transforms each block of `length` of the last axis in float64 (long double for float64).

    A matrix takes the place of the orders. By default the blocks are the whole axis, and scale makes the transform
    orthonormal: length**-0.5, or with a matrix M, M M^T = c^2 I, of order k: (length / k)**-0.5 / c.
    """
    x = np.asarray(x)
    kind = wide(x.dtype)
    n = length or x.shape[-1]
    slow = [np.asarray(matrix, kind)] if matrix is not None else [paley(k).astype(kind) for k in decompose(n)[:-1]]
    power = n // math.prod(map(len, slow))
    y = x.astype(kind).reshape(-1, n)
    if signs is not None and not transpose:
        y = y * np.asarray(signs, kind)
    done = 1
    while done < power:
        factor = min(_FACTOR, power // done)
        y = np.matmul(sylvester(factor).astype(kind), y.reshape(-1, factor, done))
        done *= factor
    for m in reversed(slow):
        y = np.matmul(m.T if transpose else m, y.reshape(-1, len(m), done))
        done *= len(m)
    y = y.reshape(-1, n)
    if signs is not None and transpose:
        y = y * np.asarray(signs, kind)
    if scale is None:
        scale = 1 / np.sqrt(math.prod([np.sum(m**2) / len(m) for m in slow], start=kind(power)))
    return y.reshape(x.shape) * kind(scale)


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
    power_of_two = n.bit_count() == 1
    if np.dtype(dtype).itemsize == 2:
        return 1.02 if power_of_two else 1.05
    summation = 1.2 * math.sqrt(math.log2(n) + 1)
    if np.dtype(dtype) == np.float32:
        return summation
    # The float64 nearest to the default scale is off by up to half a unit, 2.4 average roundings; that of sqrt(1/2) by
    # 0.31 units (float32's: 0.14), and that of a power of two by nothing.
    scale = 2.4 if not power_of_two else 1.6 if math.log2(n) % 2 else 0
    return math.hypot(summation, scale)


def _rms(values):
    return np.sqrt(np.mean(np.square(values))) if values.size else values.dtype.type(0)
