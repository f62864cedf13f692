"""fake_quant: rounding to few integers with a straight-through gradient, to learn rotations through."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._rotation import wide

# The ratios of the largest magnitude that a search tries, in hundredths, and the power of the error that it minimises.
_RATIOS = range(100, 20, -1)
_POWER = 2.4


def fake_quant(
    x: ArrayLike,
    bits: int,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group: int | None = None,
    symmetric: bool = True,
    clip: float | Literal["search"] = 1.0,
    detach_scale: bool = True,
) -> jax.Array:
    """Rounds to integers of few bits and back, with the gradient of the identity.

    Elements that share a scale s are rounded to s (q - z), with q = round(x / s) + z from -2^(bits - 1) to
    2^(bits - 1) - 1:

        symmetric:   s = clip max|x| / (2^(bits - 1) - 1), z = 0
        asymmetric:  low = clip min(x, 0), high = clip max(x, 0), s = (high - low) / (2^bits - 1),
                     z = round(-2^(bits - 1) - low / s)

    Args:
        x: a floating-point array.
        bits: 2 to 8.
        axis: the axis or axes whose elements share a scale: -1 for a scale per token, the contracted axes of a weight
            for one per output channel; None for all.
        group: elements of the axis that share a scale, which divide its length; None for all of them.
        symmetric: whether the integers are symmetric about zero.
        clip: the part of the range that is kept, above 0 and at most 1; or "search": for each scale, whichever of 1,
            0.99, ... 0.21 makes sum |error|^2.4 the least.
        detach_scale: hold s and z constant: the gradient is exactly that of the identity. Otherwise it is that of the
            formula with each rounding as the identity: none into elements beyond the range that is kept, and through s
            into those that set it.

    Returns:
        An array of x's shape and dtype, computed in float32 or wider. What shares a scale is NaN if an element is
        infinite or NaN, and stays as it is if all are zero.

    Raises:
        TypeError: x is not floating-point.
        ValueError: bits, group or clip are not as above.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore.rotations import fake_quant
        >>> fake_quant(jnp.array([-7.0, 0.4, 2.6, 3.0]), 4)
        Array([-7.,  0.,  3.,  3.], dtype=float32)

    The quantisers, their search and their gradient are those of SpinQuant (Liu et al., 2024, arXiv:2405.16406); scales
    that are not held constant are LSQ's idea (Esser et al., 2019, arXiv:1902.08153). `hadamard_fake_quantize` has the
    formats of hardware, in one pass with the transform.
    """
    x = jnp.asarray(x)
    _check(x, bits, clip)
    wider = x.astype(wide(x.dtype))
    grouped, axes = _grouped(wider, axis, group)
    quantizer = _Quantizer(bits, axes, symmetric)
    ratio = quantizer.searched(grouped) if clip == "search" else clip
    rounded = jnp.round if detach_scale else lambda v: _straight_through(jnp.round(v), v)
    y = quantizer(grouped, ratio, rounded).reshape(x.shape)
    return (_straight_through(y, wider) if detach_scale else y).astype(x.dtype)


class _Quantizer(NamedTuple):
    """The definition: how many bits, and which axes share a scale."""

    bits: int
    axes: tuple[int, ...]
    symmetric: bool

    def __call__(
        self, x: jax.Array, ratio: float | jax.Array, rounded: Callable[[jax.Array], jax.Array] = jnp.round
    ) -> jax.Array:
        lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        largest = functools.partial(jnp.max, axis=self.axes, keepdims=True)
        if self.symmetric:
            scale = _nonzero(largest(jnp.abs(x)) * ratio / highest)
            zero = jnp.zeros_like(scale)
        else:
            low, high = -jnp.maximum(largest(-x), 0) * ratio, jnp.maximum(largest(x), 0) * ratio
            scale = _nonzero((high - low) / (highest - lowest))
            zero = rounded(lowest - low / scale)
        # XLA's maximum may pass over NaN on the CPU.
        scale = jnp.where(jnp.all(jnp.isfinite(x), axis=self.axes, keepdims=True), scale, jnp.nan)
        return scale * (jnp.clip(rounded(x / scale) + zero, lowest, highest) - zero)

    def searched(self, x: jax.Array) -> jax.Array:
        """The best ratio for each scale; of equally good ones the largest."""
        x = jax.lax.stop_gradient(x)

        def loss(ratio):
            return jnp.sum(jnp.abs(self(x, ratio) - x) ** _POWER, axis=self.axes, keepdims=True)

        def better(best, ratio):
            least, chosen = best
            new = loss(ratio)
            return (jnp.minimum(new, least), jnp.where(new < least, ratio, chosen)), None

        ratios = jnp.asarray([r / 100 for r in _RATIOS], x.dtype)
        first = loss(ratios[0])
        (_, chosen), _ = jax.lax.scan(better, (first, jnp.broadcast_to(ratios[0], first.shape)), ratios[1:])
        return chosen


def _check(x: jax.Array, bits: int, clip: float | str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"fake_quant: x must be floating-point, got dtype {x.dtype.name}.")
    if bits not in range(2, 9):
        raise ValueError(f"fake_quant: bits must be from 2 to 8, got {bits!r}.")
    if clip != "search" and not (isinstance(clip, (int, float)) and 0 < clip <= 1):
        raise ValueError(f'fake_quant: clip must be above 0 and at most 1, or "search", got {clip!r}.')


def _grouped(x: jax.Array, axis: int | tuple[int, ...] | None, group: int | None) -> tuple[jax.Array, tuple[int, ...]]:
    """The array with its axis split into groups, if asked for, and the axes that share a scale."""
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(f"fake_quant: axis must be within the {x.ndim} axes of x, got {axis}.")
    axes = tuple(a % x.ndim for a in axes)
    if group is None:
        return x, axes
    if len(axes) != 1 or not isinstance(group, int) or group < 1 or x.shape[axes[0]] % group:
        raise ValueError(
            f"fake_quant: group must divide the length of one axis, got {group!r} for axis {axis} of shape {x.shape}."
        )
    (a,) = axes
    return x.reshape(*x.shape[:a], x.shape[a] // group, group, *x.shape[a + 1 :]), (a + 1,)


def _nonzero(scale: jax.Array) -> jax.Array:
    """The scale, or 1 where all elements are zero (or so small that it is)."""
    return jnp.where(scale < np.finfo(scale.dtype).tiny, 1, scale)


def _straight_through(value: jax.Array, x: jax.Array) -> jax.Array:
    """The value, with the gradient of x alone."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x))
