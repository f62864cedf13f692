"""The options of a call: what they must be, and what they mean for an array."""

import math
import numbers
import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from . import _sharded, _shardings
from ._orders import MAX_LENGTH, MAX_ORDER, decompose
from ._primitive import StaticArray

AxisName = Hashable | tuple[Hashable, ...] | None

_REAL = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


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
    axis = checked_axis(options.axis, x.ndim)
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
    minus = _shardings.replicated(negative) if options.signs is None else options.signs.value
    if minus is not None:
        check_signs(minus, n // devices, size)
    return Task(axis, n, devices, minus)


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


def checked_axis(axis: int, ndim: int) -> int:
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
        raise ValueError(too_many(n, axis, devices, options.axis_name))


def check_signs(negative: np.ndarray | jax.Array, *sizes: int) -> None:
    if len(negative) not in sizes:
        shapes = " or ".join(f"({size},)" for size in dict.fromkeys(sizes))
        raise ValueError(f"hadamard: signs must have shape {shapes}, got ({len(negative)},).")


def too_many(n: int, axis: int, devices: int, axis_name: AxisName) -> str:
    return (
        f"hadamard: axis {axis} of n = {n} elements cannot be transformed across the {_devices(devices, axis_name)}; "
        f"the largest usable P is {_sharded.most_devices(n)}, and P must be a power of two. "
        "Split the axis over fewer devices, or gather it first."
    )


def _devices(devices: int, axis_name: AxisName) -> str:
    name = axis_name[0] if isinstance(axis_name, tuple) and len(axis_name) == 1 else axis_name
    return f"P = {devices} devices of the mesh axis {name!r}"


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
