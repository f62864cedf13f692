"""hadamard(): the public transform and its options."""

import functools
import math
import numbers
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike, DTypeLike

from . import _primitive, _sharded
from ._orders import MAX_LENGTH, MAX_ORDER, decompose
from ._primitive import StaticArray

AxisName = Hashable | tuple[Hashable, ...] | None

_REAL = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


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
        known = _known_sharding(x)
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


@dataclass(frozen=True)
class _Matrix:
    """The caller's matrix is unit * entries, and entries entries^T = square * I."""

    entries: StaticArray
    unit: float
    square: float

    @property
    def order(self) -> int:
        return self.entries.shape[0]


class Options(NamedTuple):
    """The options of a call, as values that a compiled program is found by."""

    axis: int
    scale: float | None
    block_size: int | None
    signs: StaticArray | None  # where they are minus; None for traced ones
    matrix: _Matrix | None
    transpose: bool
    axis_name: AxisName
    inplace: bool


def parsed(
    *, axis, scale, block_size, signs, matrix, transpose, axis_name, inplace
) -> tuple[Options, jax.Array | None]:
    """The options, as far as they can be checked without an array, and where traced signs are minus."""
    for name, value in ("transpose", transpose), ("inplace", inplace):
        if not isinstance(value, bool):
            raise TypeError(f"hadamard: {name} must be True or False, got {value!r}.")
    negative = None if signs is None else _parsed_signs(signs)
    concrete = isinstance(negative, np.ndarray)
    options = Options(
        axis=operator.index(axis),
        scale=None if scale is None else _static_real(scale),
        block_size=None if block_size is None else _static_size(block_size),
        signs=StaticArray.of(negative) if concrete else None,
        matrix=None if matrix is None else _parsed_matrix(matrix),
        # Without signs or a matrix the transform is its own adjoint: one program for both.
        transpose=transpose and not (signs is None and matrix is None),
        axis_name=axis_name,
        inplace=inplace,
    )
    return options, None if concrete else negative


def _parsed_signs(signs) -> np.ndarray | jax.Array:
    """Where signs are minus: traced if they are, else checked."""
    traced = isinstance(signs, jax.core.Tracer)
    values = signs if traced else np.asarray(signs)
    if not (jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.signedinteger)):
        raise TypeError(f"hadamard: signs must be floating or signed integers, got dtype {values.dtype}.")
    if values.ndim != 1:
        raise ValueError(f"hadamard: signs must have one dimension, got shape {values.shape}.")
    if not traced and (wrong := np.flatnonzero(np.abs(values) != 1)).size:
        raise ValueError(f"hadamard: signs must be +1 or -1, got {values[wrong[0]]} at index {wrong[0]}.")
    return values < 0


