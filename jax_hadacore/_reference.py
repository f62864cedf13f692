"""The transform in plain jax.numpy: the definition, and the lowering for platforms without a kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from ._orders import sylvester

# The largest matrix that a factor is applied with. Fewer products with larger ones would be faster, but XLA sums them
# one term after the other, and the float32 error grows with the length of the sum (docs/numerics.md).
_MAX_FACTOR = 4


def transform(x: jax.Array, *, scale: float) -> jax.Array:
    """Computes scale * H_n x along the last axis, accumulated in float32 (float64 for float64) and rounded once.

    H_n is the Kronecker product of smaller H's, so the axis is split into small factors, and each is transformed by a
    matrix product.
    """
    n = x.shape[-1]
    batch = x.shape[:-1]
    accumulator = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    factors = _split(n)
    y = x.astype(accumulator).reshape(*batch, *factors)
    for position, factor in enumerate(factors):
        axis = len(batch) + position
        matrix = jnp.asarray(sylvester(factor), accumulator)
        y = jax.lax.dot_general(
            y,
            matrix,
            (((axis,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=accumulator,
        )
        y = jnp.moveaxis(y, -1, axis)
    return (y.reshape(x.shape) * np.asarray(scale, accumulator)).astype(x.dtype)


def _split(n: int) -> tuple[int, ...]:
    """Powers of two of at most _MAX_FACTOR, as equal as possible, whose product is n = 2^m."""
    bits = n.bit_length() - 1
    count = -(-bits // (_MAX_FACTOR.bit_length() - 1))
    return tuple(1 << (bits * (i + 1) // count - bits * i // count) for i in range(count))
