"""The layers for Flax models with online rotations, in nnx and, through its bridge, in Linen."""

import doctest
import importlib
import importlib.util

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

from jax_hadacore.rotations import Plan, Rotation, rotate

if importlib.util.find_spec("flax") is None:
    pytest.skip("flax is not installed: needs the extra 'models'", allow_module_level=True)

from flax import linen, nnx

from jax_hadacore.rotations import OnlineHadamard, RotatedLinear

# Flax is written for JAX's usual configuration.
pytestmark = pytest.mark.usefixtures("x64_off", "usual_promotion")


def rotation(n=24, **fields):
    signs = jnp.asarray(np.sign(normal(n, np.float32, "signs")))
    return Rotation(n, signs, **fields)


def learned(n=24):
    q = np.linalg.qr(normal((n, n), np.float64, "q"))[0]
    return rotation(n, q=jnp.asarray(q, jnp.float32))


@pytest.mark.parametrize("turn", [Rotation(24), rotation(), rotation(block=8), learned()], ids=repr)
def test_online_hadamard(turn):
    x = normal((5, 3, 24), np.float32)
    layer, back = OnlineHadamard(turn), OnlineHadamard(turn, transpose=True)
    y = layer(jnp.asarray(x))
    np.testing.assert_allclose(y, x @ decoder.matrix(turn), atol=1e-5)
    np.testing.assert_allclose(back(y), x, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(layer)(jnp.asarray(x)), y, atol=1e-6)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))


def test_an_online_rotation_and_a_fold_cancel_out():
    turn = learned(32)
    linear = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal((4, 32), np.float32))
    folded = rotate(nnx.state(linear), Plan({"R4": ["kernel@0"]}, keep=["bias"]), {"R4": turn})
    model = nnx.Sequential(nnx.silu, OnlineHadamard(turn), nnx.merge(nnx.graphdef(linear), folded))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model(x), linear(nnx.silu(x)), atol=1e-5)


def test_the_state_of_a_layer_is_that_of_its_rotation():
    first, second = OnlineHadamard(learned()), OnlineHadamard(rotation(q=jnp.eye(24)))
    nnx.update(second, nnx.state(first))
    x = jnp.asarray(normal((2, 24), np.float32))
    np.testing.assert_array_equal(first(x), second(x))


@pytest.mark.parametrize("bias", [True, False])
def test_rotated_linear(bias):
    turn = learned()
    linear = nnx.Linear(24, 7, use_bias=bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    kernel, x = np.array(linear.kernel[...]), jnp.asarray(normal((3, 5, 24), np.float32))
    with jax.default_matmul_precision("highest"):
        layer = RotatedLinear(linear, turn)
        np.testing.assert_allclose(layer(x), linear(x), atol=1e-5)
    np.testing.assert_array_equal(linear.kernel[...], kernel)
    np.testing.assert_allclose(layer.linear.kernel[...], decoder.matrix(turn).T @ kernel, atol=1e-5)


def test_gradients_reach_the_kernel_and_the_learned_matrix():
    layer = RotatedLinear(nnx.Linear(24, 7, rngs=nnx.Rngs(0)), learned())
    x = jnp.asarray(normal((5, 24), np.float32))
    grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2), argnums=nnx.DiffState(0, nnx.Variable))(layer)
    for leaf in grads["linear"]["kernel"], grads["online"]["q"]:
        assert np.abs(leaf[...]).max() > 0.1
    np.testing.assert_array_equal(grads["online"]["signs"][...], 0)


def test_in_a_linen_model():
    turn = rotation()

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(6, use_bias=False)(nnx.bridge.to_linen(OnlineHadamard, turn, skip_rng=True)(x))

    x = jnp.asarray(normal((4, 24), np.float32))
    model = Model()
    variables = model.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"Dense_0"}
    plan = Plan({"T": ["Dense_0/kernel@0"]}, keep=["**"])
    rotated = {**variables, "params": rotate(variables["params"], plan, {"T": turn})}
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(model.apply(rotated, x), x @ variables["params"]["Dense_0"]["kernel"], atol=1e-5)


def test_docstrings():
    tested = doctest.testmod(importlib.import_module(OnlineHadamard.__module__))
    assert tested.attempted
    assert not tested.failed
