"""cayley_sgd: gradient descent on orthogonal matrices, as a transformation of optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_HIGHEST = jax.lax.Precision.HIGHEST


class CayleyState(NamedTuple):
    """The step, for a schedule, and the momenta: skew-symmetric matrices, or () without momentum."""

    step: Any
    momentum: Any


def cayley_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.0,
    trust_region: bool = False,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Gradient descent that keeps each matrix R orthogonal: R <- R (I + a M / 2)^-1 (I - a M / 2), Cayley's map.

    With the gradient G of the loss, A = (R^T G - G^T R) / 2 is skew-symmetric, the direction in which the loss changes
    on the group of orthogonal matrices, and

        M <- momentum M + A
        a = min(learning_rate, 1 / |M|_1)    or, with a trust region, learning_rate / |M|_1

    |M|_1 being the largest column sum of magnitudes, which bounds the angle by which M turns a vector. Without momentum
    this is SpinQuant's update, in closed form. A trust region makes the learning rate that bound, in radians, whatever
    the gradient's magnitude.

    The updates are added, as with every optimiser of optax. What follows it in a chain must not change them; what
    precedes it may, such as `optax.clip_by_global_norm`. In a tree with other parameters, use `optax.partition`.

    Args:
        learning_rate: of a gradient of the loss; or a schedule, a function of the step.
        momentum: the part of M that is kept.
        trust_region: whether the step's length is the learning rate alone.
        clip: scale the gradients of all matrices down together if the root of their sum of squares is larger.

    Returns:
        An `optax.GradientTransformation` for trees of orthogonal matrices (..., n, n), batches of which are updated one
        by one. Each step ends with one of Newton's for the nearest orthogonal matrix, so that
        rounding errors do not add up.

    Raises:
        ValueError: on `update`, without the matrices, or if they are not square.
        TypeError: on `update`, if they are not float32 or float64.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jax_hadacore.rotations import cayley_sgd
        >>> target, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 8)))
        >>> target = target.at[:, 0].multiply(jnp.sign(jnp.linalg.det(target)))  # a rotation, as the start
        >>> loss = lambda r: jnp.sum((r - target) ** 2)
        >>> optimizer = cayley_sgd(0.3)
        >>> r = jnp.eye(8)
        >>> state = optimizer.init(r)
        >>> for _ in range(100):
        ...     updates, state = optimizer.update(jax.grad(loss)(r), state, r)
        ...     r = optax.apply_updates(r, updates)
        >>> bool(loss(r) < 1e-3), bool(jnp.allclose(r @ r.T, jnp.eye(8), atol=1e-2))
        (True, True)

    The method is that of Li, Fuxin and Todorovic (2020, arXiv:2002.01113) for square matrices, where its iteration has
    a closed form.
    """

    def init(params) -> CayleyState:
        return CayleyState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params) if momentum else ())

    def update(updates, state: Any, params=None):
        if params is None:
            raise ValueError("cayley_sgd: update needs the matrices, update(gradients, state, matrices), got none.")
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        direction = jax.tree.map(_skew, updates, params)
        if momentum:
            direction = jax.tree.map(lambda m, a: momentum * m + a, state.momentum, direction)

        def added(matrix, direction):
            norm = jnp.maximum(_largest_column_sum(direction), jnp.finfo(direction.dtype).tiny)
            size = rate / norm if trust_region else jnp.minimum(rate, 1 / norm)
            return _turned(matrix, size.astype(matrix.dtype) * direction) - matrix

        return jax.tree.map(added, params, direction), CayleyState(
            optax.safe_increment(state.step), direction if momentum else ()
        )

    descent = optax.GradientTransformation(init, update)
    return descent if clip is None else optax.chain(optax.clip_by_global_norm(clip), descent)


def _skew(gradient: jax.Array, matrix: jax.Array) -> jax.Array:
    """The gradient at R of a function on the orthogonal group, as A of R A: (R^T G - G^T R) / 2."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"cayley_sgd: the matrices must be square, (..., n, n), got shape {matrix.shape}.")
    if not jnp.issubdtype(matrix.dtype, jnp.floating) or matrix.dtype.itemsize < 4:
        raise TypeError(f"cayley_sgd: the matrices must be float32 or float64, got dtype {matrix.dtype.name}.")
    product = _matmul(_transposed(matrix), gradient)
    return (product - _transposed(product)) / 2


def _largest_column_sum(matrix: jax.Array) -> jax.Array:
    """The 1-norm of each matrix, (..., 1, 1)."""
    return jnp.max(jnp.sum(jnp.abs(matrix), axis=-2, keepdims=True), axis=-1, keepdims=True)


def _turned(matrix: jax.Array, direction: jax.Array) -> jax.Array:
    """Cayley's map: R (I + M / 2)^-1 (I - M / 2)."""
    one = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    turned = _matmul(matrix, _solved(one + direction / 2, one - direction / 2))
    # Newton's step to the nearest orthogonal matrix, R (3 - R^T R) / 2.
    excess = one - _matmul(_transposed(turned), turned)
    return turned + _matmul(turned, excess) / 2


def _solved(a: jax.Array, b: jax.Array) -> jax.Array:
    """A^-1 B for each matrix of a batch."""
    return jax.lax.platform_dependent(a, b, cpu=_solved_one_by_one, default=jnp.linalg.solve)


def _solved_one_by_one(a: jax.Array, b: jax.Array) -> jax.Array:
    """The same on the CPU, where the LU of a batch waits in XLA's threads for XLA's threads: two such, and all wait."""
    n = a.shape[-1]
    solved = jax.lax.map(lambda pair: jnp.linalg.solve(*pair), (a.reshape(-1, n, n), b.reshape(-1, n, n)))
    return solved.reshape(a.shape)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)
