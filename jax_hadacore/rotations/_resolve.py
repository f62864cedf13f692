"""A plan meets a tree: which arrays it touches, how, and everything that is wrong with it."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _tree
from ._axis import Axis
from ._fold import Fold, Recipe, Scale
from ._match import Match, Matcher, some

if TYPE_CHECKING:
    from ._plan import Axes, Fuse, Plan, Untie


class Resolved(NamedTuple):
    """What a plan does to a tree.

    Attributes:
        folds: how each array that changes is made, by its path.
        sizes: the size of each rotation, by its name.
        counts: how many rotations there are of each that has one a layer.
    """

    folds: dict[str, Fold]
    sizes: dict[str, int]
    counts: dict[str, int]


@dataclasses.dataclass
class _Changes:
    """What is found so far about one array."""

    scales: list[tuple[str, Scale]] = dataclasses.field(default_factory=list)
    turns: list[tuple[str, int | None, Axis]] = dataclasses.field(default_factory=list)
    fill: float | None = None


def resolve(plan: "Plan", tree: Any) -> Resolved:
    """Matches a plan with a tree, whose leaves need no more than a shape and a dtype.

    Raises:
        ValueError: the plan does not fit the tree; names the pattern or the path.
    """
    leaves = _tree.leaves(tree)
    matcher = Matcher({**leaves, **_untied(plan, leaves)})
    changes: defaultdict[str, _Changes] = defaultdict(_Changes)
    untied = {untie.target: untie for untie in plan.untie}
    for path in untied:
        changes[path] = _Changes()
    for fuse in plan.fuse:
        _add_fuse(fuse, matcher, changes)
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, axes in plan.rotate.items():
        matches = [match for axis in axes.axes for match in matcher.all(axis)]
        sizes[name] = _size(name, axes, matches)
        indices: list[int | None] = [None] * len(matches)
        if axes.per_layer:
            counts[name], indices = _layers(name, axes, matches)
        for match, index in zip(matches, indices, strict=True):
            _add_turn(name, index, match, changes[match.path].turns, per_layer=axes.per_layer)
    _check_norms(changes)
    _check_readers(changes)
    _check_complete(plan, matcher.arrays, changes)
    _check_shared(leaves, changes)
    return Resolved({path: _fold(path, change, untied.get(path)) for path, change in changes.items()}, sizes, counts)


def _untied(plan: "Plan", leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that the plan adds to the tree."""
    found = {}
    for untie in plan.untie:
        if untie.source not in leaves:
            raise ValueError(f"Plan: no array {untie.source!r} to untie; the tree has {some(leaves)}.")
        if untie.target in leaves:
            raise ValueError(f"Plan: {untie.target!r} is in the tree: it is not tied to {untie.source!r}.")
        source = leaves[untie.source]
        shape = source.shape[::-1] if untie.transpose else source.shape
        found[untie.target] = jax.ShapeDtypeStruct(shape, source.dtype)
    return found


def _add_fuse(fuse: "Fuse", matcher: Matcher, changes: dict[str, _Changes]) -> None:
    consumers = [match for axis in fuse.into for match in matcher.all(axis)]
    norms = matcher.all(fuse.norm)
    for consumer in consumers:
        own = [norm for norm in norms if consumer.captures[: len(norm.captures)] == norm.captures]
        if len(own) != 1:
            raise ValueError(
                f"Plan: {consumer.path!r} must have one norm of {fuse.norm.path!r}, got {some([n.path for n in own])}."
            )
        _add_scale(fuse.offset, own[0], consumer, changes[consumer.path].scales)
    fed = {path for change in changes.values() for path, _ in change.scales}
    for norm in norms:
        if norm.path not in fed:
            raise ValueError(f"Plan: the norm {norm.path!r} is fused into nothing; it must have a consumer.")
        if changes[norm.path].fill is not None:
            raise ValueError(f"Plan: the norm {norm.path!r} is fused twice; list its consumers in one Fuse.")
        changes[norm.path].fill = 1 - fuse.offset


def _add_scale(offset: float, norm: Match, consumer: Match, scales: list[tuple[str, Scale]]) -> None:
    axis = consumer.axis.axis
    if consumer.size != norm.size:
        raise ValueError(
            f"Plan: the norm {norm.path!r} of {norm.size} elements does not fit axis {axis} of {consumer.path!r}, "
            f"which has {consumer.size}."
        )
    if (norm.axis.layers is not None and consumer.axis.layers is None) or consumer.axis.part is not None:
        raise ValueError(
            f"Plan: the norm {norm.path!r} does not fit {consumer.path!r}: both must name the axis of the layers, and "
            "a part of an array cannot take a norm."
        )
    if any(other.axis.axis == axis for _, other in scales):
        raise ValueError(f"Plan: two norms are fused into axis {axis} of {consumer.path!r}; it must have one.")
    scales.append((norm.path, Scale(offset, norm.recipe, consumer.recipe)))


