"""Roundings of float32 arrays with the same bits on every platform."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Float32 = jax.Array | np.float32

_MANTISSA = np.int32(0x007FFFFF)
_ONE = np.float32(1).view(np.int32)


def magnitude_bits(x: Float32) -> jax.Array:
    """Integers in the order of |x|, NaN the largest: compared like this, no subnormal number is flushed."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)


def exponent(x: Float32) -> jax.Array:
    """floor(log2 |x|), and -127 for 0 and subnormal numbers."""
    return (magnitude_bits(x) >> 23) - 127


def power_of_two(e: jax.Array) -> jax.Array:
    """2**e, for e from -126 to 127."""
    return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The product with a factor > 0, of subnormal x, too, which XLA flushes on the CPU."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # As an integer times 2**-149, which is shared out over both factors, as it is subnormal itself.
    magnitude = (bits & _MANTISSA).astype(jnp.float32) * np.float32(2**-75)
    subnormal = jnp.where(bits < 0, -magnitude, magnitude) * (factor * np.float32(2**-74))
    return jnp.where(exponent(x) == -127, subnormal, x * factor)


def divide(a: Float32, b: Float32) -> jax.Array:
    """The quotient of a, b >= 0, rounded once where it is a normal number.

    XLA's own is not: it multiplies by the reciprocal of a constant, and on NVIDIA GPUs it is up to two units off. What
    remains corrects it, to a neighbour of the quotient at worst, and then tells on which side of a tie it is.
    """
    m, n = _mantissa(a), _mantissa(b)
    quotient = _separate(m / n)
    quotient = _separate(quotient + _remainder(m, n, quotient) / n)
    remainder = _remainder(m, n, quotient)
    above = jnp.where(quotient < 1, np.float32(2**-24), np.float32(2**-23))
    below = jnp.where(quotient <= 1, np.float32(2**-24), np.float32(2**-23))
    quotient = jnp.where(remainder > n * (above / 2), quotient + above, quotient)
    quotient = jnp.where(-remainder > n * (below / 2), quotient - below, quotient)
    # The quotient is from 1/2 to 2: halved, it needs no power of two beyond float32.
    power = power_of_two(jnp.clip(exponent(a) - exponent(b) + 1, -126, 127))
    ordinary = (jnp.minimum(exponent(a), exponent(b)) > -127) & (jnp.maximum(exponent(a), exponent(b)) < 128)
    return jnp.where(ordinary, quotient * np.float32(0.5) * power, a / b)


def _separate(quotient: jax.Array) -> jax.Array:
    """The same, which is 1/4 or more; but no product within it becomes part of a fused multiply-add, unrounded."""
    return jnp.maximum(quotient, np.float32(0.25))


def _remainder(m: jax.Array, n: jax.Array, quotient: jax.Array) -> jax.Array:
    """What the division leaves, exactly, if the quotient is nearly right: products of halves of the bits are exact."""
    n_high, quotient_high = _upper_half(n), _upper_half(quotient)
    n_low, quotient_low = n - n_high, quotient - quotient_high
    return m - n_high * quotient_high - n_high * quotient_low - n_low * quotient_high - n_low * quotient_low


def _mantissa(x: Float32) -> jax.Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & _MANTISSA | _ONE, jnp.float32)


def _upper_half(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & np.int32(-4096), jnp.float32)


def nearest(x: jax.Array) -> jax.Array:
    """The nearest integer; of two, the even one."""
    return jnp.round(x)


def stochastic(random: jax.Array):
    """A rounding to one of the two next integers, to the upper one with the probability of the fraction.

    Args:
        random: uint32 numbers, of the shape of what is to be rounded.
    """

    def rounded(x):
        lower = jnp.floor(x)
        uniform = (random >> 8).astype(jnp.float32) * np.float32(2**-24)
        return lower + (uniform < x - lower).astype(jnp.float32)

    return rounded


def encode(x: Float32, dtype, rounded=nearest) -> jax.Array:
    """The codes of floating numbers of 8 or 4 bits, as int32, saturating; those of NaN are all ones but for the sign.

    XLA's conversions round twice on the CPU, and to NaN what is too large.

    Args:
        x: float32.
        dtype: a floating type, of whose NaN these are the bits if it has any.
        rounded: a rounding to integers.
    """
    info = jnp.finfo(dtype)
    largest = np.float32(info.max)
    magnitude = jnp.minimum(jnp.abs(x), largest)
    e = jnp.maximum(exponent(magnitude), info.minexp)
    # Code 0 is 0, and each code is the next number: 2**nmant of them have the same unit, at the least exponent twice.
    scaled = jnp.where(x < 0, -magnitude, magnitude) * power_of_two(info.nmant - e)
    code = jnp.abs(rounded(scaled)).astype(jnp.int32) + ((e - info.minexp) << info.nmant)
    sign = lax.shift_right_logical(lax.bitcast_convert_type(x, jnp.int32), np.int32(31)) << (info.bits - 1)
    return jnp.where(jnp.isnan(x), (1 << (info.bits - 1)) - 1, code | sign)
