"""The transform of an axis that is split between devices, without gathering it."""

import functools
import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from . import _primitive
from ._orders import decompose

# Up to so many rows are combined by butterflies in jax.numpy, which XLA fuses into a single pass over the array that
# reads every element so many times, mostly from a cache. More rows go to the kernel: in one pass where a GPU takes
# columns as they lie, else in three, transposed and back.
_MAX_FUSED_ROWS = 8


def axis_size(axis_name) -> int:
    """The number P of devices along a mesh axis, or along several together: the blocks that an array is split into.

    Raises:
        TypeError: axis_name is neither a name nor a tuple of names.
        ValueError: a name is not that of a manual axis in this context, or comes twice.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names:
        if isinstance(name, int) or not isinstance(name, Hashable):
            raise TypeError(
                f"hadamard: axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}."
            )
        if names.count(name) > 1:
            raise ValueError(f"hadamard: axis_name {axis_name!r} names the axis {name!r} more than once.")
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"hadamard: axis_name {axis_name!r}: there is no manual mesh axis {name!r} here. Call hadamard inside "
                "jax.shard_map over a mesh with that axis, or hadamard_sharded outside of it."
            ) from None
    return math.prod(jax.lax.axis_size(name) for name in names)


def rows_across(n: int, devices: int) -> int | None:
    """The length K of the transform across the rows that an axis of length n makes on all devices together.

    With n = k * 2^m (k the orders of `decompose`), K is the smallest length k * 2^j that the devices divide. So H_n is
    the Kronecker product of H_K and H_F, F = n / K: every device holds K / P whole rows of length F, and no row of the
    slow order k is cut. The devices must be able to share the columns, too: None where P does not divide F.
    """
    *orders, power = decompose(n)
    rows = math.prod(orders)
    while rows % devices and power > 1:
        rows, power = 2 * rows, power // 2
    return rows if rows % devices == 0 and power % devices == 0 else None


def most_devices(n: int) -> int:
    """The largest number of devices that an axis of length n can be split over."""
    return max(1 << e for e in range(n.bit_length()) if rows_across(n, 1 << e))


def transform(x: jax.Array, *, scale: float, axis_name) -> jax.Array:
    """Computes scale * H_n along the last axis, of which each device along axis_name holds a block.

    Every device transforms its rows; then it gets the same columns of everyone's rows, transforms them across the rows,
    and sends them back. In all that moves 2 / P of the bytes of a gather, twice rounded to x's dtype in between.
    """
    devices = axis_size(axis_name)
    n = x.shape[-1] * devices
    rows = rows_across(n, devices)
    if rows is None:
        raise ValueError(f"an axis of length {n} cannot be split over {devices} devices")
    local_scale = _power_of_two(scale or n**-0.5, rows, x.dtype)
    y = x.reshape(*x.shape[:-1], rows // devices, n // rows)
    # Never in place: the result of the exchange can take a donated operand's memory, the rows before it cannot.
    y = _primitive.transform(y, scale=local_scale)
    alone = _nothing_else_is_sharded()
    exchange = functools.partial(_exchange if alone else _exchange_by_permutations, axis_name=axis_name)
    pieces, join = _split_columns(y, devices, in_memory_order=alone)
    pieces = exchange(_transform_rows(exchange(pieces), scale=scale / local_scale))
    return join(pieces).reshape(x.shape)


def _power_of_two(scale: float, rows: int, dtype) -> float:
    """About scale * sqrt(rows), which leaves the transform across the rows nearly orthonormal.

    So what is exchanged overflows and underflows about as the result does; and as the factor is a power of two, it
    makes no rounding of its own.
    """
    largest = jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32).maxexp - 1
    exponent = math.floor(math.log2(abs(scale)) + math.log2(rows) / 2 + 0.75)
    return 2.0 ** max(1 - largest, min(exponent, largest))


def _split_columns(y: jax.Array, devices: int, *, in_memory_order: bool):
    """Rows (..., own, F), cut into `devices` pieces by columns: (devices * own, ...), and the way back."""
    *batch, own, columns = y.shape
    if own == 1 and in_memory_order:
        # The transform across the rows treats each column of each batch row alike, so any equal pieces do: those that
        # lie one after the other in memory need no transposition.
        return y.reshape(devices, y.size // devices), lambda pieces: pieces.reshape(y.shape)
    cut = (*batch, own, devices, columns // devices)
    source, target = (len(batch) + 1, len(batch)), (0, 1)
    moved = (devices, own, *batch, columns // devices)
    pieces = jnp.moveaxis(y.reshape(cut), source, target).reshape(devices * own, *moved[2:])
    return pieces, lambda pieces: jnp.moveaxis(pieces.reshape(moved), target, source).reshape(y.shape)


def _nothing_else_is_sharded() -> bool:
    """Whether no other mesh axis is the compiler's to shard over, as in a `shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return all(kind == AxisType.Manual or size == 1 for size, kind in kinds)


def _exchange(pieces: jax.Array, *, axis_name) -> jax.Array:
    """Piece p of device q becomes piece q of device p; pieces lie along the first axis."""
    return jax.lax.all_to_all(pieces, axis_name, split_axis=0, concat_axis=0, tiled=True)


def _exchange_by_permutations(pieces: jax.Array, *, axis_name) -> jax.Array:
    """The same, as P - 1 permutations with the same bytes in all.

    XLA gathers the operand of an all_to_all over the axes that the compiler shards, but not that of a permutation.
    """
    devices = axis_size(axis_name)
    device = jax.lax.axis_index(axis_name)
    pieces = pieces.reshape(devices, -1, *pieces.shape[1:])
    received = []
    for shift in range(devices):
        piece = jax.lax.dynamic_index_in_dim(pieces, (device + shift) % devices, keepdims=False)
        to = [(source, (source + shift) % devices) for source in range(devices)]
        received.append(jax.lax.ppermute(piece, axis_name, to) if shift else piece)
    # Shift s brought the piece of device - s, so piece q is the one of shift device - q.
    order = (device - jnp.arange(devices, dtype=device.dtype)) % devices
    return jnp.take(jnp.stack(received), order, axis=0).reshape(-1, *pieces.shape[2:])


def _transform_rows(x: jax.Array, *, scale: float) -> jax.Array:
    """Computes scale * H_K along the first axis, accumulated and rounded like the transform of the last."""
    rows = x.shape[0]
    if rows > _MAX_FUSED_ROWS or rows & (rows - 1):
        y = _primitive.transform(jnp.moveaxis(x, 0, -1), scale=scale, behind=x.ndim - 1)
        return jnp.moveaxis(y, -1, 0)
    accumulator = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    factor = np.asarray(scale, accumulator)

    def butterflies(y):
        if y.shape[0] == 1:
            return (y * factor).astype(x.dtype)
        a, b = jnp.split(y, 2)
        return jnp.concatenate([butterflies(a + b), butterflies(a - b)])

    return butterflies(x.astype(accumulator))