def _parsed_matrix(matrix) -> _Matrix:
    if isinstance(matrix, jax.core.Tracer):
        raise TypeError(
            "hadamard: matrix must be a concrete array, which is compiled into the program, got a traced one. "
            "Apply it by a matrix product instead."
        )
    given = np.asarray(matrix)
    floating = jnp.issubdtype(given.dtype, jnp.floating)
    if not (floating or jnp.issubdtype(given.dtype, jnp.signedinteger)):
        raise TypeError(f"hadamard: matrix must be floating or of signed integers, got dtype {given.dtype}.")
    order = len(given) if given.ndim else 0
    if given.shape != (order, order) or not 1 <= order <= MAX_ORDER:
        raise ValueError(f"hadamard: matrix must have shape (k, k), k from 1 to {MAX_ORDER}, got {given.shape}.")
    entries = given.astype(np.float64)
    with np.errstate(all="ignore"):  # of entries that are not finite, or all zero
        product = entries @ entries.T
        square = float(np.trace(product)) / order
        deviation = float(np.max(np.abs(product / square - np.eye(order))))
    # What computing an orthogonal matrix in float32 does to it, or rounding it to the dtype given.
    allowed = max(1e-5, float(jnp.finfo(given.dtype).eps) if floating else 0)
    if not deviation <= allowed:
        raise ValueError(
            "hadamard: matrix must have orthogonal rows of one norm c, M M^T = c^2 I; "
            f"M M^T / c^2 may deviate from I by {allowed:.2g}, got a largest deviation of {deviation:.2g}."
        )
    magnitude = float(abs(entries[0, 0]))
    if np.all(np.abs(entries) == magnitude):
        return _Matrix(StaticArray.of(np.sign(entries).astype(np.int8)), magnitude, order)
    # A power of two rounds nothing, and leaves entries that float32 can hold.
    unit = 2.0 ** round(math.log2(square) / 2)
    return _Matrix(StaticArray.of(entries / unit), unit, square / unit**2)


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
    split = split_last_axis(y)
    if split and (y.shape[-1] // task.n) % _pieces(split):
        y = jax.sharding.reshard(transform(whole(y, split)), split)
    else:
        y = transform(y)
    return jnp.moveaxis(y, -1, task.axis)


class Task(NamedTuple):
    """What is to be done with an array.

    Attributes:
        axis: the axis, counted from the first.
        n: the length of a transform.
        devices: how many share one.
        minus: where the signs are minus, for this device's part of a transform or of the axis, or None.
    """

    axis: int
    n: int
    devices: int
    minus: np.ndarray | jax.Array | None


def resolved(x: jax.Array, negative: jax.Array | None, options: Options) -> Task:
    """Checks a real array, and the options against it."""
    axis = _checked_axis(options.axis, x.ndim)
    if x.dtype not in _REAL:
        raise TypeError(
            f"hadamard: dtype {x.dtype.name} is not supported; it must be float16, bfloat16, float32, float64, "
            "complex64 or complex128. Convert first, e.g. x.astype(jnp.float32)."
        )
    size = x.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"hadamard: the transformed axis must have a static size, got {size}.")
    devices = 1 if options.axis_name is None else _sharded.axis_size(options.axis_name)
    n = size * devices
    if options.block_size is not None:
        _check_block(options.block_size, size, axis, options.axis_name)
        n, devices = options.block_size, 1
    _check_length(n, options.matrix)
    if devices > 1:
        _check_devices(n, axis, devices, options)
    minus = _replicated(negative) if options.signs is None else options.signs.value
    if minus is not None:
        _check_signs(minus, n // devices, size)
    return Task(axis, n, devices, minus)


def whole(x: jax.Array, split: NamedSharding) -> jax.Array:
    """Gathers a last axis that is split."""
    return jax.sharding.reshard(x, NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None)))


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
        )
        if minus is not None and fits_a_call(y, minus, task.n):
            return transform(y, negative=minus)
    if minus is None:
        return transform(y)
    return _primitive.with_signs(y, transform=transform, negative=minus, transpose=options.transpose)


def fits_a_call(y: jax.Array, minus: np.ndarray | jax.Array, n: int) -> bool:
    """Whether the signs can be part of a call, which applies the same ones to all of its rows, on every device."""
    return len(minus) == n and varying(minus) <= varying(y)


_compiled = jax.jit(apply, static_argnames="options")


@functools.partial(jax.jit, static_argnames=("options", "sharding"))
def _sharded_program(x, negative, *, options: Options, sharding: NamedSharding):
    axis = _checked_axis(options.axis, x.ndim)
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    names = spec[axis] if isinstance(spec[axis], tuple) else () if spec[axis] is None else (spec[axis],)
    size, devices = x.shape[axis], math.prod(sharding.mesh.shape[name] for name in names)
    if size % devices:
        raise ValueError(_too_many(size, axis, devices, names))
    minus = _replicated(negative) if options.signs is None else jnp.asarray(options.signs.value)
    if minus is not None:
        _check_signs(minus, options.block_size or size, size)

    def local(x, minus):
        if minus is not None and len(minus) == size:
            block = size // devices
            minus = jax.lax.dynamic_slice_in_dim(minus, jax.lax.axis_index(names) * block, block)
        return apply(x, minus, options=options._replace(signs=None, axis_name=names or None))

    specs = PartitionSpec(*spec)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=(specs, PartitionSpec()), out_specs=specs)(x, minus)


