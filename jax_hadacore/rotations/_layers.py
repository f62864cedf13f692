"""The layers for Flax models whose activations are rotated online; the only module that imports flax."""

import jax
from flax import nnx

from ._plan import Plan
from ._rotate import rotate
from ._rotation import Rotation


class RotationVariable(nnx.Variable):
    """The signs or the learned matrix of a rotation: no `nnx.Param`, which optimisers of parameters would change."""


class OnlineHadamard(nnx.Module):
    """Rotates the last axis of its input: y = T(x).

    For the places where a rotation cannot be folded: R4 before a down_proj whose kernel a plan has rotated, R1 after a
    norm of a model with post-norms, or, as the adjoint, before the final norm of one with tied embeddings.

    Args:
        rotation: which one. `Rotation(n)` is the plain transform.
        transpose: apply the adjoint.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_hadacore.rotations import OnlineHadamard, Rotation
        >>> model = nnx.Sequential(nnx.silu, OnlineHadamard(Rotation(64)), nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        >>> model(jnp.ones((2, 64))).shape
        (2, 8)

    In a Linen model it is `nnx.bridge.to_linen(OnlineHadamard, rotation, skip_rng=True)`.
    """

    def __init__(self, rotation: Rotation, *, transpose: bool = False):
        self.size = rotation.size
        self.block = rotation.block
        self.transpose = transpose
        self.signs = None if rotation.signs is None else RotationVariable(rotation.signs)
        self.q = None if rotation.q is None else RotationVariable(rotation.q)

    @property
    def rotation(self) -> Rotation:
        """The rotation, of the current values."""
        signs, q = (None if variable is None else variable[...] for variable in (self.signs, self.q))
        return Rotation(self.size, signs, q, self.block)

    def __call__(self, x: jax.Array) -> jax.Array:
        """T(x) of an array (..., n), or its adjoint."""
        return self.rotation.apply(x, transpose=self.transpose)


class RotatedLinear(nnx.Module):
    """A linear layer that sees its input rotated: y = T(x) @ T(kernel, axis=0) + bias, the same function.

    It stands in for a `nnx.Linear` of any model, with post-norms or LayerNorm too: nothing else has to fit. Outliers of
    the input and of the kernel are spread before something quantises them.

    Args:
        linear: the layer, which does not change; the new one has a rotated copy of its kernel.
        rotation: of size `linear.in_features`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jax_hadacore.rotations import RotatedLinear, Rotation
        >>> linear = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 64))
        >>> y = linear(x)
        >>> jnp.allclose(RotatedLinear(linear, Rotation(64))(x), y, atol=0.05)
        Array(True, dtype=bool)
    """

    def __init__(self, linear: nnx.Linear, rotation: Rotation):
        self.online = OnlineHadamard(rotation)
        graph, state = nnx.split(linear)
        self.linear = nnx.merge(graph, rotate(state, Plan({"T": ["kernel@0"]}, keep=["**"]), {"T": rotation}))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The result of the layer for an array (..., in_features)."""
        return self.linear(self.online(x))