def _add_turn(
    name: str, index: int | None, match: Match, turns: list[tuple[str, int | None, Axis]], *, per_layer: bool
) -> None:
    axis = match.recipe if per_layer else dataclasses.replace(match.recipe, layers=None)
    for other_name, _, other in turns:
        if other.axis == axis.axis and (axis.part is None or other.part in (None, axis.part)):
            raise ValueError(
                f"Plan: axis {axis.axis} of {match.path!r} is matched twice, by {other_name} and by {name}; "
                "it must be rotated once."
            )
    turns.append((name, index, axis))


def _size(name: str, axes: "Axes", matches: Sequence[Match]) -> int:
    """The size that all axes of a rotation have in common."""
    whole = [match.size for match in matches if not match.axis.split]
    size = axes.size or next(iter(whole), None)
    if not matches:
        raise ValueError(f"Plan: {name} rotates nothing: its patterns are optional, and none matches.")
    if size is None:
        raise ValueError(f"Plan: the size of {name} is not known, as all of its axes are split; give Axes a size.")
    for match in matches:
        if match.size % size if match.axis.split else match.size != size:
            kind = "a multiple of it" if match.axis.split else "that"
            raise ValueError(
                f"Plan: {name} has size {size}; axis {match.axis.axis} of {match.path!r} must have {kind}, "
                f"got {match.size}."
            )
    return size


def _layers(name: str, axes: "Axes", matches: Sequence[Match]) -> tuple[int, list[int | None]]:
    """How many layers there are, and which of them each match is in: None for one that holds all of them."""
    first = matches[0].layers
    if first is not None and all(match.layers == first for match in matches):
        return first, [None] * len(matches)
    for match in matches:
        if match.layers is not None or not match.captures:
            raise ValueError(
                f"Plan: {name} has a rotation for each layer, and {match.path!r} does not say which layer it is in: "
                "its pattern must have a *, or all axes of this rotation the same number of layers."
            )
    order = sorted({match.captures[0] for match in matches}, key=lambda text: (not text.isdigit(), len(text), text))
    for axis in axes.axes:
        having = {match.captures[0] for match in matches if match.axis.path == axis.path}
        if not axis.optional and (missing := [layer for layer in order if layer not in having]):
            raise ValueError(
                f"Plan: {axis.path!r} matches nothing in layer {missing[0]}, where {name} rotates another axis."
            )
    return len(order), [order.index(match.captures[0]) for match in matches]


def _check_norms(changes: Mapping[str, _Changes]) -> None:
    for path, change in changes.items():
        if change.fill is not None and (change.scales or change.turns):
            raise ValueError(f"Plan: {path!r} is a norm to fuse; it cannot be rotated or take another norm.")


def _check_readers(changes: Mapping[str, _Changes]) -> None:
    """What reads one norm reads one vector, which a rotation turns for all of them: for the router of experts too."""
    first: dict[str, tuple[str, set[str]]] = {}
    for path, change in changes.items():
        for norm, scale in change.scales:
            names = {name for name, _, axis in change.turns if axis.axis == scale.axis.axis}
            other, expected = first.setdefault(norm, (path, names))
            if names != expected:
                raise ValueError(
                    f"Plan: {other!r} and {path!r} read the norm {norm!r}; both must be rotated alike, got "
                    f"{sorted(expected)} and {sorted(names)}."
                )


def _check_complete(plan: "Plan", arrays: Mapping[str, Any], changes: Mapping[str, _Changes]) -> None:
    """An array that nobody thought of, a norm or the bias of a residual branch, makes the model another one."""
    for path, array in arrays.items():
        named = path in changes or any(axis.captures(path) is not None for axis in plan.keep)
        if not named and hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"Plan: {path!r} of shape {array.shape} is not in the plan. If it is the weight of a norm, fuse it; if "
                "it reads or writes what a rotation turns, rotate it; else name it in keep."
            )


def _check_shared(leaves: Mapping[str, Any], changes: Mapping[str, _Changes]) -> None:
    """One array at two paths is one parameter, a tied embedding: what is folded into one use would be in the other."""
    seen: dict[int, str] = {}
    for path, leaf in leaves.items():
        first = seen.setdefault(id(leaf), path) if isinstance(leaf, jax.Array | np.ndarray) else path
        if first != path and (path in changes or first in changes):
            raise ValueError(
                f"Plan: {first!r} and {path!r} are one array, matched twice: they are tied. Make one of them a copy."
            )


def _fold(path: str, change: _Changes, untie: "Untie | None") -> Fold:
    return Fold(
        source=untie.source if untie else path,
        norms=tuple(norm for norm, _ in change.scales),
        rotations=tuple((name, index) for name, index, _ in change.turns),
        recipe=Recipe(
            scales=tuple(scale for _, scale in change.scales),
            axes=tuple(axis for _, _, axis in change.turns),
            transpose=untie is not None and untie.transpose,
            fill=change.fill,
        ),
    )
