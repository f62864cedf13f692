"""The quantiser in plain jax.numpy: the definition, and the second of two steps where they are not fused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._formats import Format, Quantizer
from ._rounding import divide, encode, exponent, magnitude_bits, nearest, power_of_two, product, stochastic

# The reciprocal of a smaller number would overflow.
_SMALLEST_SCALE = np.float32(2**-126)
_ONE = np.float32(1)


def quantize(
    w: jax.Array, quantizer: Quantizer, *, given: jax.Array | None = None, random: jax.Array | None = None
) -> list[jax.Array]:
    """Quantises groups of the last axis.

    Args:
        w: float32.
        quantizer: how.
        given: a float32 scalar: the scale, or that of the tensor in nvfp4.
        random: uint32 numbers of w's shape, for stochastic rounding.

    Returns:
        The codes, of w's shape; the scales, unless they are given; and zero points, if there are any.
    """
    group = quantizer.group
    in_groups = partial(jnp.reshape, shape=(*w.shape[:-1], w.shape[-1] // group, group))
    groups = in_groups(w)
    rounded = nearest if random is None else stochastic(in_groups(random))
    if quantizer.asymmetric:
        codes, *per_group = _with_zero_points(groups, rounded)
    else:
        inverse, *per_group = _scales(groups, quantizer, given)
        codes = _codes(product(groups, inverse), quantizer.format, rounded)
    return [codes.reshape(w.shape), *(values.squeeze(-1) for values in per_group)]


def _scales(groups: jax.Array, quantizer: Quantizer, given: jax.Array | None) -> list[jax.Array]:
    """What the elements of each group are multiplied by, and the scales as they are stored."""
    format = quantizer.format
    unit = _ONE if given is None else given
    if quantizer.given:
        return [divide(_ONE, unit)]
    largest, zero = _largest(groups)
    finite = largest < np.inf
    if format.scale_dtype == np.float32:
        scale = jnp.where(zero, _ONE, jnp.maximum(divide(largest, np.float32(format.largest)), _SMALLEST_SCALE))
        return [divide(_ONE, scale), scale]
    if format.scale_dtype == jnp.float8_e8m0fnu:
        e = jnp.where(zero, 0, jnp.clip(exponent(largest) - format.largest_exponent, -127, 127))
        stored = _bitcast(jnp.where(finite, e + 127, 255), format.scale_dtype)
        return [jnp.where(finite, power_of_two(-e), np.float32(np.nan)), stored]
    code = encode(divide(largest, np.float32(format.largest) * unit), format.scale_dtype)
    one = encode(_ONE, format.scale_dtype)
    stored = jnp.where(zero, one, jnp.where(finite, jnp.maximum(code, 1), 127))
    stored = _bitcast(stored, format.scale_dtype)
    return [divide(_ONE, stored.astype(jnp.float32) * unit), stored]


def _largest(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest magnitude of each group, NaN if one is, and whether it is zero.

    As integers, because XLA's reductions to a maximum pass over NaN on the CPU.
    """
    bits = jnp.max(magnitude_bits(groups), axis=-1, keepdims=True)
    return lax.bitcast_convert_type(bits, jnp.float32), bits == 0


def _codes(v: jax.Array, format: Format, rounded) -> jax.Array:
    """The codes of scaled elements."""
    if not format.is_integer:
        codes = encode(v, format.dtype, rounded)
        # Four bits have no NaN.
        return _bitcast(jnp.where(jnp.isnan(v), 0, codes) if format.bits == 4 else codes, format.dtype)
    codes = rounded(jnp.clip(v, np.float32(-format.largest), np.float32(format.largest)))
    return jnp.where(jnp.isnan(v), 0, codes).astype(jnp.int8).astype(format.dtype)


def _with_zero_points(groups: jax.Array, rounded) -> list[jax.Array]:
    """Codes of int4 from -8 on, scales and zero points."""
    low = jnp.minimum(jnp.min(groups, axis=-1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(groups, axis=-1, keepdims=True), 0)
    scale = jnp.maximum(divide(high - low, np.float32(15)), _SMALLEST_SCALE)
    scale = jnp.where(low == high, _ONE, scale)
    scale = jnp.where(jnp.isnan(_largest(groups)[0]), np.float32(np.nan), scale)
    inverse = divide(_ONE, scale)
    finite = scale < np.inf
    # The maximum changes nothing, but keeps compilers from a fused multiply-add, which rounds once less.
    zero_point = nearest(-8 - jnp.maximum(low * inverse, -16))
    codes = jnp.clip(rounded(product(groups, inverse)) + zero_point, -8, 7)
    return [
        jnp.where(finite, codes, 0).astype(jnp.int8).astype(jnp.int4),
        scale,
        jnp.where(finite, zero_point, 0).astype(jnp.int8),
    ]


def _bitcast(codes: jax.Array, dtype) -> jax.Array:
    unsigned = jnp.uint4 if jnp.finfo(dtype).bits == 4 else jnp.uint8
    return lax.bitcast_convert_type(codes.astype(jnp.uint8).astype(unsigned), dtype)
