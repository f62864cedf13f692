"""hadamard(): the public transform and its options."""

import functools
import math
import numbers
import operator
from collections.abc import Hashable

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from . import _sharded
from ._orders import decompose
from ._primitive import hadamard_p

AxisName = Hashable | tuple[Hashable, ...] | None

_REAL = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


def hadamard(
    x: ArrayLike, *, axis: int = -1, scale: float | None = None, axis_name: AxisName = None, inplace: bool = False
) -> jax.Array:
    """The Hadamard transform of one axis: y = scale * H_n x, rounded once.

    H_n is Sylvester's matrix of order n = 2^m in natural order, H_n[i, j] = (-1)**popcount(i & j). It is symmetric and
    H_n H_n = n I, so with the default scale the transform is its own inverse and its own gradient.

    Args:
        x: float16, bfloat16, float32, float64, complex64 or complex128 array of rank 1 or more. A 16-bit array is
            accumulated in float32; of a complex array both parts are transformed.
        axis: the axis to transform. Its length n is a power of two up to 2^24.
        scale: a static real number. By default n**-0.5, which makes the transform orthonormal.
        axis_name: inside `jax.shard_map`, the mesh axis that the axis is split over, or a tuple of mesh axes: x is this
            device's block of it, n its length over all P devices. The result is this device's block of the transform
            of the whole axis. Nothing is gathered: two `all_to_all` in x's dtype move 2 / P of what a gather would. P
            is a power of two whose square divides n; 16-bit results are rounded twice.
        inplace: let the result take the operand's memory. With a donated operand that saves a buffer, with the carry of
            a loop a copy; with any other operand XLA copies first, so the result is the same. With an axis_name it
            changes nothing: the memory of a donated operand is used again without it.

    Returns:
        An array of x's shape, dtype and sharding. A row's bits depend on that row alone, not on the rest of the batch.

    Raises:
        TypeError: x is not floating or complex, scale is not a static real number, axis_name is no name, or inplace is
            not a bool.
        ValueError: x is a scalar, axis is out of range, the axis has no supported length, scale is not finite or
            beyond the range of the arithmetic (float64 for float64, else float32), there is no such axis_name, or P
            devices cannot share the axis.

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
    axis, scale = _static_options(axis, scale, inplace)
    if axis_name is None and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        # Outside of any program, jit's cache is many times as fast as the steps below.
        return _compiled(x, axis=axis, scale=scale, axis_name=None, inplace=inplace)
    return _hadamard(jnp.asarray(x), axis=axis, scale=scale, axis_name=axis_name, inplace=inplace)


def hadamard_sharded(
    x: ArrayLike,
    *,
    axis: int = -1,
    scale: float | None = None,
    sharding: NamedSharding | None = None,
    inplace: bool = False,
) -> jax.Array:
    """The Hadamard transform of an axis that is split between devices, without gathering it.

    `hadamard` with an `axis_name`, for arrays outside of `jax.shard_map`. The result is that of `hadamard(x)`, which
    gathers such an axis, but for 16-bit arrays a second rounding.

    Args:
        x: an array as for `hadamard`.
        axis: the axis to transform. It may be split over P devices, a power of two whose square divides its length.
        scale: a static real number. By default n**-0.5, n the length of the axis.
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
    axis, scale = _static_options(axis, scale, inplace)
    if sharding is None:
        x = jnp.asarray(x)
        known = _known_sharding(x)
        if isinstance(known, SingleDeviceSharding):
            return hadamard(x, axis=axis, scale=scale, inplace=inplace)
        if not isinstance(known, NamedSharding):
            raise ValueError(
                "hadamard_sharded: the sharding of x is not known here; pass it as sharding=NamedSharding(mesh, spec)."
            )
        sharding = known
    elif not isinstance(sharding, NamedSharding):
        raise TypeError(f"hadamard_sharded: sharding must be a NamedSharding, got {type(sharding).__name__}.")
    return _sharded_program(x, axis=axis, scale=scale, sharding=sharding, inplace=inplace)


@functools.partial(jax.jit, static_argnames=("axis", "scale", "sharding", "inplace"))
def _sharded_program(x, *, axis, scale, sharding, inplace):
    axis = _checked_axis(axis, x.ndim)
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    names = spec[axis] if isinstance(spec[axis], tuple) else () if spec[axis] is None else (spec[axis],)
    n, devices = x.shape[axis], math.prod(sharding.mesh.shape[name] for name in names)
    if n % devices:
        raise ValueError(_too_many(n, axis, devices, names))
    local = functools.partial(_hadamard, axis=axis, scale=scale, axis_name=names or None, inplace=inplace)
    specs = PartitionSpec(*spec)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=specs)(x)


