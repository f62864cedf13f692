"""rotate() and fuse_norms(): a plan applied to parameters, and the check that the model is still the same."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import _tree
from ._fold import Fold
from ._plan import Plan
from ._rotation import Rotation, wide


def fuse_norms(params: Any, plan: Plan) -> Any:
    """Multiplies the weights of norms into what reads their results, and makes them neutral.

    The model computes the same. `rotate` does this too, in one pass with the rotations and one rounding.

    Args:
        params: any pytree of parameters.
        plan: which norms go where.

    Returns:
        The parameters, of the same paths, shapes, dtypes and shardings.

    Raises:
        ValueError: as `Plan.folds`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore.rotations import Fuse, Plan, fuse_norms
        >>> params = {"norm": jnp.array([2.0, 3.0]), "up": jnp.ones((2, 3))}
        >>> fuse_norms(params, Plan({}, fuse=[Fuse("norm", into=["up@0"])]))
        {'norm': Array([1., 1.], dtype=float32), 'up': Array([[2., 2., 2.],
               [3., 3., 3.]], dtype=float32)}
    """
    folds = {path: fold.without_rotations() for path, fold in plan.folds(params).items()}
    return _folded(params, plan, folds, {})


def rotate(params: Any, plan: Plan, rotations: Mapping[str, Rotation]) -> Any:
    """Folds rotations into the parameters of a model: norms are fused and axes rotated, in one pass.

    Each array is computed in float32 (float64 for float64) and rounded once. The function is pure, can be traced, and
    is differentiable in the q of the rotations and in the parameters.

    Args:
        params: any pytree of parameters: nested dicts, an nnx.State, Linen's, or a flat dict of a checkpoint's names.
        plan: which axes; `plans` has those of known models.
        rotations: those of the plan, by their names, as `Plan.init` makes them.

    Returns:
        The parameters, of the same paths, shapes, dtypes and shardings, and an untied head if the plan has one.

    Raises:
        ValueError: as `Plan.folds`, or a rotation is missing or has another size.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax_hadacore.rotations import Plan, Rotation, rotate
        >>> params = {"v": jnp.eye(4), "o": 2 * jnp.eye(4)}
        >>> rotated = rotate(params, Plan({"R2": ["v@1", "o@0"]}), {"R2": Rotation(4)})
        >>> jnp.allclose(rotated["v"] @ rotated["o"], params["v"] @ params["o"])
        Array(True, dtype=bool)
    """
    if missing := set(plan.rotate) - set(rotations):
        raise ValueError(f"rotate: the plan needs the rotations {list(plan.rotate)}, got none for {sorted(missing)}.")
    return _folded(params, plan, plan.folds(params), rotations)


def check_invariance(
    apply: Callable[..., Any], params: Any, rotated: Any, *inputs: Any, tolerance: float = 5e-5
) -> float:
    """Checks that a model computes the same with rotated parameters as with its own.

    Both are computed with matrix products in full float32. Rotated values of 16 bits are rounded anew: there, give a
    tolerance of what rounding does, the difference of the model's own outputs in 16 bits and in float32.

    Args:
        apply: the model, `apply(params, *inputs)`. Its result is a pytree of what rotations leave unchanged: logits,
            not a cache of keys and values.
        params: the original parameters.
        rotated: the rotated ones.
        *inputs: what the model is applied to.
        tolerance: the largest deviation allowed, relative to the largest magnitude of an output.

    Returns:
        The largest deviation.

    Raises:
        AssertionError: it exceeds the tolerance, or is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_hadacore.rotations import Plan, Rotation, check_invariance, rotate
        >>> params = {"v": jnp.eye(4), "o": 2 * jnp.eye(4)}
        >>> rotated = rotate(params, Plan({"R2": ["v@1", "o@0"]}), {"R2": Rotation(4)})
        >>> check_invariance(lambda p, x: x @ p["v"] @ p["o"], params, rotated, jnp.ones(4)) < 1e-6
        True
    """
    with jax.default_matmul_precision("highest"):
        before, after = apply(params, *inputs), apply(rotated, *inputs)
    largest = max(jax.tree.leaves(jax.tree.map(_deviation, before, after)))
    if not largest <= tolerance:
        raise AssertionError(
            f"check_invariance: the outputs may deviate by {tolerance:.2g} of their largest magnitude, "
            f"got {largest:.2g}."
        )
    return largest


def _folded(params: Any, plan: Plan, folds: Mapping[str, Fold], rotations: Mapping[str, Rotation]) -> Any:
    arrays = _tree.leaves(params)
    new = {path: fold(arrays, rotations) for path, fold in folds.items()}
    params = _tree.replace(params, new)
    for untie in plan.untie:
        params = _tree.add(params, untie.target, untie.source, new[untie.target])
    return params


def _deviation(before: jax.Array, after: jax.Array) -> float:
    before, after = (jnp.asarray(x).astype(wide(x.dtype)) for x in (before, after))
    return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
