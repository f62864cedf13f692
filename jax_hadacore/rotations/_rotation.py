"""Rotation: an orthogonal map of vectors, random signs, Hadamard transform, and a learned matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import hadamard


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to compute in for results of a dtype: float32 or wider."""
    return np.promote_types(dtype, np.float32)  # JAX's own refuses to promote where the user wants strictness


@functools.partial(jax.tree_util.register_dataclass, data_fields=("signs", "q"), meta_fields=("size", "block"))
@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal map T(x) = H (x * signs) q of row vectors, a pytree.

    H is the orthonormal `hadamard` transform, of the whole vector or of each block. The same forward map on a vector
    and on the matching axis of a matrix cancels out, T(x) @ T(w, axis=0) = x @ w: no inverse is needed to fold it.

    Leaves with one leading axis are a batch of rotations, one a layer: `rotation[i]` is one of them.

    Attributes:
        size: n, the length of the vectors.
        signs: (..., n) of +1 and -1, floating or signed integers; None for none. No gradient flows into them.
        q: the learned matrix, (..., n, n), or (..., n / block, block, block) with a block; None for the identity.
        block: the length of each transform; None for n.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore.rotations import Rotation
        >>> rotation = Rotation(4, signs=jnp.array([1.0, -1.0, 1.0, 1.0]))
        >>> y = rotation.apply(jnp.array([1.0, 2.0, 3.0, 4.0]))
        >>> y
        Array([ 3.,  1., -4.,  2.], dtype=float32)
        >>> rotation.apply(y, transpose=True)
        Array([1., 2., 3., 4.], dtype=float32)

    Random signs and a transform are QuaRot's rotation (arXiv:2404.00456), a learned one is SpinQuant's
    (arXiv:2405.16406), here as a factor that starts as the identity.
    """

    size: int
    signs: jax.Array | None = None
    q: jax.Array | None = None
    block: int | None = None

    @property
    def batch(self) -> tuple[int, ...] | None:
        """The leading axes of the leaves, () for a single rotation; None where there are no leaves to tell."""
        if self.signs is not None:
            return self.signs.shape[:-1]
        return None if self.q is None else self.q.shape[: -2 if self.block is None else -3]

    def apply(self, x: jax.Array, axis: int = -1, *, transpose: bool = False, layers: int | None = None) -> jax.Array:
        """T along an axis of x, or its adjoint, which is the inverse.

        Args:
            x: an array that `hadamard` takes, with the axis of length n.
            axis: which one.
            transpose: apply the adjoint, H (x q^T) * signs.
            layers: for a batch of rotations, the axis of x that numbers them.

        Returns:
            An array of x's shape and dtype. With a q it is computed in float32 or wider, and rounded once.

        Raises:
            ValueError: the axis is not of length n, or `hadamard` knows no transform of that length.
        """
        if layers is not None:
            axis, layers = axis % x.ndim, layers % x.ndim
            one = functools.partial(Rotation.apply, axis=axis - (axis > layers), transpose=transpose)
            return jax.vmap(one, in_axes=(0, layers), out_axes=layers)(self, x)
        if x.shape[axis] != self.size:
            raise ValueError(
                f"Rotation.apply: axis {axis} must have the rotation's size {self.size}, got shape {x.shape}."
            )
        transform = functools.partial(hadamard, axis=axis, block_size=self.block, signs=self.signs, transpose=transpose)
        if self.q is None:
            return transform(x)
        y = x.astype(wide(x.dtype))
        y = transform(self._learned(y, axis, transpose)) if transpose else self._learned(transform(y), axis, transpose)
        return y.astype(x.dtype)

    def __getitem__(self, index: int) -> "Rotation":
        """One rotation of a batch.

        Raises:
            IndexError: there is no such rotation.
        """
        # JAX would take the last one instead.
        if self.batch is not None and not (self.batch and -self.batch[0] <= index < self.batch[0]):
            raise IndexError(f"Rotation: a batch of shape {self.batch} has no rotation {index}.")
        return jax.tree.map(lambda leaf: leaf[index], self)

    def _learned(self, x: jax.Array, axis: int, transpose: bool) -> jax.Array:
        """The product with q, or q^T, along an axis; the blocks of q each multiply their part of it."""
        assert self.q is not None
        q = self.q.astype(x.dtype)
        width = q.shape[-1]
        rows = jnp.moveaxis(x, axis, -1)
        parts = rows.reshape(*rows.shape[:-1], self.size // width, width)
        y = jnp.einsum(
            "...bj,bij->...bi" if transpose else "...bi,bij->...bj",
            parts,
            q.reshape(self.size // width, width, width),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(y.reshape(rows.shape), -1, axis)