def _hadamard(x: jax.Array, *, axis: int, scale: float | None, axis_name: AxisName, inplace: bool) -> jax.Array:
    axis = _checked_axis(axis, x.ndim)
    if jnp.iscomplexobj(x):
        parts = (
            _hadamard(part, axis=axis, scale=scale, axis_name=axis_name, inplace=inplace) for part in (x.real, x.imag)
        )
        return jax.lax.complex(*parts)
    if x.dtype not in _REAL:
        raise TypeError(
            f"hadamard: dtype {x.dtype.name} is not supported; it must be float16, bfloat16, float32, float64, "
            "complex64 or complex128. Convert first, e.g. x.astype(jnp.float32)."
        )
    if not isinstance(x.shape[axis], int):
        raise ValueError(f"hadamard: the transformed axis must have a static size, got {x.shape[axis]}.")
    devices = 1 if axis_name is None else _sharded.axis_size(axis_name)
    n = x.shape[axis] * devices
    decompose(n)
    if devices > 1 and _sharded.rows_across(n, devices) is None:
        raise ValueError(_too_many(n, axis, devices, axis_name))
    scale = _checked_scale(scale, n, x.dtype)
    if devices == 1:
        transform = functools.partial(hadamard_p.bind, scale=scale, inplace=inplace)
    else:
        transform = functools.partial(_sharded.transform, scale=scale, axis_name=axis_name)
    y = jnp.moveaxis(x, axis, -1)
    if split := _split_last_axis(y):  # gathers the transformed axis, and splits it again afterwards
        whole = NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None))
        y = jax.sharding.reshard(transform(jax.sharding.reshard(y, whole)), split)
    else:
        y = transform(y)
    return jnp.moveaxis(y, -1, axis)


_compiled = jax.jit(_hadamard, static_argnames=("axis", "scale", "axis_name", "inplace"))


def _too_many(n: int, axis: int, devices: int, axis_name: AxisName) -> str:
    name = axis_name[0] if isinstance(axis_name, tuple) and len(axis_name) == 1 else axis_name
    return (
        f"hadamard: axis {axis} of n = {n} elements cannot be transformed across the P = {devices} devices of the mesh "
        f"axis {name!r}; the largest usable P is {_sharded.most_devices(n)}, and P must be a power of two. "
        "Split the axis over fewer devices, or gather it first."
    )


def _checked_axis(axis: int, ndim: int) -> int:
    if ndim == 0:
        raise ValueError("hadamard: x must have at least one dimension, got a scalar.")
    if not -ndim <= axis < ndim:
        raise ValueError(f"hadamard: axis must be from {-ndim} to {ndim - 1} for an array of rank {ndim}, got {axis}.")
    return axis % ndim


def _static_options(axis, scale, inplace) -> tuple[int, float | None]:
    """The options that any array is transformed with, as values that a compiled program is found by."""
    if not isinstance(inplace, bool):
        raise TypeError(f"hadamard: inplace must be True or False, got {inplace!r}.")
    return operator.index(axis), None if scale is None else _static_real(scale)


def _static_real(scale) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"hadamard: scale must be a static real number, got {type(scale).__name__}. "
            "Multiply the result by an array or a traced value instead."
        )
    try:
        return float(scale)
    except OverflowError:  # a huge integer
        return math.inf


def _checked_scale(scale: float | None, n: int, dtype) -> float:
    if scale is None:
        return n**-0.5
    # Everything but float64 is scaled in float32.
    limits = jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    smallest, largest = float(limits.smallest_normal), float(limits.max)
    if scale and not smallest <= abs(scale) <= largest:
        raise ValueError(
            f"hadamard: scale must be finite, and 0 or of magnitude {smallest:.3g} to {largest:.3g} for {dtype.name}, "
            f"got {scale}."
        )
    return scale


def _known_sharding(x: jax.Array) -> Sharding | None:
    """The sharding in an array's type (explicit sharding mode) or of a concrete array, else None."""
    in_type = jax.typeof(x).sharding
    if any(kind == AxisType.Explicit for kind in in_type.mesh.axis_types):
        return in_type
    return None if isinstance(x, jax.core.Tracer) else x.sharding


def _split_last_axis(x: jax.Array) -> NamedSharding | None:
    """The sharding in the array's type (explicit sharding mode) where it splits the last axis, else None."""
    sharding = jax.typeof(x).sharding
    spec = getattr(sharding, "spec", None)
    return sharding if spec and len(spec) == x.ndim and spec[-1] is not None else None
