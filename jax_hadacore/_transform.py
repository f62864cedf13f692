"""hadamard(): the public transform and its options."""

import math
import numbers
import operator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._orders import decompose
from ._primitive import hadamard_p

_REAL = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


def hadamard(x: ArrayLike, *, axis: int = -1, scale: float | None = None, inplace: bool = False) -> jax.Array:
    """The Hadamard transform of one axis: y = scale * H_n x, rounded once.

    H_n is Sylvester's matrix of order n = 2^m in natural order, H_n[i, j] = (-1)**popcount(i & j). It is symmetric and
    H_n H_n = n I, so with the default scale the transform is its own inverse and its own gradient.

    Args:
        x: float16, bfloat16, float32, float64, complex64 or complex128 array of rank 1 or more. A 16-bit array is
            accumulated in float32; of a complex array both parts are transformed.
        axis: the axis to transform. Its length n is a power of two up to 2^24.
        scale: a static real number. By default n**-0.5, which makes the transform orthonormal.
        inplace: let the result take the operand's memory. With a donated operand that saves a buffer, with the carry of
            a loop a copy; with any other operand XLA copies first, so the result is the same.

    Returns:
        An array of x's shape, dtype and sharding. A row's bits depend on that row alone, not on the rest of the batch.

    Raises:
        TypeError: x is not floating or complex, scale is not a static real number, or inplace is not a bool.
        ValueError: x is a scalar, axis is out of range, the axis has no supported length, or scale is not finite or
            beyond the range of the arithmetic (float64 for float64, else float32).

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore import hadamard
        >>> hadamard(jnp.array([1.0, 2.0, 3.0, 4.0]))
        Array([ 5., -1., -2.,  0.], dtype=float32)
        >>> hadamard(hadamard(jnp.array([1.0, 2.0, 3.0, 4.0])))
        Array([1., 2., 3., 4.], dtype=float32)

    The fast algorithm is due to Good (1958); the tensor-core formulation to HadaCore (Agarwal et al., 2024,
    arXiv:2412.08832).
    """
    x = jnp.asarray(x)
    axis = _checked_axis(axis, x.ndim)
    if not isinstance(inplace, bool):
        raise TypeError(f"hadamard: inplace must be True or False, got {inplace!r}.")
    if jnp.iscomplexobj(x):
        parts = (hadamard(part, axis=axis, scale=scale) for part in (x.real, x.imag))
        return jax.lax.complex(*parts)
    if x.dtype not in _REAL:
        raise TypeError(
            f"hadamard: dtype {x.dtype.name} is not supported; it must be float16, bfloat16, float32, float64, "
            "complex64 or complex128. Convert first, e.g. x.astype(jnp.float32)."
        )
    n = x.shape[axis]
    if not isinstance(n, int):
        raise ValueError(f"hadamard: the transformed axis must have a static size, got {n}.")
    decompose(n)
    scale = _checked_scale(scale, n, x.dtype)
    y = jnp.moveaxis(x, axis, -1)
    if split := _split_last_axis(y):  # gathers the transformed axis, and splits it again afterwards
        whole = NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None))
        y = hadamard_p.bind(jax.sharding.reshard(y, whole), scale=scale, inplace=False)
        y = jax.sharding.reshard(y, split)
    else:
        y = hadamard_p.bind(y, scale=scale, inplace=inplace)
    return jnp.moveaxis(y, -1, axis)


def _checked_axis(axis, ndim: int) -> int:
    axis = operator.index(axis)
    if ndim == 0:
        raise ValueError("hadamard: x must have at least one dimension, got a scalar.")
    if not -ndim <= axis < ndim:
        raise ValueError(f"hadamard: axis must be from {-ndim} to {ndim - 1} for an array of rank {ndim}, got {axis}.")
    return axis % ndim


def _checked_scale(scale, n: int, dtype) -> float:
    if scale is None:
        return n**-0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"hadamard: scale must be a static real number, got {type(scale).__name__}. "
            "Multiply the result by an array or a traced value instead."
        )
    try:
        value = float(scale)
    except OverflowError:  # a huge integer
        value = math.inf
    # Everything but float64 is scaled in float32.
    limits = jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    smallest, largest = float(limits.smallest_normal), float(limits.max)
    if value and not smallest <= abs(value) <= largest:
        raise ValueError(
            f"hadamard: scale must be finite, and 0 or of magnitude {smallest:.3g} to {largest:.3g} for {dtype.name}, "
            f"got {scale}."
        )
    return value


def _split_last_axis(x: jax.Array) -> NamedSharding | None:
    """The sharding in the array's type (explicit sharding mode) where it splits the last axis, else None."""
    sharding = jax.typeof(x).sharding
    spec = getattr(sharding, "spec", None)
    return sharding if spec and len(spec) == x.ndim and spec[-1] is not None else None
