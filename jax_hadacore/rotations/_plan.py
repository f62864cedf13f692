"""Plan: which axes of which arrays the rotations of a model turn, as data."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import decompose
from ._axis import Axis, parse
from ._fold import Fold
from ._resolve import resolve
from ._rotation import Rotation


@dataclasses.dataclass(frozen=True)
class Axes:
    """All axes that one rotation turns.

    Attributes:
        axes: of the arrays that write what it rotates and of those that read it, each 'PATTERN@AXIS' or an `Axis`.
        per_layer: a rotation for each layer: each number that the first * of a pattern stands for, or each entry of the
            axis `layers` of a scanned model.
        signed: whether `Plan.init` draws random signs.
        size: of the rotation, where all axes are split and do not tell it.
    """

    axes: tuple[Axis, ...]
    per_layer: bool = False
    signed: bool = True
    size: int | None = None

    def __init__(
        self, axes: Iterable[str | Axis], *, per_layer: bool = False, signed: bool = True, size: int | None = None
    ):
        _set(self, axes=tuple(map(parse, axes)), per_layer=per_layer, signed=signed, size=size)


@dataclasses.dataclass(frozen=True)
class Fuse:
    """A norm whose weight is multiplied into what reads its result, so that a rotation commutes with it.

    Attributes:
        norm: the weight, a pattern of its path.
        into: the axes of all arrays that read the result. One belongs to the norm whose * stand for the same as the
            first * of its own pattern.
        offset: the norm multiplies by its weight + offset: 1 for Gemma's, whose neutral weight is 0.
    """

    norm: Axis
    into: tuple[Axis, ...]
    offset: float = 0.0

    def __init__(self, norm: str | Axis, into: Iterable[str | Axis], *, offset: float = 0.0):
        _set(self, norm=parse(norm, default=0), into=tuple(map(parse, into)), offset=offset)


@dataclasses.dataclass(frozen=True)
class Untie:
    """An array that the rotated model has and the given one has not: a head that was tied to the embedding.

    Attributes:
        source: the path of the embedding.
        target: the path of the head.
        transpose: the head is the transpose of the embedding.
    """

    source: str
    target: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the rotations of a model do to its parameters.

    An orthogonal map T of a vector of activations is folded into the weights by applying T along the matching axis of
    each: of those that write the vector (weights and biases) and of those that read it. There is one direction, so a
    plan says only which axes.

    A plan names every floating-point array of a model: what it does not fuse or rotate is listed in `keep`.

    Attributes:
        rotate: the axes of each rotation, by its name.
        fuse: the norms that are multiplied into what follows them before it is rotated.
        untie: the heads to separate from their embedding.
        keep: patterns of the arrays that stay as they are. They may match nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_hadacore.rotations import Axes, Fuse, Plan, rotate
        >>> plan = Plan(
        ...     rotate={"R1": Axes(["embed@1", "layers/*/up@0", "layers/*/down@1", "head@0"])},
        ...     fuse=[Fuse("layers/*/norm", into=["layers/*/up@0"]), Fuse("norm", into=["head@0"])],
        ... )
        >>> layer = {"norm": jnp.ones(8), "up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
        >>> params = {"embed": jnp.ones((10, 8)), "layers": [layer], "norm": jnp.ones(8), "head": jnp.ones((8, 10))}
        >>> rotations = plan.init(jax.random.key(0), params)
        >>> rotated = rotate(params, plan, rotations)
        >>> jnp.allclose(params["embed"] @ params["head"], rotated["embed"] @ rotated["head"], atol=0.05)
        Array(True, dtype=bool)

    R1, R2, R3 and R4 are the names of the rotations in SpinQuant (arXiv:2405.16406).
    """

    rotate: Mapping[str, Axes]
    fuse: tuple[Fuse, ...] = ()
    untie: tuple[Untie, ...] = ()
    keep: tuple[Axis, ...] = ()

    def __init__(
        self,
        rotate: Mapping[str, Axes | Iterable[str | Axis]],
        *,
        fuse: Iterable[Fuse] = (),
        untie: Iterable[Untie] = (),
        keep: Iterable[str | Axis] = (),
    ):
        _set(
            self,
            rotate={name: axes if isinstance(axes, Axes) else Axes(axes) for name, axes in rotate.items()},
            fuse=tuple(fuse),
            untie=tuple(untie),
            keep=tuple(parse(pattern, default=0) for pattern in keep),
        )

    def folds(self, params: Any) -> dict[str, Fold]:
        """How each array that changes is made, by its path, so that a checkpoint is rotated one array at a time.

        Args:
            params: any pytree; its leaves need no more than a shape and a dtype (`jax.ShapeDtypeStruct`).

        Returns:
            For each path a `Fold`, which names the arrays that it `reads` and computes the new one of them. Arrays
            without one do not change.

        Raises:
            ValueError: the plan does not fit the parameters; names the path: a pattern that matches nothing, a wrong
                size, an array that is not in the plan (a norm that is not fused), one that is matched twice, or two
                paths with one array (tied embeddings).
        """
        return resolve(self, params).folds

    def init(
        self,
        key: jax.Array,
        params: Any,
        *,
        learn: Collection[str] = (),
        block: Mapping[str, int] | None = None,
    ) -> dict[str, Rotation]:
        """Rotations for a model: random signs, where the plan has some, and a q = I to learn.

        Draw them once and store them with the weights, as those of `random_signs`.

        Args:
            key: a key of `jax.random`.
            params: as for `folds`.
            learn: the names of the rotations that get a q.
            block: the block of each rotation, by its name; of the others all of it.

        Returns:
            The rotations by their names, with float32 leaves; those that have one a layer as a batch.

        Raises:
            ValueError: as for `folds`, or a name is not in the plan, or there is no transform of a length.
        """
        block = block or {}
        if unknown := {*learn, *block} - set(self.rotate):
            raise ValueError(f"Plan.init: the plan has the rotations {list(self.rotate)}, got {sorted(unknown)}.")
        resolved = resolve(self, params)
        made = {}
        for (name, axes), own_key in zip(self.rotate.items(), jax.random.split(key, len(self.rotate)), strict=True):
            size = resolved.sizes[name]
            width = block.get(name, size)
            _check_width(name, width, size)
            batch = (resolved.counts[name],) if axes.per_layer else ()
            parts = (size // width,) if name in block else ()
            made[name] = Rotation(
                size,
                signs=jax.random.rademacher(own_key, (*batch, size), jnp.float32) if axes.signed else None,
                q=jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (*batch, *parts, width, width))
                if name in learn
                else None,
                block=block.get(name),
            )
        return made


def _check_width(name: str, width: int, size: int) -> None:
    if size % width:
        raise ValueError(f"Plan.init: the block of {name} must divide its size {size}, got {width}.")
    try:
        decompose(width)
    except ValueError as error:
        raise ValueError(f"Plan.init: {name} needs another block, given as block={{{name!r}: ...}}: {error}") from error


def _set(instance: Any, **values: Any) -> None:
    """Sets the fields of a frozen dataclass whose __init__ takes more types than its fields have."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
