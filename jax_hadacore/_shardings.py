"""How an array is sharded, as its type says."""

import math

import jax
import jax.core
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def known_sharding(x: jax.Array) -> Sharding | None:
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


def pieces(split: NamedSharding) -> int:
    """How many pieces the last axis is split into."""
    names = split.spec[-1] if isinstance(split.spec[-1], tuple) else (split.spec[-1],)
    return math.prod(split.mesh.shape[name] for name in names)


def whole(x: jax.Array, split: NamedSharding) -> jax.Array:
    """Gathers a last axis that is split."""
    return jax.sharding.reshard(x, NamedSharding(split.mesh, PartitionSpec(*split.spec[:-1], None)))


def replicated(negative: jax.Array | None) -> jax.Array | None:
    """Gathers signs that are split in explicit sharding mode: every row needs all of them."""
    split = None if negative is None else split_last_axis(negative)
    return jax.sharding.reshard(negative, NamedSharding(split.mesh, PartitionSpec(None))) if split else negative


def varying(x: np.ndarray | jax.Array) -> frozenset:
    """The manual mesh axes along which an array differs. Newer versions of JAX keep them in another place."""
    in_type = jax.typeof(x)
    return in_type.vma if hasattr(in_type, "vma") else in_type.manual_axis_type.varying
