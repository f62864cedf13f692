"""hadamard(): the public transform, of an array or of one that is split."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import ArrayLike, DTypeLike

from . import _primitive, _sharded, _shardings
from ._options import AxisName, Options, Task, check_signs, checked_axis, checked_scale, parsed, resolved, too_many


def hadamard(
    x: ArrayLike,
    *,
    axis: int = -1,
    scale: float | None = None,
    block_size: int | None = None,
    signs: ArrayLike | Sequence[int] | None = None,
    matrix: ArrayLike | Sequence[Sequence[float]] | None = None,
    transpose: bool = False,
    axis_name: AxisName = None,
    inplace: bool = False,
) -> jax.Array:
    """The Hadamard transform of one axis: y = scale * T x, rounded once.

    T is the matrix H_n of +-1 that `hadamard_matrix(n)` returns: for a power of two Sylvester's in natural order,
    H_n[i, j] = (-1)**popcount(i & j); for other lengths n = k * 2^m the Kronecker product M_k (x) H_{2^m}, where M_k is
    one of Paley's matrices or the product of two (`decompose`). All are symmetric, H_n H_n = n I. So with the default
    scale, and without signs or a matrix, the transform is its own inverse and its own gradient.

    With `signs` s, T x = H_n (s * x); with a `matrix` M of order k, T = M (x) H_{2^m}. `transpose=True` applies the
    adjoint T^T, which with the default scale is the inverse.

    Args:
        x: float16, bfloat16, float32, float64, complex64 or complex128 array of rank 1 or more. A 16-bit array is
            accumulated in float32; of a complex array both parts are transformed.
        axis: the axis to transform. Its length n is a power of two, or a number that `is_supported`, up to 2^24.
        scale: a static real number. By default the one that makes the transform orthonormal: n**-0.5, and with a
            `matrix` (2^m)**-0.5 / c.
        block_size: transform blocks of n = block_size elements, which must divide the axis, each by itself.
        signs: an array of +1 and -1, floating or of signed integers, of n elements; or, with a block_size, of as many
            as the axis has. Concrete values are checked, and compiled into the program; of traced ones everything below
            zero is -1. They are constants: no gradient flows into them.
        matrix: a concrete array M of shape (k, k), k <= 1024, with M M^T = c^2 I, for an axis of length k * 2^m. It
            acts on the slow index: with x viewed as (k, 2^m), y = scale * M x H. No gradient flows into it.
        transpose: apply the adjoint of the transform: M^T for M, and the signs after it.
        axis_name: inside `jax.shard_map`, the mesh axis that the axis is split over, or a tuple of mesh axes: x is this
            device's block of it, `signs` that block's, n its length over all P devices. The result is this device's
            block of the transform of the whole axis. Nothing is gathered: two `all_to_all` in x's dtype move 2 / P of
            what a gather would. P is a power of two; with K the smallest multiple k * 2^j of P, P * K divides n; 16-bit
            results are rounded twice. With a block_size that divides the block nothing is communicated; without one a
            matrix is not supported.
        inplace: let the result take the operand's memory. With a donated operand that saves a buffer, with the carry of
            a loop a copy; with any other operand XLA copies first, so the result is the same. With an axis_name it
            changes nothing: the memory of a donated operand is used again without it.

    Returns:
        An array of x's shape, dtype and sharding. A row's bits depend on that row alone, not on the rest of the batch.

    Raises:
        TypeError: x is not floating or complex, scale is not a static real number, signs or matrix have another dtype,
            matrix is traced, axis_name is no name, or an option that is to be an int or a bool is not.
        ValueError: x is a scalar, axis is out of range, the axis has no supported length or block_size does not divide
            it, scale is not finite or beyond the range of the arithmetic (float64 for float64, else float32), signs
            have another shape or other values, the rows of matrix are not orthogonal and of one norm, there is no such
            axis_name, or P devices cannot share the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore import hadamard
        >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> hadamard(x)
        Array([ 5., -1., -2.,  0.], dtype=float32)
        >>> hadamard(hadamard(x))
        Array([1., 2., 3., 4.], dtype=float32)
        >>> hadamard(x, block_size=2, scale=1)
        Array([ 3., -1.,  7., -1.], dtype=float32)
        >>> y = hadamard(x, signs=[1, -1, 1, 1])
        >>> hadamard(y, signs=[1, -1, 1, 1], transpose=True)
        Array([1., 2., 3., 4.], dtype=float32)

    The fast algorithm is due to Good (1958); the tensor-core formulation to HadaCore (Agarwal et al., 2024,
    arXiv:2412.08832); Paley's matrices are from Paley (1933); random signs before the transform are those of the
    randomised Hadamard transform (Ailon and Chazelle, 2006).
    """
    options, negative = parsed(
        axis=axis,
        scale=scale,
        block_size=block_size,
        signs=signs,
        matrix=matrix,
        transpose=transpose,
        axis_name=axis_name,
        inplace=inplace,
    )
    return _transformed(x, options, negative)


def hadamard_sharded(
    x: ArrayLike,
    *,
    axis: int = -1,
    scale: float | None = None,
    block_size: int | None = None,
    signs: ArrayLike | Sequence[int] | None = None,
    matrix: ArrayLike | Sequence[Sequence[float]] | None = None,
    transpose: bool = False,
    sharding: NamedSharding | None = None,
    inplace: bool = False,
) -> jax.Array:
    """The Hadamard transform of an axis that is split between devices, without gathering it.

    `hadamard` with an `axis_name`, for arrays outside of `jax.shard_map`. The result is that of `hadamard(x)`, which
    gathers such an axis, but for 16-bit arrays a second rounding.

    Args:
        x: an array as for `hadamard`.
        axis: the axis to transform. It may be split over P devices, as for an `axis_name` of `hadamard`.
        scale: a static real number, as for `hadamard`.
        block_size: as for `hadamard`. Where the axis is split it must divide each device's block.
        signs: as for `hadamard`, those of the whole axis or of one block_size.
        matrix: as for `hadamard`. Where the axis is split it needs a block_size.
        transpose: apply the adjoint, as for `hadamard`.
        sharding: how x is sharded. It can be left out where x itself says so: outside of a program, and on a mesh of
            explicit axes. Elsewhere inside `jax.jit` the compiler decides about shardings, and x knows of none.
        inplace: let the result take the operand's memory, as for `hadamard`, where the axis is not split.

    Returns:
        An array of x's shape, dtype and sharding.

    Raises:
        TypeError: as for `hadamard`, or sharding is not a `NamedSharding`.
        ValueError: as for `hadamard`, or x's sharding is not known.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> from jax_hadacore import hadamard_sharded
        >>> mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices("cpu")[:2])
        >>> sharding = NamedSharding(mesh, P("tp"))
        >>> x = jax.device_put(jnp.array([1.0, 2.0, 3.0, 4.0]), sharding)
        >>> hadamard_sharded(x)
        Array([ 5., -1., -2.,  0.], dtype=float32)
        >>> jax.jit(lambda x: hadamard_sharded(x + x, sharding=sharding))(x)
        Array([10., -2., -4.,  0.], dtype=float32)
    """
    options, negative = parsed(
        axis=axis,
        scale=scale,
        block_size=block_size,
        signs=signs,
        matrix=matrix,
        transpose=transpose,
        axis_name=None,
        inplace=inplace,
    )
    if sharding is None:
        x = jnp.asarray(x)
        known = _shardings.known_sharding(x)
        if isinstance(known, SingleDeviceSharding):
            return _transformed(x, options, negative)
        if not isinstance(known, NamedSharding):
            raise ValueError(
                "hadamard_sharded: the sharding of x is not known here; pass it as sharding=NamedSharding(mesh, spec)."
            )
        sharding = known
    elif not isinstance(sharding, NamedSharding):
        raise TypeError(f"hadamard_sharded: sharding must be a NamedSharding, got {type(sharding).__name__}.")
    return _sharded_program(x, negative, options=options, sharding=sharding)


def random_signs(key: jax.Array, n: int, dtype: DTypeLike = jnp.int8) -> jax.Array:
    """Random signs for `hadamard`: n values +1 and -1, each with probability 1/2.

    Draw them once, and store them with the weights that they are folded into: another version of JAX may draw others
    from the same key.

    Args:
        key: a key of `jax.random`.
        n: how many.
        dtype: of the result.

    Returns:
        An array of shape (n,).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_hadacore import hadamard, random_signs
        >>> s = random_signs(jax.random.key(0), 24)
        >>> y = hadamard(jnp.ones(24), signs=s)
        >>> jnp.allclose(hadamard(y, signs=s, transpose=True), 1, atol=1e-6)
        Array(True, dtype=bool)
    """
    return jax.random.rademacher(key, (n,), dtype)


def _transformed(x, options: Options, negative: jax.Array | None) -> jax.Array:
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    if concrete and negative is None and options.axis_name is None:
        # Outside of any program, jit's cache is many times as fast as the steps below.
        return _compiled(x, options=options)
    return apply(jnp.asarray(x), negative, options=options)


def apply(x: jax.Array, negative: jax.Array | None = None, *, options: Options) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jax.lax.complex(*(apply(part, negative, options=options) for part in (x.real, x.imag)))
    task = resolved(x, negative, options)
    transform = functools.partial(transform_last, task=task, options=options)
    y = jnp.moveaxis(x, task.axis, -1)
    split = _shardings.split_last_axis(y)
    if split and (y.shape[-1] // task.n) % _shardings.pieces(split):
        y = jax.sharding.reshard(transform(_shardings.whole(y, split)), split)
    else:
        y = transform(y)
    return jnp.moveaxis(y, -1, task.axis)


def transform_last(y: jax.Array, *, task: Task, options: Options) -> jax.Array:
    """Transforms the last axis: blocks of n elements, or this device's part of one."""
    minus = task.minus
    scale = checked_scale(options, task.n, y.dtype)
    if task.devices > 1:
        transform = functools.partial(_sharded.transform, scale=scale, axis_name=options.axis_name)
    else:
        transform = functools.partial(
            _primitive.transform,
            scale=scale,
            length=task.n,
            matrix=options.matrix and options.matrix.entries,
            transpose=options.transpose,
            inplace=options.inplace,
            behind=y.ndim - 1 - task.axis,
        )
        if minus is not None and fits_a_call(y, minus, task.n):
            return transform(y, negative=minus)
    if minus is None:
        return transform(y)
    return _primitive.with_signs(y, transform=transform, negative=minus, transpose=options.transpose)