def _too_many(n: int, axis: int, devices: int, axis_name: AxisName) -> str:
    return (
        f"hadamard: axis {axis} of n = {n} elements cannot be transformed across the {_devices(devices, axis_name)}; "
        f"the largest usable P is {_sharded.most_devices(n)}, and P must be a power of two. "
        "Split the axis over fewer devices, or gather it first."
    )


def _devices(devices: int, axis_name: AxisName) -> str:
    name = axis_name[0] if isinstance(axis_name, tuple) and len(axis_name) == 1 else axis_name
    return f"P = {devices} devices of the mesh axis {name!r}"


def _checked_axis(axis: int, ndim: int) -> int:
    if ndim == 0:
        raise ValueError("hadamard: x must have at least one dimension, got a scalar.")
    if not -ndim <= axis < ndim:
        raise ValueError(f"hadamard: axis must be from {-ndim} to {ndim - 1} for an array of rank {ndim}, got {axis}.")
    return axis % ndim


def _check_length(n: int, matrix: _Matrix | None) -> None:
    if matrix is None:
        decompose(n)
        return
    power, rest = divmod(n, matrix.order)
    if rest or power < 1 or power & (power - 1) or n > MAX_LENGTH:
        raise ValueError(
            f"hadamard: with a matrix of order k = {matrix.order} the length of the transform must be k * 2^m, at most "
            f"2^24, got {n}."
        )


def _check_block(block_size: int, size: int, axis: int, axis_name: AxisName) -> None:
    if block_size < 1 or size % block_size:
        where = f"axis {axis}" if axis_name is None else f"axis {axis} on each device"
        raise ValueError(f"hadamard: block_size must divide the {size} elements of {where}, got {block_size}.")


def _check_devices(n: int, axis: int, devices: int, options: Options) -> None:
    if options.matrix is not None:
        raise ValueError(
            f"hadamard: a matrix cannot be applied across the {_devices(devices, options.axis_name)}. "
            f"Give a block_size that divides the {n // devices} elements on each, or gather axis {axis} first."
        )
    if _sharded.rows_across(n, devices) is None:
        raise ValueError(_too_many(n, axis, devices, options.axis_name))


def _check_signs(negative: np.ndarray | jax.Array, *sizes: int) -> None:
    if len(negative) not in sizes:
        shapes = " or ".join(f"({size},)" for size in dict.fromkeys(sizes))
        raise ValueError(f"hadamard: signs must have shape {shapes}, got ({len(negative)},).")


def _static_size(block_size) -> int:
    if isinstance(block_size, bool):
        raise TypeError(f"hadamard: block_size must be an integer, got {block_size!r}.")
    return operator.index(block_size)


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


def checked_scale(options: Options, n: int, dtype) -> float:
    """What the transform by +-1, or by the entries of a matrix, is multiplied by."""
    scale, matrix = options.scale, options.matrix
    if scale is None:
        return n**-0.5 if matrix is None else (n // matrix.order * matrix.square) ** -0.5
    if matrix is not None:
        scale *= matrix.unit
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


def split_last_axis(x: jax.Array) -> NamedSharding | None:
    """The sharding in the array's type (explicit sharding mode) where it splits the last axis, else None."""
    sharding = jax.typeof(x).sharding
    spec = getattr(sharding, "spec", None)
    return sharding if spec and len(spec) == x.ndim and spec[-1] is not None else None


def _pieces(split: NamedSharding) -> int:
    """How many pieces the last axis is split into."""
    names = split.spec[-1] if isinstance(split.spec[-1], tuple) else (split.spec[-1],)
    return math.prod(split.mesh.shape[name] for name in names)


def _replicated(negative: jax.Array | None) -> jax.Array | None:
    """Gathers signs that are split in explicit sharding mode: every row needs all of them."""
    split = None if negative is None else split_last_axis(negative)
    return jax.sharding.reshard(negative, NamedSharding(split.mesh, PartitionSpec(None))) if split else negative


def varying(x: np.ndarray | jax.Array) -> frozenset:
    """The manual mesh axes along which an array differs. Newer versions of JAX keep them in another place."""
    in_type = jax.typeof(x)
    return in_type.vma if hasattr(in_type, "vma") else in_type.manual_axis_type.varying
