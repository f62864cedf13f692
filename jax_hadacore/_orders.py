"""Which lengths have a transform, how a length is factored, and the sign matrices of the factors."""

import functools
import math

import numpy as np

MAX_LENGTH = 2**24


def decompose(n: int) -> tuple[int, ...]:
    """The factors of a length, slowest index first: H_n is the Kronecker product of their matrices.

    Raises:
        ValueError: no transform of length n is known; names the factorisation and the ways out.
    """
    if n < 1:
        raise ValueError(f"hadamard: the transformed axis has size {n}; it must have at least one element.")
    if n & (n - 1) == 0 and n <= MAX_LENGTH:
        return (n,)
    block = min(n & -n, MAX_LENGTH)
    pad = f"Pad the axis to {1 << n.bit_length()}, or transform" if n < MAX_LENGTH else "Transform"
    raise ValueError(
        f"hadamard: the transformed axis has size {n} = {factorisation(n)}; supported are the powers of two up to 2^24."
        f" {pad} blocks of it (reshape the axis to (..., {n // block}, {block}))."
    )


@functools.cache
def sylvester(n: int) -> np.ndarray:
    """The int8 matrix of order n = 2^m with entries (-1)**popcount(i & j)."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.setflags(write=False)
    return matrix


def factorisation(n: int) -> str:
    """Writes n as a product of prime powers, its power of two last: '3 * 5^2 * 2^4'."""
    twos = (n & -n).bit_length() - 1
    rest, factors = n >> twos, []
    prime = 3
    while prime <= math.isqrt(rest):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        if power:
            factors.append(_power(prime, power))
        prime += 2
    if rest > 1:
        factors.append(str(rest))
    if twos:
        factors.append(_power(2, twos))
    return " * ".join(factors)


def _power(base: int, exponent: int) -> str:
    return str(base) if exponent == 1 else f"{base}^{exponent}"