def fits_a_call(y: jax.Array, minus: np.ndarray | jax.Array, n: int) -> bool:
    """Whether the signs can be part of a call, which applies the same ones to all of its rows, on every device."""
    return len(minus) == n and _shardings.varying(minus) <= _shardings.varying(y)


_compiled = jax.jit(apply, static_argnames="options")


@functools.partial(jax.jit, static_argnames=("options", "sharding"))
def _sharded_program(x, negative, *, options: Options, sharding: NamedSharding):
    axis = checked_axis(options.axis, x.ndim)
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    names = spec[axis] if isinstance(spec[axis], tuple) else () if spec[axis] is None else (spec[axis],)
    size, devices = x.shape[axis], math.prod(sharding.mesh.shape[name] for name in names)
    if size % devices:
        raise ValueError(too_many(size, axis, devices, names))
    minus = _shardings.replicated(negative) if options.signs is None else jnp.asarray(options.signs.value)
    if minus is not None:
        check_signs(minus, options.block_size or size, size)

    def local(x, minus):
        if minus is not None and len(minus) == size:
            block = size // devices
            minus = jax.lax.dynamic_slice_in_dim(minus, jax.lax.axis_index(names) * block, block)
        return apply(x, minus, options=options._replace(signs=None, axis_name=names or None))

    specs = PartitionSpec(*spec)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=(specs, PartitionSpec()), out_specs=specs)(x, minus)
