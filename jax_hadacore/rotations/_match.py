"""Match: an axis of one array that a pattern of a plan found."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._axis import Axis

_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


class Match(NamedTuple):
    """An axis of one array, counted from the front."""

    path: str
    captures: tuple[str, ...]
    axis: Axis
    size: int
    layers: int | None  # how many, where one array holds all

    @property
    def recipe(self) -> Axis:
        """The axis without what differs between arrays of one recipe."""
        return dataclasses.replace(self.axis, path="", optional=False)


class Matcher:
    """Finds the arrays of a tree by patterns."""

    def __init__(self, arrays: Mapping[str, Any]):
        self.arrays = arrays

    def all(self, axis: Axis) -> list[Match]:
        """All arrays that a pattern matches."""
        captured = [(path, axis.captures(path)) for path in self.arrays]
        found = [self._match(path, captures, axis) for path, captures in captured if captures is not None]
        if not found and not axis.optional:
            raise ValueError(f"Plan: no array matches {axis.path!r}; the tree has {some(self.arrays)}.")
        return found

    def _match(self, path: str, captures: tuple[str, ...], axis: Axis) -> Match:
        array = self.arrays[path]
        if array.dtype not in _DTYPES:
            raise ValueError(
                f"Plan: {path!r} has dtype {array.dtype}; it must be float16, bfloat16, float32 or float64. "
                "Rotate weights before they are quantised."
            )
        if array.dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
            raise ValueError(f"Plan: {path!r} has dtype {array.dtype}, which needs jax_enable_x64.")
        ndim = len(array.shape)
        counted = {"axis": axis.axis} if axis.layers is None else {"axis": axis.axis, "layers": axis.layers}
        for name, number in counted.items():
            if not -ndim <= number < ndim:
                raise ValueError(f"Plan: {path!r} of shape {array.shape} has no {name} {number}.")
        part = axis.part
        if part is not None and not -array.shape[0] <= part < array.shape[0]:
            raise ValueError(f"Plan: {path!r} of shape {array.shape} has no part {part} on axis 0.")
        front = {name: number % ndim for name, number in counted.items()}
        front |= {} if part is None else {"part": part % array.shape[0]}
        return Match(
            path,
            captures,
            dataclasses.replace(axis, **front),
            size=array.shape[front["axis"]],
            layers=array.shape[front["layers"]] if "layers" in front else None,
        )


def some(paths: Mapping[str, Any] | Sequence[str], most: int = 3) -> str:
    """The first of the paths, for a message."""
    first = ", ".join(repr(path) for path in list(paths)[:most])
    return f"{first} and {len(paths) - most} more" if len(paths) > most else first or "no arrays"
