"""Fold: what happens to one array, norm weights multiplied in and axes rotated, in one pass with one rounding."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._axis import Axis
from ._rotation import Rotation, wide


@dataclasses.dataclass(frozen=True)
class Scale:
    """A norm's weight multiplied into an axis: w * (weight + offset)."""

    offset: float
    norm: Axis
    axis: Axis


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to an array, without the names of what it is done with: many arrays share one, and its program."""

    scales: tuple[Scale, ...] = ()
    axes: tuple[Axis, ...] = ()
    transpose: bool = False
    fill: float | None = None


@dataclasses.dataclass(frozen=True)
class Fold:
    """How one array of the rotated model is made.

    An axis that the recipe does not name may be cut: the fold of a piece, as of some rows of an embedding, is that
    piece of the fold.

    Attributes:
        source: the path of the array that it is made from: its own, or the embedding for a head that was tied to it.
        norms: the paths of the norm weights that are multiplied into it.
        rotations: the rotations, each by its name and, one a layer, which of the batch.
        recipe: what is done with them.
    """

    source: str
    norms: tuple[str, ...] = ()
    rotations: tuple[tuple[str, int | None], ...] = ()
    recipe: Recipe = Recipe()

    @property
    def reads(self) -> tuple[str, ...]:
        """The paths of all arrays that the result depends on."""
        return (self.source, *self.norms)

    def without_rotations(self) -> "Fold":
        """The part that multiplies norm weights in."""
        return dataclasses.replace(self, rotations=(), recipe=dataclasses.replace(self.recipe, axes=()))

    def __call__(self, arrays: Mapping[str, Any], rotations: Mapping[str, Rotation]) -> jax.Array:
        """The new array.

        Args:
            arrays: those that it `reads`, by their paths. More may be there.
            rotations: those of the plan, by their names.

        Returns:
            An array of the source's dtype and sharding, computed in float32 or wider and rounded once.

        Raises:
            ValueError: a rotation has another size than the axis that it turns, or is not the batch or the single one
                that the plan needs.
        """
        array = arrays[self.source]
        shape = array.shape[::-1] if self.recipe.transpose else array.shape
        turns = [
            self._turn(name, rotations[name], index, axis, shape)
            for (name, index), axis in zip(self.rotations, self.recipe.axes, strict=True)
        ]
        program = _program(None if self.recipe.transpose else _named_sharding(array))
        return program(array, [arrays[path] for path in self.norms], turns, recipe=self.recipe)

    def _turn(self, name: str, rotation: Rotation, index: int | None, axis: Axis, shape: tuple[int, ...]) -> Rotation:
        """The rotation that turns an axis: itself, a batch for an axis of layers, or one of a batch."""
        size = shape[axis.axis]
        if size % rotation.size if axis.split else size != rotation.size:
            raise ValueError(
                f"rotate: {name} has size {rotation.size}, and does not fit axis {axis.axis} of {self.source!r}, which "
                f"has {size} elements."
            )
        batch = rotation.batch
        if index is not None:
            needed, fits = f"a batch of more than {index}", batch is None or (len(batch) == 1 and batch[0] > index)
        elif axis.layers is not None:
            count = shape[axis.layers]
            needed, fits = f"a batch of {count}", batch in (None, (count,))
        else:
            needed, fits = "a single one", not batch
        if not fits:
            raise ValueError(f"rotate: {name} must be {needed} for {self.source!r}, got a batch of {batch}.")
        return rotation if index is None else rotation[index]


def _named_sharding(array: Any) -> NamedSharding | None:
    """The sharding of a concrete array that a mesh shards."""
    concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    return array.sharding if concrete and isinstance(array.sharding, NamedSharding) else None


@functools.cache
def _program(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """The compiled fold, whose result is sharded like its operand."""
    return jax.jit(_folded, static_argnames="recipe", out_shardings=sharding)


def _folded(array: jax.Array, norms: list[jax.Array], turns: list[Rotation], *, recipe: Recipe) -> jax.Array:
    """The fold; where types carry shardings, the compiler decides about those of the steps."""
    compute = functools.partial(_computed, recipe=recipe)
    sharding = jax.typeof(array).sharding
    if any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
        spec = sharding.spec[::-1] if recipe.transpose else sharding.spec
        automatic = jax.sharding.auto_axes(out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))
        compute = automatic(compute)
    return compute(array, norms, turns)


def _computed(array: jax.Array, norms: list[jax.Array], turns: list[Rotation], *, recipe: Recipe) -> jax.Array:
    if recipe.fill is not None:
        return jnp.full_like(array, recipe.fill)
    w = array.astype(wide(array.dtype))
    w = w.T if recipe.transpose else w
    for scale, norm in zip(recipe.scales, norms, strict=True):
        w = _scaled(w, norm.astype(w.dtype), scale)
    for axis, rotation in zip(recipe.axes, turns, strict=True):
        w = _rotated(w, rotation, axis)
    return w.astype(array.dtype)


def _scaled(w: jax.Array, norm: jax.Array, scale: Scale) -> jax.Array:
    kept = [scale.axis.axis]
    if scale.norm.layers is not None:
        assert scale.axis.layers is not None
        norm = jnp.moveaxis(norm, scale.norm.layers, 0 if scale.axis.layers < scale.axis.axis else 1)
        kept.append(scale.axis.layers)
    return w * (norm + scale.offset).reshape([size if i in kept else 1 for i, size in enumerate(w.shape)])


def _rotated(w: jax.Array, rotation: Rotation, axis: Axis) -> jax.Array:
    part = slice(None) if axis.part is None else slice(axis.part, axis.part + 1)
    chosen = w[part]
    shape = chosen.shape
    at, layers = axis.axis, axis.layers
    if axis.split:
        chosen = chosen.reshape(*shape[:at], -1, rotation.size, *shape[at + 1 :])
        layers = layers if layers is None or layers < at else layers + 1
        at += 1
    chosen = rotation.apply(chosen, at, layers=layers).reshape(shape)
    return chosen if axis.part is None else w.at[part].set(chosen)
