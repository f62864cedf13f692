"""Which lengths have a transform, how a length is factored, and the sign matrices of the factors."""

import functools
import math
import operator

import numpy as np
from numpy.typing import DTypeLike

MAX_LENGTH = 2**24

# Counts the versions of the map from x to y that decompose() and the matrices below fix. Weights that a transform was
# folded into depend on it.
CONVENTION = 1

MAX_ORDER = 1024
# Beyond this order two smaller ones are tried in place of one.
_MAX_SINGLE_ORDER = 256


def decompose(n: int) -> tuple[int, ...]:
    """The factors of a length, slowest index first: H_n is the Kronecker product of their matrices.

    At most two factors are orders of Paley's matrices; the last one is the power of two that is left, perhaps 1.

    Raises:
        ValueError: no transform of length n is known; names the factorisation and the ways out.

    Example:
        >>> from jax_hadacore import decompose
        >>> decompose(4096), decompose(14336), decompose(10944)
        ((4096,), (28, 512), (36, 76, 4))
    """
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"hadamard: the transformed axis has size {n}; it must have at least one element.")
    found = _find_orders(n)
    if found is None:
        raise ValueError(f"hadamard: the transformed axis has size {n} = {factorisation(n)}; {_advice(n)}")
    return (*found, n // math.prod(found))


def orders(n: int) -> tuple[int, ...]:
    """The factors of a length that are no powers of two, slowest index first."""
    return decompose(n)[:-1]


def is_supported(n: int) -> bool:
    """Whether there is a transform of length n: a power of two up to 2^24, or one or two of Paley's orders times it.

    Example:
        >>> from jax_hadacore import is_supported
        >>> is_supported(14336), is_supported(13696)
        (True, False)
    """
    n = operator.index(n)
    return n > 0 and _find_orders(n) is not None


def hadamard_matrix(n: int, dtype: DTypeLike = np.int8) -> np.ndarray:
    """The matrix of +-1 that `hadamard(x, scale=1)` multiplies a vector x of length n by.

    It is the Kronecker product of the matrices of the factors that `decompose(n)` names, the slowest index first:
    Paley's for orders that are no powers of two, Sylvester's H[i, j] = (-1)**popcount(i & j) for the power of two.
    It is symmetric, and its square is n I.

    Args:
        n: a supported length.
        dtype: of the result.

    Returns:
        A NumPy array of shape (n, n).

    Raises:
        ValueError: no transform of length n is known.

    Example:
        >>> from jax_hadacore import hadamard_matrix
        >>> hadamard_matrix(4)
        array([[ 1,  1,  1,  1],
               [ 1, -1,  1, -1],
               [ 1,  1, -1, -1],
               [ 1, -1, -1,  1]], dtype=int8)
        >>> m = hadamard_matrix(24, float)
        >>> (m @ m == 24 * np.eye(24)).all()
        np.True_

    The matrices are due to Sylvester (1867) and Paley (1933, "On orthogonal matrices").
    """
    *paley, power = decompose(n)
    twos = power.bit_length() - 1
    factors = [order_matrix(k) for k in paley] + [sylvester(2)] * twos
    return functools.reduce(np.kron, factors, sylvester(1)).astype(dtype)


@functools.cache
def sylvester(n: int) -> np.ndarray:
    """The int8 matrix of order n = 2^m with entries (-1)**popcount(i & j)."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.setflags(write=False)
    return matrix


@functools.cache
def order_matrix(k: int) -> np.ndarray:
    """Paley's symmetric int8 matrix M of a base order k: M M^T = k I.

    chi(x) is 1 for the squares of GF(q) and -1 for the other elements; x and y run over the elements.
    Type II, q = k/2 - 1 = 1 mod 4: chi(0) = 0, and chi(x - y) with a border of ones and a zero in the corner is a
    symmetric C with C C^T = q I; each entry c of it becomes c [[1, 1], [1, -1]], and on the diagonal, where c = 0,
    [[1, -1], [-1, -1]].
    Type I, q = k - 1 = 3 mod 4: chi(0) = -1, and chi(x + y) with a border of ones. (The usual form has the difference
    in place of the sum, and is not symmetric.)
    """
    p, exponent = _base_orders()[k]
    q = p**exponent
    digits, chi = _field(p, exponent)
    if k == q + 1:
        chi[0] = -1
        matrix = np.ones((k, k), np.int8)
        matrix[1:, 1:] = chi[_number(digits[:, None] + digits, p)]
    else:
        conference = 1 - np.eye(q + 1, dtype=np.int8)
        conference[1:, 1:] = chi[_number(digits[:, None] - digits, p)]
        matrix = np.kron(conference, sylvester(2)) + np.kron(
            np.eye(q + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        )
    # Sums of up to 1024 are exact in float32, whose product is many times as fast as that of integers.
    wide = matrix.astype(np.float32)
    assert np.array_equal(wide @ wide, k * np.eye(k, dtype=np.float32))
    assert np.array_equal(matrix, matrix.T)
    matrix.setflags(write=False)
    return matrix


def factorisation(n: int) -> str:
    """Writes n as a product of prime powers, its power of two last: '3 * 5^2 * 2^4'."""
    odd = _odd_part(n)
    powers = [*_prime_powers(odd), (2, (n // odd).bit_length() - 1)]
    return " * ".join(str(p) if exponent == 1 else f"{p}^{exponent}" for p, exponent in powers if exponent)


def _find_orders(n: int) -> tuple[int, ...] | None:
    """The orders whose product with a power of two is n, none for a power of two; None where n has no transform."""
    if n > MAX_LENGTH:
        return None
    odd = _odd_part(n)
    if odd == 1:
        return ()
    known = _orders_of_odd_part()
    singles = [(k,) for k in known.get(odd, ()) if n % k == 0]
    if singles and singles[0][0] <= _MAX_SINGLE_ORDER:
        return singles[0]
    pairs = [
        (a, b)
        for part in known
        if odd % part == 0
        for a in known[part]
        for b in known.get(odd // part, ())
        if a <= b and n % (a * b) == 0
    ]
    return min([*singles, *pairs], key=lambda found: (sum(found), math.prod(found), found), default=None)


def _advice(n: int) -> str:
    """Why there is no transform of length n, and what to do instead."""
    odd, ways = _odd_part(n), []
    block = min(n // odd, MAX_LENGTH)
    if block > 1:
        ways.append(f"transform blocks of it with block_size={block}")
    if n > MAX_LENGTH:
        reason = "supported are lengths up to 2^24."
    else:
        reason = f"no Hadamard matrix of order {odd} * 2^j is known to this library for j <= {block.bit_length() - 1}."
        if odd <= MAX_ORDER:
            ways.append(f"pass an orthogonal matrix of order {odd} as matrix=")
        ways.append(f"pad the axis to {_next_supported(n)}")
    advice = " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)
    return f"{reason} {advice.capitalize()}." if ways else reason


def _next_supported(n: int) -> int:
    """The smallest k * 2^j above n whose order k, if any, is not large."""
    bases = [1, *(k for k in _base_orders() if k <= _MAX_SINGLE_ORDER)]
    return min(k << (-(-n // k) - 1).bit_length() for k in bases)


@functools.cache
def _base_orders() -> dict[int, tuple[int, int]]:
    """The orders of Paley's matrices, each with the p and e of its field GF(p^e); type II where both types exist."""
    found = {}
    for k in range(12, MAX_ORDER + 1, 4):
        for q, residue in ((k // 2 - 1, 1), (k - 1, 3)):
            powers = _prime_powers(q)
            if q % 4 == residue and len(powers) == 1 and k not in found:
                found[k] = powers[0]
    return found


@functools.cache
def _orders_of_odd_part() -> dict[int, list[int]]:
    """The base orders, smallest first, by what is left of them without their factors of two."""
    found = {}
    for k in _base_orders():
        found.setdefault(_odd_part(k), []).append(k)
    return found


def _field(p: int, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits of the elements of GF(p^e), and chi of each: 1 for squares, -1 for others, 0 for zero.

    An element is a polynomial modulo an irreducible one of degree e, and is numbered by its coefficients read as a
    number in base p. The irreducible polynomial x^e + c_(e-1) x^(e-1) + ... + c_0 is the first in the order of its
    coefficients from c_(e-1) to c_0. Where u v = 0, (u + v) / 2 and (u - v) / 2 have the same square: so a polynomial
    is irreducible exactly where only u and -u have the same square.
    """
    q = p**exponent
    digits = np.arange(q)[:, None] // p ** np.arange(exponent) % p
    squares = next(found for low in digits if len(found := _squares(digits, low, p)) == (q + 1) // 2)
    chi = np.full(q, -1, np.int8)
    chi[squares] = 1
    chi[0] = 0
    return digits, chi


def _squares(digits: np.ndarray, low: np.ndarray, p: int) -> np.ndarray:
    """The numbers of all squares modulo x^e + low, each once; coefficients are those of 1, x, ..."""
    exponent = len(low)
    product = np.zeros((len(digits), 2 * exponent - 1), int)
    for i in range(exponent):
        product[:, i : i + exponent] += digits[:, i, None] * digits
    for top in reversed(range(exponent, 2 * exponent - 1)):
        product[:, top - exponent : top] -= product[:, top, None] * low
    return np.unique(_number(product[:, :exponent], p))


def _number(digits: np.ndarray, p: int) -> np.ndarray:
    """The numbers of elements whose coefficients, modulo p, are in the last axis."""
    return digits % p @ p ** np.arange(digits.shape[-1])


def _prime_powers(odd: int) -> list[tuple[int, int]]:
    """The primes of an odd number with their exponents, smallest first."""
    found, prime = [], 3
    while prime <= math.isqrt(odd):
        exponent = 0
        while odd % prime == 0:
            odd //= prime
            exponent += 1
        if exponent:
            found.append((prime, exponent))
        prime += 2
    return found if odd == 1 else [*found, (odd, 1)]


def _odd_part(n: int) -> int:
    return n // (n & -n)
